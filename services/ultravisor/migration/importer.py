"""The destination's side of a migration: it believes nothing before it has everything, and starts only by the token.

    RECEIVING  records come
    CHECKED    pages and state are whole and newest; whoever loads the state does so now
    READY      it told the source so, and waits for the token
    STARTED    the VM runs here
    ABANDONED  the VM never runs here; what came is wiped

The first record that does not pass ends the import. Without the token the destination may give up at any time, which
is final: its word lets the source take the VM back (S6).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.ultravisor.migration.handshake import Session
from services.ultravisor.migration.ledger import Decision, Ledger
from services.ultravisor.migration.payloads import (
    PRIVATE,
    decode_final,
    pages_of,
)
from services.ultravisor.migration.records import Record, RecordKind, RecordOpener, RecordSealer
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.side import Side
from services.ultravisor.migration.statements import Word
from services.ultravisor.page_state import GfnState


class Frames(Protocol):
    """The secure frames that the VM gets, zeroed at the beginning."""

    page_bytes: int

    def expect(self, gfns: Sequence[int]) -> None:
        """The contents of these pages are put next: what is faster for many at once is done now."""

    def write(self, gfn: int, content: bytes | memoryview) -> None:
        """Put the content of a page."""

    def zero(self, gfn: int) -> None:
        """Zero a page."""

    def wipe(self) -> None:
        """Zero everything: the VM does not come."""


class ImportPhase(Enum):
    """How far the destination is."""

    RECEIVING = "receiving"
    CHECKED = "checked"
    READY = "ready"
    STARTED = "started"
    ABANDONED = "abandoned"


class Importer(Side):
    """One migration at its destination."""

    def __init__(
        self,
        session: Session,
        identity: Ed25519PrivateKey,
        ledger: Ledger,
        sealer: RecordSealer,
        opener: RecordOpener,
        frames: Frames,
    ) -> None:
        super().__init__(session, identity, ledger, sealer, opener)
        self._frames = frames
        self._take = {
            RecordKind.PAGES: self._take_pages,
            RecordKind.EPOCH_END: self._take_epoch_end,
            RecordKind.STATE: self._take_state,
            RecordKind.FINAL: self._take_final,
        }
        self._wiped = False
        self.states = b""
        """A GfnState a frame; empty before CHECKED."""
        self.phase = ImportPhase.RECEIVING

    @property
    def guest_may_run(self) -> bool:
        """Whether the processors may run the VM here (S6)."""
        return self.phase is ImportPhase.STARTED

    @property
    def state(self) -> bytes:
        """What came that is no page; empty before CHECKED."""
        return b"" if self.phase is ImportPhase.RECEIVING else bytes(self._state)

    def take(self, raw: bytes | memoryview) -> None:
        """The next record. Raises MigrationRefused; the import is ABANDONED then."""
        self._expect(ImportPhase.RECEIVING)
        try:
            record = self._opener.open(raw)
            if record.kind not in self._take or record.epoch != self.epoch:
                raise MigrationRefused(Reason.OUT_OF_PLACE, f"{record.kind.name} of epoch {record.epoch}")
            self._take[record.kind](record)
        except BaseException:
            # Also when a frame could not be written: the record is used up, and its pages did not all come.
            self._wipe()
            raise

    def ready(self) -> bytes:
        """The record that tells the source: everything is here and loaded."""
        self._expect(ImportPhase.CHECKED)
        self.phase = ImportPhase.READY
        return bytes(self._sealer.seal(RecordKind.READY, self.epoch))

    def take_token(self, raw: bytes) -> bytes:
        """The start token: the VM may run here from now on. Returns the word for the source.

        Raises MigrationRefused when it is no token of the source, or the decision cannot be stored: still READY then.
        """
        self._expect(ImportPhase.READY, ImportPhase.STARTED)
        if self._hear(raw) is not Word.TOKEN:
            raise MigrationRefused(Reason.OUT_OF_PLACE, "instead of the start token")
        if self.phase is ImportPhase.READY:
            self._decide(Decision.STARTED)
            self.phase = ImportPhase.STARTED
        return self.word()

    def abandon(self) -> bytes:
        """Give up for good, and wipe. Returns the word for the source.

        Raises MigrationRefused once STARTED, or when a start may have been stored: only the token leads on then.
        """
        if self.phase is ImportPhase.STARTED:
            raise MigrationRefused(Reason.WRONG_PHASE, self.phase.value)
        self.check_abandon()
        if not self._wiped:
            self._wipe()
        return self.word()

    def check_abandon(self) -> None:
        """Raise MigrationRefused when a start may have been stored."""
        self._settle(Decision.STARTED)
        if self._in_doubt:
            raise MigrationRefused(Reason.NOT_STORED, "a crash may find the VM started")

    def word(self) -> bytes:
        """What became of the VM here, for the source; raises MigrationRefused while that is open."""
        self._expect(ImportPhase.STARTED, ImportPhase.ABANDONED)
        return self._say(Word.STARTED if self.phase is ImportPhase.STARTED else Word.ABANDONED)

    def _take_pages(self, record: Record) -> None:
        pages = list(pages_of(record.payload, self._frames.page_bytes))
        last = max((page.gfn for page in pages), default=0)
        if last >= len(self._versions):
            raise MigrationRefused(Reason.MALFORMED, f"gfn {last:#x} is outside the VM")
        self._frames.expect([page.gfn for page in pages if page.content])
        for page in pages:
            if page.content:
                self._frames.write(page.gfn, page.content)
            else:
                self._frames.zero(page.gfn)
            self._versions.came(page.gfn, self.epoch)

    def _take_epoch_end(self, record: Record) -> None:
        if record.payload:
            raise MigrationRefused(Reason.MALFORMED, "an end of an epoch with content")
        self.epoch += 1

    def _take_state(self, record: Record) -> None:
        self._add_state(record.payload)

    def _take_final(self, record: Record) -> None:
        final = decode_final(record.payload)
        self._check_states(final.states)
        private = [gfn for gfn, state in enumerate(final.states) if GfnState(state) in PRIVATE]
        if missing := self._versions.missing(private):
            raise MigrationRefused(Reason.NOT_NEWEST, f"gfn {missing[0]:#x} never came")
        if self._versions.digest(final.states) != final.versions:
            raise MigrationRefused(Reason.NOT_NEWEST)
        if (len(self._state), hashlib.sha256(self._state).digest()) != (final.n_state_bytes, final.state):
            raise MigrationRefused(Reason.NOT_WHOLE)
        for gfn in set(range(len(self._versions))).difference(private):
            # What a page held before it was shared does not outlive the sharing.
            self._frames.zero(gfn)
        self.states = final.states
        self.phase = ImportPhase.CHECKED

    def _wipe(self) -> None:
        self.phase = ImportPhase.ABANDONED
        self._state.clear()
        self._frames.wipe()
        self._wiped = True
