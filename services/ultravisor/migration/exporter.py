"""The source's side of a migration, from the first page to the word that the VM runs elsewhere.

    COPYING      the guest runs; pages go, again whenever they were written
    STOPPED      the guest runs no more; the last pages and the state go
    FINISHED     all is sent
    TOKEN_GIVEN  the destination may start; only its word decides what becomes of the VM here
    MOVED        it runs there; what is here is to be wiped
    RETURNED     it never starts there; the guest may run here again

Until the token is given the source may take the VM back by itself (`cancel`), after it never (S6).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.ultravisor.migration.handshake import Session
from services.ultravisor.migration.ledger import Decision, Ledger
from services.ultravisor.migration.payloads import (
    MAX_FINAL_PAGES,
    PRIVATE,
    Final,
)
from services.ultravisor.migration.records import MAX_PAYLOAD_BYTES, RecordKind, RecordOpener, RecordSealer
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.side import Side
from services.ultravisor.migration.statements import Word
from services.ultravisor.page_state import GfnState
from shared.page_batch import MAX_PAGES, Page, encode_pages

ReadPage = Callable[[int], memoryview]
"""The secure content of a GFN: whole, and not written meanwhile once the guest is stopped."""


class Batch(NamedTuple):
    """A record of pages, good until the next one is made, and how many of each kind are in it."""

    record: memoryview
    zero_pages: int
    data_pages: int


class ExportPhase(Enum):
    """How far the source is."""

    COPYING = "copying"
    STOPPED = "stopped"
    FINISHED = "finished"
    TOKEN_GIVEN = "token-given"
    MOVED = "moved"
    RETURNED = "returned"


_MAX_PAGES_AT_ONCE = 1024
"""Some 10 ms of work, when all are zero."""
_WITH_GUEST = frozenset({ExportPhase.COPYING, ExportPhase.RETURNED})
_MAY_CANCEL = frozenset({ExportPhase.COPYING, ExportPhase.STOPPED, ExportPhase.FINISHED})


class Exporter(Side):
    """One migration at its source."""

    def __init__(
        self,
        session: Session,
        identity: Ed25519PrivateKey,
        ledger: Ledger,
        sealer: RecordSealer,
        opener: RecordOpener,
        read_page: ReadPage,
    ) -> None:
        super().__init__(session, identity, ledger, sealer, opener)
        self._read_page = read_page
        self._owed = set(range(session.subject.n_pages))
        self._given_is_stored = False
        self.phase = ExportPhase.COPYING

    @property
    def guest_may_run(self) -> bool:
        """Whether the processors may run the VM here (S6)."""
        return self.phase in _WITH_GUEST

    @property
    def owed(self) -> frozenset[int]:
        """GFNs whose newest version was not sent."""
        return frozenset(self._owed)

    def dirtied(self, gfns: Iterable[int]) -> None:
        """`gfns` were written since they were last sent, or may have been."""
        self._expect(ExportPhase.COPYING, ExportPhase.STOPPED)
        self._owed.update(gfns)

    def pages(self, gfns: Sequence[int]) -> bytes:
        """The record of these secure pages as they are now; `dirtied` is to be told of every store after this.

        Raises MigrationRefused for more than one record holds: MAX_PAYLOAD_BYTES of them.
        """
        self._expect(ExportPhase.COPYING, ExportPhase.STOPPED)
        if len(gfns) > MAX_PAGES or any(gfn >= len(self._versions) for gfn in gfns):
            raise MigrationRefused(Reason.MALFORMED, f"{len(gfns)} pages, or one outside the VM, for one record")
        return bytes(self._seal_pages([self._page(gfn) for gfn in gfns]))

    def next_pages(self, queue: deque[int]) -> Batch:
        """As `pages`, of as many from the front of `queue` as a record holds; these are taken out of it."""
        self._expect(ExportPhase.COPYING, ExportPhase.STOPPED)
        pages: list[Page] = []
        n_bytes = n_data = 0
        while queue and len(pages) < _MAX_PAGES_AT_ONCE:
            page = self._page(queue[0])
            if n_bytes + len(page.content) > MAX_PAYLOAD_BYTES:
                break
            queue.popleft()
            pages.append(page)
            n_bytes += len(page.content)
            n_data += bool(page.content)
        return Batch(self._seal_pages(pages), len(pages) - n_data, n_data)

    def _seal_pages(self, pages: Sequence[Page]) -> memoryview:
        record = self._sealer.seal(RecordKind.PAGES, self.epoch, *encode_pages(pages))
        for page in pages:
            self._owed.discard(page.gfn)
            self._versions.came(page.gfn, self.epoch)
        return record

    def end_epoch(self) -> bytes:
        """The record that ends a round; pages sent from here on belong to the next."""
        self._expect(ExportPhase.COPYING, ExportPhase.STOPPED)
        record = bytes(self._sealer.seal(RecordKind.EPOCH_END, self.epoch))
        self.epoch += 1
        return record

    def stop(self) -> None:
        """The guest has stopped, and nothing writes secure memory any more."""
        self._expect(ExportPhase.COPYING)
        self.phase = ExportPhase.STOPPED

    def state(self, data: bytes) -> list[bytes]:
        """Records of `data`, a part of what is no page; the parts arrive as one, in this order."""
        self._expect(ExportPhase.STOPPED)
        self._add_state(data)
        parts = [data[at : at + MAX_PAYLOAD_BYTES] for at in range(0, len(data), MAX_PAYLOAD_BYTES)]
        return [bytes(self._sealer.seal(RecordKind.STATE, self.epoch, part)) for part in parts]

    def finish(self, states: bytes) -> bytes:
        """The last record. `states`: of each frame, as ARRIVES_AS says.

        Raises MigrationRefused while a private page is owed, or a frame has a state that cannot travel.
        """
        self._expect(ExportPhase.STOPPED)
        self._check_states(states)
        if len(states) > MAX_FINAL_PAGES:
            raise MigrationRefused(Reason.TOO_LARGE, f"{len(states)} frames of at most {MAX_FINAL_PAGES}")
        if late := [gfn for gfn in self._owed if GfnState(states[gfn]) in PRIVATE]:
            raise MigrationRefused(Reason.NOT_NEWEST, f"gfn {min(late):#x}")
        state = hashlib.sha256(self._state).digest()
        final = Final(states, self._versions.digest(states), len(self._state), state)
        self.phase = ExportPhase.FINISHED
        return bytes(self._sealer.seal(RecordKind.FINAL, self.epoch, msgspec.msgpack.encode(final)))

    def take_ready(self, raw: bytes) -> bytes:
        """The destination has everything: the start token, which is out from here on.

        Raises MigrationRefused when the record is not genuine, or the decision cannot be stored.
        """
        self._expect(ExportPhase.FINISHED)
        if self._opener.open(raw).kind is not RecordKind.READY:
            raise MigrationRefused(Reason.OUT_OF_PLACE, "instead of READY")
        try:
            self._store_given()
        finally:
            if self._in_doubt:
                # A crash may find it stored, and the token would then be given for an older state of the VM.
                self.phase = ExportPhase.TOKEN_GIVEN
        self.phase = ExportPhase.TOKEN_GIVEN
        return self.token()

    def token(self) -> bytes:
        """The start token once more; raises MigrationRefused while the decision is not stored."""
        self._expect(ExportPhase.TOKEN_GIVEN)
        self._store_given()
        return self._say(Word.TOKEN)

    def take_statement(self, raw: bytes) -> None:
        """The destination's word: the VM has MOVED, or is RETURNED. Raises MigrationRefused."""
        word = self._hear(raw)
        before = self.phase
        if word is Word.STARTED:
            self._expect(ExportPhase.TOKEN_GIVEN, ExportPhase.MOVED)
            self.phase = ExportPhase.MOVED
        elif word is Word.ABANDONED:
            self._expect(*_MAY_CANCEL, ExportPhase.TOKEN_GIVEN, ExportPhase.RETURNED)
            self.phase = ExportPhase.RETURNED
        else:
            raise MigrationRefused(Reason.OUT_OF_PLACE, f"the destination says {word.value}")
        if self.phase is not before:
            self._close()

    def cancel(self) -> None:
        """The VM stays here, also when it was RETURNED already.

        Raises MigrationRefused once the token was given, or when that may have been stored.
        """
        if self.phase is ExportPhase.TOKEN_GIVEN and not self._was_never_given():
            raise MigrationRefused(Reason.TOKEN_GIVEN)
        self._expect(*_MAY_CANCEL, ExportPhase.RETURNED)
        self.phase = ExportPhase.RETURNED

    def _was_never_given(self) -> bool:
        """Whether the ledger that could not say if it stored the decision says by now that it did not."""
        if self._given_is_stored:
            return False
        self._settle(Decision.GIVEN)
        if not self._in_doubt:
            self.phase = ExportPhase.FINISHED
        return not self._in_doubt

    def _page(self, gfn: int) -> Page:
        return Page.of(gfn, self._read_page(gfn))

    def _store_given(self) -> None:
        if not self._given_is_stored:
            self._decide(Decision.GIVEN)
            self._given_is_stored = True

    def _close(self) -> None:
        # Where that fails it is only shown as open; no decision hangs on it.
        with contextlib.suppress(MigrationRefused):
            self._decide(Decision.CLOSED)
