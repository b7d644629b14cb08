"""A secure VM is put together on this host: one that comes from another host, or out of a snapshot.

What is believed and when is decided in `migration.importer`; here it meets the VM itself: secure memory and its
account, the guest that takes over the processor's state and stands still until it may run.
"""

from __future__ import annotations

import contextlib
import time

import trio

from protocol.codes import HCode
from protocol.errors import HostFault, PefboxError
from protocol.geometry import PAGE_SHIFT
from protocol.messages import SVM_LOAD, LoadProcessorBody
from services.ultravisor.esm_files import EsmFiles
from services.ultravisor.migration.handshake import Subject
from services.ultravisor.migration.importer import Importer, ImportPhase
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.svm_parts import SvmRest, put_together
from services.ultravisor.partition import Partition
from services.ultravisor.rtas_bounce import RtasBounce
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.svm import Svm, SvmPhase

LOAD_SECONDS = 5.0
_VCPU = 0


class Import:
    """Base of Arrival and Restoring. Whoever drops it before it has ended says `abandon`."""

    what = "migration"

    def __init__(self, partition: Partition, account: SecureAccount, subject: Subject) -> None:
        """Raises MigrationRefused for a `subject` that is another VM; secure memory is set aside."""
        self._partition, self._account = partition, account
        self._check_subject(subject)
        self._svm: Svm | None = None
        self._importer: Importer | None = None
        self._word: bytes | None = None
        self._started = False
        self.kept: tuple[EsmFiles, RtasBounce] | None = None
        """What belongs to the VM beside its pages, once it is here."""
        self.session_id = b""
        self._set_aside_bytes = partition.ram.size_bytes
        if not account.charge(self._set_aside_bytes):
            self._set_aside_bytes = 0
            needed, free = partition.ram.size_bytes, account.free_bytes
            raise MigrationRefused(Reason.NO_ROOM, f"{needed} bytes needed, {free} free")

    # -- what the VM's life asks ------------------------------------------------------------------------------

    @property
    def holds_pages(self) -> bool:
        """As partition.Migration: from the moment that the VM is here until it runs."""
        return self._svm is not None and self._svm.phase is SvmPhase.ARRIVED

    def svm_ends(self) -> None:
        """As partition.Migration: it never starts here, unless it has already."""
        if self._word is None:
            # A start that may have been stored is neither taken back nor gone on with.
            with contextlib.suppress(MigrationRefused):
                self._give_up()
        self._svm = None

    @property
    def phase(self) -> str:
        """For the operator."""
        if self._importer is not None:
            return str(self._importer.phase.value)
        return "handshake" if self._word is None else "ended"

    @property
    def in_progress(self) -> bool:
        """Whether it is still open what becomes of the VM."""
        return self._word is None

    # -- what comes -------------------------------------------------------------------------------------------

    def take_record(self, raw: bytes | memoryview) -> bool:
        """The next record; whether all is here now. Raises MigrationRefused: nothing of it is kept then."""
        importer = self._begun()
        importer.take(raw)
        return importer.phase is ImportPhase.CHECKED

    async def ready(self, cause: int) -> bytes:
        """Put the VM together and have the guest take over its processor; the record for the source.

        Raises MigrationRefused, after which it can only be abandoned.
        """
        importer, svm = self._begun(), self._svm
        if importer.phase is not ImportPhase.CHECKED or svm is None or self._partition.svm is not None:
            raise MigrationRefused(Reason.WRONG_PHASE, importer.phase.value)
        rest = SvmRest.decode(importer.state)
        # From the sum that was set aside to the slots that it was set aside for.
        self._release_account()
        put_together(svm, importer.states, rest)
        svm.phase = SvmPhase.ARRIVED
        self._partition.svm = svm
        self.kept = EsmFiles.load(rest.files), RtasBounce(list(rest.bounce_gfns), self._partition.ram)
        await self._load_guest(svm, rest.processors, cause)
        return importer.ready()

    def _runs(self, word: bytes) -> None:
        """The VM is this host's from now on; `word` is for the source."""
        assert self._svm is not None
        self._svm.phase = SvmPhase.SECURE
        self._partition.secure_since = time.time()
        self._started = True
        self._end(word)

    def _make_svm(self) -> Svm:
        """The memory that what comes is put into. Raises MigrationRefused."""
        try:
            svm = self._partition.make_svm(self._account)
        except HostFault as fault:
            raise MigrationRefused(Reason.NO_ROOM, str(fault)) from None
        self._svm = svm
        return svm

    # -- giving up --------------------------------------------------------------------------------------------

    def check_abandon(self) -> None:
        """Raise MigrationRefused when `abandon` would: before anything of the VM is given up."""
        if self._importer is not None:
            self._importer.check_abandon()

    def abandon(self) -> bytes:
        """It never runs here, and nothing of it is kept: the word for the source (empty: there was no handshake).

        What the guest holds already ends with `SvmLife.terminate`. Raises MigrationRefused once it has started, or
        when that may have been stored.
        """
        if self._word is None:
            self._give_up()
        assert self._word is not None
        return self._word

    @property
    def is_over(self) -> bool:
        """Whether it cannot start here any more: only its word is still open, if at all."""
        return self._word is not None or (self._importer is not None and self._svm is None)

    @property
    def guest_has_it(self) -> bool:
        """Whether pages and state were handed to the guest."""
        return self._svm is not None and self._partition.svm is self._svm

    def _give_up(self) -> None:
        word = b"" if self._importer is None else self._importer.abandon()
        self._release_account()
        if self._svm is not None and not self.guest_has_it and self._svm.phase is not SvmPhase.ENDED:
            self._svm.phase = SvmPhase.ENDED
            self._svm.release()
            self._svm = None
        self._end(word)

    def _end(self, word: bytes) -> None:
        """The importer holds registers and keys of the VM: they go with it."""
        self._word = word
        self._importer = None

    # -- helpers ----------------------------------------------------------------------------------------------

    def _check_subject(self, subject: Subject) -> None:
        partition = self._partition
        expected = (partition.name, partition.lpid, partition.ram.size_bytes >> PAGE_SHIFT)
        if (subject.vm, subject.lpid, subject.n_pages) != expected:
            raise MigrationRefused(Reason.NOT_THIS_VM, f"{subject.vm}, lpid {subject.lpid}, {subject.n_pages} frames")
        if not partition.entry.secure_allowed or partition.removed:
            raise MigrationRefused(Reason.NOT_THIS_VM, "it may not be secure here")
        if partition.svm is not None:
            raise MigrationRefused(Reason.WRONG_PHASE, "a secure VM of this name runs here")

    async def _load_guest(self, svm: Svm, processor: bytes, cause: int) -> None:
        partition = self._partition
        try:
            partition.hand_over_memory(svm)
            with partition.guest.patience.fail_after(LOAD_SECONDS):
                status = await partition.guest.call(SVM_LOAD, LoadProcessorBody(_VCPU, processor), cause)
        except (OSError, PefboxError, trio.TooSlowError) as error:
            raise MigrationRefused(Reason.NOT_STARTED, str(error)) from None
        if status.code != HCode.H_SUCCESS:
            raise MigrationRefused(Reason.NOT_STARTED, f"code {status.code}")

    def _release_account(self) -> None:
        self._account.credit(self._set_aside_bytes)
        self._set_aside_bytes = 0

    def _begun(self) -> Importer:
        if self._importer is None:
            raise MigrationRefused(Reason.WRONG_PHASE, self.phase)
        return self._importer

    def _loaded(self) -> Importer:
        """The importer of a VM that is whole here and stands still; raises MigrationRefused."""
        importer = self._begun()
        if self._svm is None or self._svm.phase is not SvmPhase.ARRIVED:
            raise MigrationRefused(Reason.WRONG_PHASE, importer.phase.value)
        return importer
