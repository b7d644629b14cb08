"""What one side of a migration says to the other: the qemus to each other in frames, their ultravisors in messages that
the frames carry."""

from __future__ import annotations

import trio

from protocol.declare import Call
from protocol.errors import MalformedMessage, PefboxError
from services.qemu.migration.channel import BulkChannel
from services.qemu.migration.hello import MAX_REASON_BYTES, printable
from services.qemu.migration.kvm_port import KvmPort
from services.qemu.migration.places import RECORD
from services.qemu.migration.stream import Frame, FrameKind
from shared.stream_buffer import StreamBuffer

_GOODBYE_SECONDS = 1.0


class Conversation:
    """One side of it. `peer` is what the other side is called; when it gives up, that is raised as `given_up`."""

    def __init__(
        self, channel: BulkChannel, kvm: KvmPort, stream: StreamBuffer, peer: str, given_up: type[PefboxError]
    ) -> None:
        self._channel, self._kvm, self._stream = channel, kvm, stream
        self._peer, self._given_up = peer, given_up

    # -- the other qemu ---------------------------------------------------------------------------------------

    async def send(self, kind: FrameKind, payload: bytes) -> None:
        """Say something; raises ChannelLost."""
        await self._channel.send(kind, payload)

    async def next(self) -> Frame:
        """What it says next; raises PefboxError."""
        frame = await self._channel.receive()
        if frame.kind is FrameKind.FAILED:
            raise self._given_up(f"{self._peer}: {printable(frame.payload)}")
        return frame

    async def expect(self, kind: FrameKind) -> memoryview:
        """The payload of what it says next, which is of this kind; raises PefboxError."""
        frame = await self.next()
        if frame.kind is not kind:
            raise MalformedMessage(f"{self._peer} sent {frame.kind.name} instead of {kind.name}")
        return frame.payload

    async def give_up(self, reason: str, word: bytes = b"") -> None:
        """End it: with a reason, and the ultravisor's word if there is one, if the other side takes them soon."""
        with trio.move_on_after(_GOODBYE_SECONDS):
            try:
                if word:
                    await self.send(FrameKind.STATEMENT, word)
                await self.send(FrameKind.FAILED, reason.encode()[:MAX_REASON_BYTES])
            except PefboxError:
                pass
        self._channel.close()

    # -- the ultravisor of this host --------------------------------------------------------------------------

    async def fetch(self, step: Call) -> bytes:
        """What it says to the other one; raises StepRefused, PeerGone."""
        (n_bytes,) = await self._kvm.ucall(step, RECORD)
        return self._stream.read(RECORD, n_bytes)

    async def give(self, step: Call, message: memoryview) -> list[int]:
        """Give it a message of the other one; the results of the step. Raises StepRefused, PeerGone."""
        self._stream.write(RECORD, message)
        return await self._kvm.ucall(step, RECORD, len(message))

    async def exchange(self, step: Call, message: memoryview) -> bytes:
        """As `give`; what it says to that."""
        (n_bytes,) = await self.give(step, message)
        return self._stream.read(RECORD, n_bytes)
