"""What an ultravisor says of a migration of which it has only the ledger left, or which was cut.

The operator's `recover` asks both sides and carries each one's word to the other. A source that gave the token repeats
it; a destination that has not started, and holds nothing that could, gives the word that it never will.
"""

from __future__ import annotations

from collections.abc import Collection

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.ultravisor.migration.ledger import Decision, Ledger
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.statements import Word, sign


def word_of_source(ledger: Ledger, identity: Ed25519PrivateKey, session_id: bytes) -> bytes | None:
    """The token, if it was given and nothing came of it yet; None when the destination must not start."""
    entry = ledger.newest(session_id)
    if entry is None or entry.decision is not Decision.GIVEN:
        return None
    return sign(identity, Word.TOKEN, session_id)


def word_of_destination(
    ledger: Ledger, identity: Ed25519PrivateKey, session_id: bytes, live: Collection[bytes]
) -> bytes:
    """What became of the VM at a destination that has no importer for it; `live` are the sessions that have one.

    Raises MigrationRefused for those: their importer could still start the VM, and speaks for itself.
    """
    if session_id in live:
        raise MigrationRefused(Reason.WRONG_PHASE, "an import of it is open")
    entry = ledger.newest(session_id)
    started = entry is not None and entry.decision is Decision.STARTED
    return sign(identity, Word.STARTED if started else Word.ABANDONED, session_id)
