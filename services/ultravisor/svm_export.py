"""A secure VM is taken out of this host, page by page and then the rest: to another host, or into a snapshot.

What is said and when is decided in `migration.exporter`; here it meets the VM itself: dirty maps, the frozen guest, the
states of its pages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio

from protocol.codes import HCode
from protocol.errors import HostFault, PefboxError
from protocol.messages import SVM_FREEZE, RunBody
from services.ultravisor.dirty import collect_dirty
from services.ultravisor.esm_files import EsmFiles
from services.ultravisor.migration.exporter import Batch, Exporter, ExportPhase
from services.ultravisor.migration.payloads import MAX_FINAL_PAGES
from services.ultravisor.migration.policy import MigrationPolicy
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.svm_parts import SvmRest, states_to_send
from services.ultravisor.page_state import HOST_READABLE, TRANSIENT, GfnState
from services.ultravisor.partition import Partition
from services.ultravisor.svm import Svm
from services.ultravisor.thaw import thaw_guest
from shared.gfn_bitmap import bitmap_of

FREEZE_SECONDS = 3.0
"""The guest itself gives up after a second without a safe point."""
_VCPU = 0
_NOTHING = memoryview(b"")
_IN_SECURE_FRAME = frozenset(GfnState) - HOST_READABLE


class NotYet(PefboxError):
    """A step that may succeed when it is tried again."""


@dataclass(frozen=True, slots=True)
class SvmOfHost:
    """A secure VM with what this host keeps of it."""

    partition: Partition
    svm: Svm
    files: EsmFiles
    bounce_gfns: list[int]
    policy: MigrationPolicy


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """The record that ends a round, how many pages are owed now, and which host-readable ones were written.

    `written_shared` is a bitmap of all GFNs.
    """

    record: bytes
    n_owed: int
    written_shared: bytes


class Export:
    """Base of Departure and Saving. `phase` is told to the operator, `in_progress` whether it is still open what
    becomes of the VM.
    """

    what = "migration"

    def __init__(self, of: SvmOfHost) -> None:
        """Raises MigrationRefused for a VM that cannot be taken out at all."""
        if of.svm.n_pages > MAX_FINAL_PAGES:
            raise MigrationRefused(Reason.TOO_LARGE, f"{of.svm.n_pages} frames")
        self._of = of
        self._exporter: Exporter | None = None
        self._queue: deque[int] = deque()
        self._touched = bytearray()
        self._records: deque[bytes] | None = None
        self._processors = b""
        self._frozen = False
        self._at_work = False
        self._svm_ended = False
        self._cancelled = False
        self.session_id = b""

    # -- what the VM's life asks ------------------------------------------------------------------------------

    @property
    def holds_pages(self) -> bool:
        """As partition.Migration."""
        return self._frozen

    def svm_ends(self) -> None:
        """As partition.Migration."""
        self._svm_ended = True
        self._queue.clear()
        self._records = None

    @property
    def phase(self) -> str:
        """For the operator."""
        if self._exporter is not None:
            return str(self._exporter.phase.value)
        return str(ExportPhase.RETURNED.value) if self._cancelled else "handshake"

    @property
    def in_progress(self) -> bool:
        """Whether it is still open what becomes of the VM."""
        if self._exporter is None:
            return not self._svm_ended and not self._cancelled
        if self._exporter.phase is ExportPhase.TOKEN_GIVEN:
            return True
        return not self._svm_ended and self._exporter.phase not in (ExportPhase.MOVED, ExportPhase.RETURNED)

    # -- pages ------------------------------------------------------------------------------------------------

    def next_pages(self) -> Batch | None:
        """The next record of pages; None when none is owed."""
        exporter = self._running()
        states = self._of.svm.states
        while self._queue and states[self._queue[0]] not in _IN_SECURE_FRAME:
            # It was shared meanwhile; should it come back it is written then, and owed again.
            self._queue.popleft()
        return exporter.next_pages(self._queue) if self._queue else None

    @property
    def n_queued(self) -> int:
        """Pages that this round still owes."""
        return len(self._queue)

    async def end_round(self, cause: int) -> RoundEnd:
        """End a round; raises NotYet when the guest does not acknowledge, and MigrationRefused."""
        with self._alone():
            return await self._end_round(cause)

    async def stop(self, cause: int) -> RoundEnd:
        """Freeze the guest, then as `end_round`: what is owed after it is the last."""
        with self._alone():
            exporter = self._running()
            if exporter.phase is not ExportPhase.COPYING:
                raise MigrationRefused(Reason.WRONG_PHASE, exporter.phase.value)
            self._processors = await self._freeze(cause)
            self._frozen = True
            try:
                end = await self._end_round(cause)
                exporter.stop()
            except BaseException:
                await self.thaw(cause)
                raise
            return end

    async def _end_round(self, cause: int) -> RoundEnd:
        n_pages = self._of.svm.n_pages
        try:
            written = await collect_dirty(self._of.partition, range(n_pages), cause)
        except HostFault as fault:
            raise NotYet(str(fault)) from None
        exporter = self._running()
        record = exporter.end_epoch()
        exporter.dirtied(written)
        self._requeue()
        states = self._of.svm.states
        shared = [gfn for gfn in written if states[gfn] in HOST_READABLE]
        return RoundEnd(record, len(self._queue), bitmap_of(shared, n_pages))

    def _read_page(self, gfn: int) -> memoryview:
        """Nothing for a page that was untouched when the round began: a store since then has it sent again."""
        return self._of.svm.secure_page(gfn) if self._touched[gfn] else _NOTHING

    def _requeue(self) -> None:
        self._touched = self._of.svm.memory.touched()
        states = self._of.svm.states
        owed = self._running().owed
        self._queue = deque(gfn for gfn in sorted(owed) if states[gfn] in _IN_SECURE_FRAME)

    # -- the end ----------------------------------------------------------------------------------------------

    def next_state(self) -> tuple[bytes, bool]:
        """The next record of what is no page, and whether more follow. Raises NotYet, MigrationRefused."""
        if self._records is None:
            self._records = self._seal_state()
        if not self._records:
            raise MigrationRefused(Reason.WRONG_PHASE, "all of the state was sent")
        record = self._records.popleft()
        return record, bool(self._records)

    def _seal_state(self) -> deque[bytes]:
        exporter, svm = self._running(), self._of.svm
        if any(svm.states.counts[state] for state in TRANSIENT):
            raise NotYet("a page is in transition")
        states = states_to_send(svm)
        rest = SvmRest(list(svm.slots.values()), self._of.bounce_gfns, self._of.files.save(), self._processors)
        records = deque(exporter.state(rest.encode()))
        records.append(exporter.finish(states))
        return records

    def cancel(self) -> None:
        """The VM stays here, also when this was said before.

        Raises MigrationRefused once the token was given, NotYet while a step is under way.
        """
        self._expect_rest()
        if self._exporter is not None:
            self._exporter.cancel()
        self._cancelled = True

    async def thaw(self, cause: int) -> None:
        """The guest may run here again; nothing happens when it was not frozen."""
        if not self._frozen:
            return
        self._frozen = False
        if not self._svm_ended:
            await thaw_guest(self._of.partition, cause)

    # -- helpers ----------------------------------------------------------------------------------------------

    async def _freeze(self, cause: int) -> bytes:
        guest = self._of.partition.guest
        if self._of.partition.n_thaws:
            raise NotYet("the guest is being thawed")
        try:
            with guest.patience.fail_after(FREEZE_SECONDS):
                saved = await guest.call(SVM_FREEZE, RunBody(_VCPU), cause)
        except (trio.TooSlowError, PefboxError) as error:
            await thaw_guest(self._of.partition, cause)
            raise NotYet(f"the guest does not stand still: {error}") from None
        if saved.code == HCode.H_BUSY:
            raise NotYet("the guest came to no safe point")
        if saved.code != HCode.H_SUCCESS:
            raise MigrationRefused(Reason.GUEST_NOT_SAVED, f"code {saved.code}")
        return saved.state

    def _begun(self) -> Exporter:
        if self._exporter is None:
            raise MigrationRefused(Reason.WRONG_PHASE, "handshake")
        return self._exporter

    def _running(self) -> Exporter:
        if self._svm_ended:
            raise MigrationRefused(Reason.WRONG_PHASE, "the secure VM has ended")
        return self._begun()

    def _expect_rest(self) -> None:
        """A step that waits, left behind by the end of its migration, could thaw the guest of the next one."""
        if self._at_work:
            raise NotYet("a step is under way")

    def _alone(self) -> _Alone:
        return _Alone(self)


class _Alone:
    """One step that waits at a time: two at once would share out what is dirty between two records."""

    def __init__(self, export: Export) -> None:
        self._export = export

    def __enter__(self) -> None:
        if self._export._at_work:
            raise NotYet("another step is under way")
        self._export._at_work = True

    def __exit__(self, *_: object) -> None:
        self._export._at_work = False
