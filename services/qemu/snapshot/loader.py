"""The machine comes out of a file: all of it is read and checked, then loaded, and only then does it go on."""

from __future__ import annotations

from collections.abc import Callable

import trio

from protocol import ucalls as u
from protocol.errors import MalformedMessage, PefboxError
from services.qemu.migration.hello import hello_of, why_not
from services.qemu.migration.inflow import Inflow
from services.qemu.migration.kvm_port import KvmPort, until_answered
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.places import RECORD
from services.qemu.migration.stream import Frame, FrameKind, Hello
from services.qemu.snapshot.body import BodyReader
from shared.snapshot_file import read_head
from shared.stream_buffer import StreamBuffer


class RestoreFailed(PefboxError):
    """The VM does not go on out of this snapshot."""


class SnapshotLoad:
    """One snapshot that is being restored; `run` once. `arrived` is told when the VM runs, or is paused, here."""

    def __init__(
        self, machine: MovableMachine, kvm: KvmPort, stream: StreamBuffer, fd: int, arrived: Callable[[], None]
    ) -> None:
        """Raises BadSnapshot."""
        self._machine, self._kvm, self._arrived = machine, kvm, arrived
        self._inflow = Inflow(machine, kvm, stream)
        self.head = read_head(fd)
        self._body = BodyReader(fd, self.head)
        self._secure = False

    @property
    def n_bytes(self) -> int:
        """That were read."""
        return self._body.n_bytes

    async def run(self) -> None:
        """Restore the VM; returns when it goes on. Raises PefboxError: it does not, and nothing of it is kept."""
        try:
            await self._greet()
            await self._receive()
            await self._inflow.load()
            if self._secure:
                await self._inflow.load_secure()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._give_up()
            raise
        with trio.CancelScope(shield=True):
            await self._start()

    async def _greet(self) -> None:
        theirs = Hello.decode((await self._expect(FrameKind.HELLO)).payload)
        vm = self._machine.vm
        reason = why_not(theirs, hello_of(vm, secure=theirs.secure), there="in the snapshot")
        if reason is None and theirs.secure and not vm.secure_allowed:
            reason = "the VM may not be secure here"
        if reason is not None:
            raise RestoreFailed(reason)
        self._secure = theirs.secure
        if self._secure:
            head = (await self._expect(FrameKind.HANDSHAKE)).payload
            await self._inflow.give(u.UV_RESTORE_BEGIN, head)

    async def _receive(self) -> None:
        while not self._inflow.is_whole(secure=self._secure):
            await self._inflow.take(await self._body.receive(), secure=self._secure)
        self._body.check_end()

    async def _start(self) -> None:
        if self._secure:
            try:
                # Once it may have reached the ultravisor only its answer says whether the VM runs.
                await until_answered(lambda: self._kvm.ucall(u.UV_RESTORE_START, RECORD))
            except PefboxError:
                await self._give_up()
                raise
        running = self._machine.is_running
        self._machine.arrived(running=running)
        self._arrived()
        if running:
            await until_answered(self._kvm.go_on)

    async def _give_up(self) -> None:
        if not self._secure:
            return
        try:
            await self._kvm.ucall(u.UV_IMPORT_ABANDON, RECORD)
        except PefboxError:
            # Not begun, or the ultravisor is gone: what it holds goes with it.
            return

    async def _expect(self, kind: FrameKind) -> Frame:
        frame = await self._body.receive()
        if frame.kind is not kind:
            raise MalformedMessage(f"the snapshot has {frame.kind.name} in the place of {kind.name}")
        return frame
