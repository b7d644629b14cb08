"""The destination's side of a migration in its qemu: everything is taken, checked and loaded, and then waits.

The VM runs here when its source gave the right to: for a secure VM that is the start token, which this host's
ultravisor checks, for a normal one a frame. Before that anything that goes wrong ends it here for good, and says so.
The token may reach the ultravisor another way, carried by an operator: then this side is told (`has_started`).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import trio

from protocol import ucalls as u
from protocol.errors import PefboxError
from services.qemu.migration.channel import BulkChannel
from services.qemu.migration.conversation import Conversation
from services.qemu.migration.hello import hello_of, why_not
from services.qemu.migration.inflow import Inflow
from services.qemu.migration.kvm_port import KvmPort, until_answered
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.stream import FrameKind, Hello
from shared.stream_buffer import StreamBuffer


class ArrivalStatus(Enum):
    """How far it is; the values are QEMU's words where it has some."""

    SETUP = "setup"
    ACTIVE = "active"
    READY = "device"
    COMPLETED = "completed"
    FAILED = "failed"


class ArrivalFailed(PefboxError):
    """The VM does not come here."""


class DestinationMigration:
    """One migration; `run` once. `say` is told each new status."""

    def __init__(
        self,
        machine: MovableMachine,
        kvm: KvmPort,
        stream: StreamBuffer,
        channel: BulkChannel,
        say: Callable[[ArrivalStatus], None],
    ) -> None:
        self._machine, self._kvm, self._channel, self._say = machine, kvm, channel, say
        self._talk = Conversation(channel, kvm, stream, "the source", ArrivalFailed)
        self._inflow = Inflow(machine, kvm, stream)
        self._hello: Hello | None = None
        self._loaded = False
        self._runs = False

    async def run(self) -> None:
        """Take the VM; returns when it runs here. Raises ArrivalFailed or another PefboxError: it never will."""
        try:
            hello = await self._greet()
            if hello.secure:
                await self._shake_hands()
            self._say(ArrivalStatus.ACTIVE)
            await self._receive(secure=hello.secure)
            await self._load(secure=hello.secure)
            await self._start(secure=hello.secure)
        except BaseException as error:
            if not self._runs:
                with trio.CancelScope(shield=True):
                    await self._give_up(str(error))
            # What goes wrong with the conversation is no matter any more once the VM runs here.
            if not self._runs or not isinstance(error, PefboxError):
                raise
        finally:
            self._channel.close()
        self._say(ArrivalStatus.COMPLETED)

    async def has_started(self) -> None:
        """The ultravisor has the start token from somebody else: the VM runs here, whatever this side gave up.

        Raises ArrivalFailed when not all of the VM had come, so that it cannot be.
        """
        if self._runs:
            return
        if not self._loaded:
            raise ArrivalFailed("the VM did not come here as a whole")
        self._runs = True
        self._channel.close()
        with trio.CancelScope(shield=True):
            await self._go_on()
        self._say(ArrivalStatus.COMPLETED)

    # -- setup ------------------------------------------------------------------------------------------------

    async def _greet(self) -> Hello:
        theirs = Hello.decode(await self._talk.expect(FrameKind.HELLO))
        ours = hello_of(self._machine.vm, secure=theirs.secure)
        reason = why_not(theirs, ours)
        if reason is None and theirs.secure and not self._machine.vm.secure_allowed:
            reason = "the VM may not be secure here"
        if reason is not None:
            raise ArrivalFailed(reason)
        self._hello = theirs
        await self._talk.send(FrameKind.HELLO, ours.encode())
        return theirs

    async def _shake_hands(self) -> None:
        talk = self._talk
        answer = await talk.exchange(u.UV_IMPORT_OFFER, await talk.expect(FrameKind.HANDSHAKE))
        await talk.send(FrameKind.HANDSHAKE, answer)
        await talk.give(u.UV_IMPORT_CONFIRM, await talk.expect(FrameKind.HANDSHAKE))

    # -- what comes -------------------------------------------------------------------------------------------

    async def _receive(self, *, secure: bool) -> None:
        while not self._inflow.is_whole(secure=secure):
            await self._inflow.take(await self._talk.next(), secure=secure)

    # -- loading ----------------------------------------------------------------------------------------------

    async def _load(self, *, secure: bool) -> None:
        await self._inflow.load()
        if not secure:
            self._loaded = True
            await self._talk.send(FrameKind.READY, b"")
            return
        ready = await self._inflow.load_secure()
        self._loaded = True
        await self._talk.send(FrameKind.RECORD, ready)

    async def _start(self, *, secure: bool) -> None:
        self._say(ArrivalStatus.READY)
        right = await self._talk.expect(FrameKind.STATEMENT if secure else FrameKind.START)
        with trio.CancelScope(shield=True):
            # Once the token may have reached the ultravisor only its answer says whether the VM runs here.
            word = await until_answered(lambda: self._talk.exchange(u.UV_IMPORT_TOKEN, right)) if secure else b""
            ran, self._runs = self._runs, True
            await self._tell(FrameKind.STATEMENT if secure else FrameKind.STARTED, word)
            if not ran:
                await self._go_on()

    async def _go_on(self) -> None:
        running = self._machine.is_running
        self._machine.arrived(running=running)
        if not running:
            return
        try:
            await until_answered(self._kvm.go_on)
        except PefboxError:
            # kvm is dead, or the VM is in no state to go on: its own end says why.
            return

    async def _tell(self, kind: FrameKind, payload: bytes) -> None:
        try:
            await self._talk.send(kind, payload)
        except PefboxError:
            # The source learns it from an operator.
            return

    # -- giving up --------------------------------------------------------------------------------------------

    async def _give_up(self, reason: str) -> None:
        word = b""
        if self._hello is not None and self._hello.secure:
            word = await self._abandon()
        if self._runs:
            return
        self._say(ArrivalStatus.FAILED)
        await self._talk.give_up(reason, word)

    async def _abandon(self) -> bytes:
        try:
            return await self._talk.fetch(u.UV_IMPORT_ABANDON)
        except PefboxError:
            # Not begun, or the ultravisor is gone: what it holds goes with it.
            return b""
