"""What both sides of a migration have: the session, the ends of the stream, decisions that are stored, words that are
signed, and the versions of the pages."""

from __future__ import annotations

import contextlib
from enum import Enum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import HostFault
from services.ultravisor.migration.handshake import Session
from services.ultravisor.migration.ledger import Decision, Entry, Ledger, LedgerTorn
from services.ultravisor.migration.payloads import ARRIVING, MAX_STATE_BYTES, PageVersions
from services.ultravisor.migration.records import RecordOpener, RecordSealer
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.statements import Word, check, sign

_ARRIVING = frozenset(int(state) for state in ARRIVING)


class Side:
    """Base of Exporter and Importer."""

    phase: Enum

    def __init__(
        self,
        session: Session,
        identity: Ed25519PrivateKey,
        ledger: Ledger,
        sealer: RecordSealer,
        opener: RecordOpener,
    ) -> None:
        self._session, self._identity, self._ledger = session, identity, ledger
        self._sealer, self._opener = sealer, opener
        self._versions = PageVersions(session.subject.n_pages)
        self._state = bytearray()
        self._in_doubt = False
        """A decision may have been stored that was not taken."""
        self.epoch = 0

    def _settle(self, decision: Decision) -> None:
        """End the doubt about `decision` if the ledger can say by now that it was not stored."""
        if not self._in_doubt:
            return
        with contextlib.suppress(HostFault):
            self._ledger.settle()
            entry = self._ledger.newest(self._session.session_id)
            self._in_doubt = entry is not None and entry.decision is decision

    def _decide(self, decision: Decision) -> None:
        """Store it; raises MigrationRefused when that is not sure."""
        session = self._session
        try:
            self._ledger.record(Entry.of(session.session_id, session.subject.vm, session.peer.identity, decision))
        except HostFault as error:
            self._in_doubt = self._in_doubt or isinstance(error, LedgerTorn)
            raise MigrationRefused(Reason.NOT_STORED, str(error)) from None

    def _say(self, word: Word) -> bytes:
        return sign(self._identity, word, self._session.session_id)

    def _hear(self, raw: bytes) -> Word:
        """What the other side says; raises MigrationRefused when it is not its word about this migration."""
        return check(raw, self._session.session_id, self._session.peer.identity)

    def _add_state(self, data: bytes | memoryview) -> None:
        if len(self._state) + len(data) > MAX_STATE_BYTES:
            raise MigrationRefused(Reason.MALFORMED, f"more than {MAX_STATE_BYTES} bytes of state")
        self._state += data

    def _check_states(self, states: bytes) -> None:
        if len(states) != len(self._versions) or not _ARRIVING.issuperset(states):
            raise MigrationRefused(Reason.MALFORMED, "page states that cannot travel")

    def _expect(self, *phases: Enum) -> None:
        if self.phase not in phases:
            raise MigrationRefused(Reason.WRONG_PHASE, str(self.phase.value))
