"""The machine goes into a file: it stands still, all of it is written, and when the file is safe it is there alone.

    saving   the processor stands still, devices are held, frames are written
    written  the file is whole and on stable storage; the launcher gives it its name, then says `commit`
    saved    the VM is in the file; nothing of it runs here any more

Until `commit` any failure leaves the VM running here. Of a secure VM its ultravisor decides with UV_SAVE_COMMIT.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import trio

from protocol import ucalls as u
from protocol.codes import HCode
from protocol.errors import PefboxError
from protocol.geometry import PAGE_BYTES
from services.qemu.migration.hello import hello_of
from services.qemu.migration.kvm_port import KvmPort, StepRefused, until_answered
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.outflow import Outflow
from services.qemu.migration.places import DIRTY, RECORD
from services.qemu.migration.stream import FrameKind
from services.qemu.snapshot.body import BodyWriter
from shared.host_view import HostState
from shared.snapshot_file import DiskMark, SnapshotHead, mark_of
from shared.stream_buffer import StreamBuffer


class SnapshotFailed(PefboxError):
    """No snapshot was taken; the VM goes on."""


class SnapshotInDoubt(PefboxError):
    """The last step was begun, and nobody could say whether the VM is in the file now. It does not run on."""


class SnapshotStatus(StrEnum):
    """How far a snapshot is."""

    NONE = "none"
    SAVING = "saving"
    WRITTEN = "written"
    SAVED = "saved"
    LOADING = "loading"
    RESTORED = "restored"
    CANCELLED = "cancelled"
    FAILED = "failed"
    IN_DOUBT = "in-doubt"

    @property
    def under_way(self) -> bool:
        """Another one cannot begin."""
        return self in (SnapshotStatus.SAVING, SnapshotStatus.WRITTEN, SnapshotStatus.LOADING)


class SnapshotSave:
    """One snapshot that is being taken; `run` once. `disks` are descriptors by name, `host` is told to its reader."""

    def __init__(
        self,
        machine: MovableMachine,
        kvm: KvmPort,
        stream: StreamBuffer,
        fd: int,
        disks: dict[str, int],
        host: str,
        say: Callable[[SnapshotStatus], None],
    ) -> None:
        self._machine, self._kvm, self._stream = machine, kvm, stream
        self._disks, self._host, self._say = disks, host, say
        self._secure = machine.secure
        self._n_pages = machine.vm.memory_bytes // PAGE_BYTES
        self._body = BodyWriter(fd)
        self._outflow = Outflow(machine, kvm, stream, self._body, self._spent, secure=self._secure)
        self._commit = trio.Event()
        self._n_pages_done = 0

    def progress(self) -> dict[str, Any]:
        """How far it is: `pages` of `total_pages` are written."""
        n_bytes, total = self._body.n_bytes, self._n_pages
        return {"bytes": n_bytes, "pages": min(self._n_pages_done, total), "total_pages": total, "secure": self._secure}

    @property
    def may_cancel(self) -> bool:
        """Whether it is still open that the VM goes on."""
        return not self._commit.is_set()

    def commit(self) -> None:
        """The file has its name: the VM is there from now on."""
        self._commit.set()

    async def run(self) -> None:
        """Save the VM; returns when it is in the file alone. Raises PefboxError, and cancelled: then it goes on."""
        reason = self._machine.can_move
        if reason is not None:
            raise SnapshotFailed(reason)
        async with self._machine.orders():
            self._machine.switching()
            try:
                await self._write()
                self._say(SnapshotStatus.WRITTEN)
                await self._commit.wait()
                with trio.CancelScope(shield=True):
                    await self._become_snapshot()
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    goes_on = await self._go_on()
                if self._commit.is_set() and not goes_on:
                    raise SnapshotInDoubt(str(error)) from None
                raise
            self._machine.left()

    async def _write(self) -> None:
        await self._body.send(FrameKind.HELLO, hello_of(self._machine.vm, secure=self._secure).encode())
        if self._secure:
            (n_bytes,) = await self._kvm.ucall(u.UV_SAVE_BEGIN, RECORD)
            await self._body.send(FrameKind.HANDSHAKE, self._stream.read(RECORD, n_bytes))
            n_bytes, _ = await self._kvm.ucall(u.UV_EXPORT_STOP, RECORD, DIRTY)
            await self._body.send(FrameKind.RECORD, self._stream.read(RECORD, n_bytes))
        else:
            await self._freeze()
        # Its answer says that every doorbell of before has come.
        await self._kvm.written(self._n_pages)
        await self._machine.hold_devices()
        await self._outflow.send_own_pages(self._own_pages())
        if self._secure:
            await self._outflow.send_secure_pages()
        await self._outflow.send_state()
        await self._body.finish(await self._head())

    async def _freeze(self) -> None:
        try:
            await self._kvm.freeze()
        except StepRefused as refused:
            if refused.code != HCode.H_STATE.name:
                raise
            raise SnapshotFailed("the VM just starts, or turns secure: try again") from None

    def _own_pages(self) -> list[int]:
        if not self._secure:
            return list(range(self._n_pages))
        return [gfn for gfn, state in enumerate(bytes(self._machine.host_view)) if state == HostState.SHARED]

    async def _head(self) -> SnapshotHead:
        vm = self._machine.vm
        return SnapshotHead(
            vm=vm.name,
            lpid=vm.lpid,
            host=self._host,
            secure=self._secure,
            running=self._machine.is_running,
            memory_bytes=vm.memory_bytes,
            taken=time.time(),
            disks=await trio.to_thread.run_sync(self._marks),
            body_bytes=self._body.n_bytes,
            body_sha256=self._body.sha256,
        )

    def _marks(self) -> list[DiskMark]:
        try:
            for fd in self._disks.values():
                os.fsync(fd)
            return [mark_of(name, fd) for name, fd in sorted(self._disks.items())]
        except OSError as error:
            raise SnapshotFailed(f"a disk cannot be flushed: {error.strerror}") from None

    async def _become_snapshot(self) -> None:
        if self._secure:
            await until_answered(lambda: self._kvm.ucall(u.UV_SAVE_COMMIT, RECORD))

    async def _go_on(self) -> bool:
        """Whether what was stopped runs again, as soon as it may."""
        goes_on = True
        try:
            if self._secure:
                await until_answered(lambda: self._kvm.ucall(u.UV_EXPORT_CANCEL, RECORD))
            elif self._machine.runs_here:
                await until_answered(self._kvm.go_on)
        except PefboxError:
            # It was not begun, or kvm is dead, or the VM is in no state to go on: its own end says why.
            goes_on = False
        self._machine.release_devices()
        self._machine.stays()
        return goes_on

    async def _spent(self, _n_bytes: int, zero_pages: int, data_pages: int) -> None:
        self._n_pages_done += zero_pages + data_pages
