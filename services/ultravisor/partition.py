"""A VM as the ultravisor knows it: its guest, its normal RAM, and its secure side while it has one."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Sequence
from typing import Protocol

import msgspec
import trio

from protocol.codes import UCode
from protocol.errors import PefboxError
from protocol.geometry import PAGE_SHIFT
from protocol.messages import SVM_ENDED, Empty
from protocol.startup import VmEntry
from services.runtime.link import Link
from services.runtime.tracer import UNTRACED, Tracer
from services.ultravisor.invalidation import ACKNOWLEDGE_SECONDS, Invalidator
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.secure_memory import SecureAccount, SecureMemory
from services.ultravisor.svm import Svm, SvmPhase
from shared.dirty_map import DirtyMap
from shared.stream_buffer import StreamBuffer


class EsmOutcome(msgspec.Struct, frozen=True):
    """How the last UV_ESM of a VM ended; `reason` is for the operator only."""

    outcome: str
    reason: str
    at: str


class Migration(Protocol):
    """A migration or snapshot of the VM, as the VM's own life needs to know it."""

    what: str
    """How the audit log calls it."""

    @property
    def in_progress(self) -> bool:
        """Whether it is still open what becomes of the VM."""

    @property
    def holds_pages(self) -> bool:
        """The guest stands still for the migration, so that no page may change its state."""

    def svm_ends(self) -> None:
        """The secure side ends now: nothing of it is read or written any more."""


class Partition:
    """One VM. `svm` exists from UV_ESM until its end; `private` is the socketpair end that only its guest shares."""

    def __init__(
        self, entry: VmEntry, ram: NormalRam, guest: Link, private: socket.socket, tracer: Tracer = UNTRACED
    ) -> None:
        self._tracer = tracer
        self.entry = entry
        self.ram = ram
        self.guest = guest
        # Python's send_fds drops its flags: a guest that never reads must not hold up the ultravisor (S7).
        private.setblocking(False)
        self.private = private
        self.svm: Svm | None = None
        self.stream: StreamBuffer | None = None
        """What a migration hands to kvm and qemu, and gets from them."""
        self.migration: Migration | None = None
        """The one that is under way or was the last."""
        self.n_thaws = 0
        """Orders to thaw the guest that are under way: one that was frozen meanwhile would run by them (S6)."""
        self.migration_refusal: str | None = None
        """Why the last step of one was refused, for the operator."""
        self.last_esm: EsmOutcome | None = None
        self._expected: SecureMemory | None = None
        """Memory of a VM that is to arrive, made before it does."""
        self.failure: str | None = None
        self.invalidator = Invalidator(guest)
        self.secure_since: float | None = None
        self.pate = (0, 0)
        self.dirty: DirtyMap | None = None
        """Marks of the guest while it is secure, once it has given them."""
        self.removed = False
        """The VM is being taken from this host: it cannot turn secure any more."""
        self.ended = trio.Event()
        """Set unless the secure side is being ended at the moment."""
        self.ended.set()
        self._operations: set[trio.CancelScope] = set()
        self._idle = trio.Event()
        self._idle.set()
        self._guest_gone = trio.Event()

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.entry.name

    @property
    def lpid(self) -> int:
        """The VM's partition."""
        return self.entry.lpid

    @property
    def secure(self) -> bool:
        """Whether the VM runs as a secure one now."""
        return self.svm is not None and self.svm.phase is SvmPhase.SECURE

    def make_svm(self, account: SecureAccount) -> Svm:
        """A secure side, which is not the VM's yet; raises HostFault when there is no memory for it."""
        memory, self._expected = self._expected, None
        return Svm(self.name, self.lpid, self.entry.incarnation, self.ram, account, self._tracer, memory)

    def expect_pages(self, gfns: Sequence[int]) -> None:
        """A secure VM that has these pages will arrive here: have them made meanwhile. Raises HostFault."""
        if self._expected is None and self.svm is None and self.migration is None:
            self._expected = SecureMemory(self.name, self.ram.size_bytes)
            self._expected.touch_ahead(gfns)

    def drop_expected(self) -> None:
        """It does not arrive: give back what was made for it."""
        if self._expected is not None:
            self._expected.close()
            self._expected = None

    async def operation(self, work: Awaitable[list[int]]) -> list[int]:
        """Run a call of this VM; the end of the VM wins over it and answers U_STATE."""
        with trio.CancelScope() as scope:
            if not self._operations:
                self._idle = trio.Event()
            self._operations.add(scope)
            try:
                return await work
            finally:
                self._operations.discard(scope)
                if not self._operations:
                    self._idle.set()
        return [UCode.U_STATE]

    async def end_operations(self) -> None:
        """Every open call of the VM ends now; returns when none touches its memory any more."""
        for scope in list(self._operations):
            scope.cancel()
        await self._idle.wait()

    def guest_is_gone(self) -> None:
        """The guest process is dead: its mappings are gone with it."""
        self._guest_gone.set()

    async def guest_lets_go(self) -> bool:
        """The guest drops secure memory and map, and says so; True also when it is dead."""
        if self._guest_gone.is_set():
            return True
        try:
            with self.guest.patience.fail_after(ACKNOWLEDGE_SECONDS):
                await self.guest.call(SVM_ENDED, Empty())
        except (trio.TooSlowError, PefboxError):
            return self._guest_gone.is_set()
        return True

    async def guest_death(self, seconds: float) -> bool:
        """Whether the guest's death was reported within `seconds`."""
        with trio.move_on_after(seconds):
            await self._guest_gone.wait()
        return self._guest_gone.is_set()

    def note_esm(self, outcome: str, reason: str) -> None:
        """Remember how the last ESM ended, with its true reason."""
        self.last_esm = EsmOutcome(outcome, reason, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def take_dirty_map(self, fd: int) -> bool:
        """The marks that the guest gave; False when it gave them already. Raises HostFault."""
        if self.dirty is not None:
            return False
        self.dirty = DirtyMap(fd, self.entry.memory_bytes >> PAGE_SHIFT)
        return True

    def mark_dirty(self, gfn: int) -> None:
        """The ultravisor writes to a page of the secure VM."""
        if self.dirty is not None:
            self.dirty.put_back([gfn])

    def hand_over_memory(self, svm: Svm) -> None:
        """Send the descriptors of secure memory and map to the guest; raises OSError when it is gone or never reads.

        What was marked in an earlier life says nothing about this one.
        """
        if self.dirty is not None:
            self.dirty.take(range(svm.n_pages))
        announcement = msgspec.msgpack.encode((svm.memory.size_bytes, svm.n_pages))
        socket.send_fds(self.private, [announcement], [svm.memory.fd, svm.map_fd])

    def close(self) -> None:
        """Release what belongs to the VM itself."""
        self.private.close()
        self.drop_expected()
        if self.dirty is not None:
            self.dirty.close()
            self.dirty = None
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        self.ram.close()
