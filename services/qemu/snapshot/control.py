"""Snapshots of one machine, as the launcher steers them: it gives the file and says what is to be done with it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from protocol.errors import PefboxError, UserError
from services.qemu.migration.kvm_port import KvmPort
from services.qemu.migration.machine import MovableMachine
from services.qemu.snapshot.loader import SnapshotLoad
from services.qemu.snapshot.saver import SnapshotInDoubt, SnapshotSave, SnapshotStatus
from services.runtime.log import Log
from services.runtime.process import Query
from shared.stream_buffer import StreamBuffer

FILE_GIFT = "snapshot-file"
"""Tag of the file that the launcher gives."""
_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class SnapshotPlace:
    """What a snapshot is made of and with. `disks` are descriptors by name; `arrived` is told of a VM that goes on."""

    machine: MovableMachine
    kvm: KvmPort
    stream: StreamBuffer
    disks: dict[str, int]
    host: str
    arrived: Callable[[], None]


class SnapshotControl:
    """One machine's. Nothing is possible before it has its `place`."""

    def __init__(self, nursery: trio.Nursery, log: Log) -> None:
        self._nursery, self._log = nursery, log
        self.place: SnapshotPlace | None = None
        self._fd: int | None = None
        self._status = SnapshotStatus.NONE
        self._reason = ""
        self._began_ns = self._ended_ns = 0
        self._save: SnapshotSave | None = None
        self._load: SnapshotLoad | None = None
        self._scope = trio.CancelScope()

    def take_file(self, fd: int) -> None:
        """The file of the next snapshot, or the one to restore."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = fd

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {
            "snapshot.save": self._begin_save,
            "snapshot.commit": self._commit,
            "snapshot.cancel": self._cancel,
            "snapshot.restore": self._begin_load,
            "snapshot.status": self._describe,
        }

    # -- orders -----------------------------------------------------------------------------------------------

    async def _begin_save(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        place, fd = self._begin()
        self._save = SnapshotSave(place.machine, place.kvm, place.stream, fd, place.disks, place.host, self._enter)
        self._enter(SnapshotStatus.SAVING)
        self._nursery.start_soon(self._run, self._save.run, fd, SnapshotStatus.SAVED)
        return self._facts()

    async def _begin_load(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        place, fd = self._begin()
        try:
            if not place.machine.vm.restoring:
                raise UserError("the machine does not wait for a snapshot")
            self._load = SnapshotLoad(place.machine, place.kvm, place.stream, fd, place.arrived)
        except UserError:
            os.close(fd)
            raise
        self._enter(SnapshotStatus.LOADING)
        self._nursery.start_soon(self._run, self._load.run, fd, SnapshotStatus.RESTORED)
        return self._facts()

    def _begin(self) -> tuple[SnapshotPlace, int]:
        if self._status.under_way:
            raise UserError("a snapshot is under way")
        if self.place is None:
            raise UserError("the machine has no devices yet")
        if self._fd is None:
            raise UserError("no file was given for the snapshot")
        fd, self._fd = self._fd, None
        self._save = self._load = None
        self._reason, self._began_ns = "", time.monotonic_ns()
        self._scope = trio.CancelScope()
        return self.place, fd

    async def _commit(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """The file has its name."""
        if self._save is None or self._status is not SnapshotStatus.WRITTEN:
            raise UserError(f"the snapshot is {self._status.value}")
        self._save.commit()
        return self._facts()

    async def _cancel(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """The VM goes on, unless the file has its name already."""
        if self._save is not None and self._status.under_way:
            if not self._save.may_cancel:
                raise UserError("too late: the VM is in the snapshot already")
            self._scope.cancel()
        return self._facts()

    async def _describe(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        return self._facts()

    # -- carrying out -----------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[], Any], fd: int, done: SnapshotStatus) -> None:
        try:
            with self._scope:
                await work()
                self._enter(done)
            if self._scope.cancelled_caught:
                self._enter(SnapshotStatus.CANCELLED)
        except SnapshotInDoubt as doubt:
            self._fail(str(doubt), SnapshotStatus.IN_DOUBT)
        except PefboxError as error:
            self._fail(str(error))
        except Exception as error:
            self._log.error("snapshot", exc_info=error)
            self._fail(f"internal error: {error}")
        finally:
            os.close(fd)

    def _fail(self, reason: str, status: SnapshotStatus = SnapshotStatus.FAILED) -> None:
        self._reason = reason
        self._log.warning("snapshot failed", reason=reason)
        self._enter(status)

    def _enter(self, status: SnapshotStatus) -> None:
        self._status = status
        self._ended_ns = 0 if status.under_way else time.monotonic_ns()
        self._log.info("snapshot", status=status.value)

    def _facts(self) -> dict[str, Any]:
        ready = self.place is not None
        facts: dict[str, Any] = {"status": self._status.value, "reason": self._reason, "ready": ready}
        if self._status is SnapshotStatus.NONE:
            return facts
        facts["total_time_ms"] = ((self._ended_ns or time.monotonic_ns()) - self._began_ns) // _NS_PER_MS
        if self._save is not None:
            facts |= self._save.progress()
        if self._load is not None:
            head = self._load.head
            facts |= {"bytes": self._load.n_bytes, "total_bytes": head.body_bytes, "secure": head.secure}
        return facts
