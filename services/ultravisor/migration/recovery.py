"""What an ultravisor says of a migration of which it has only the ledger left, or which was cut.

The operator's `recover` asks both sides and carries each one's word to the other. A source that gave the token repeats
it; a destination that has not started, and holds nothing that could, gives the word that it never will.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import HostFault
from services.ultravisor.migration.ledger import Decision, FileLedger, Ledger
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.statements import Word, sign


def word_of_source(ledger: Ledger, identity: Ed25519PrivateKey, session_id: bytes) -> bytes | None:
    """The token, if it was given and nothing came of it yet; None when the destination must not start."""
    entry = ledger.newest(session_id)
    if entry is None or entry.decision is not Decision.GIVEN:
        return None
    return sign(identity, Word.TOKEN, session_id)


def close_earlier(ledger: FileLedger, vm: str) -> None:
    """The VM is here and leaves anew: a token of before that nobody answered is given no more, as it tells nothing of
    this migration. Raises MigrationRefused when that cannot be stored.
    """
    try:
        for entry in ledger.of_vm(vm):
            if entry.decision is Decision.GIVEN:
                ledger.record(msgspec.structs.replace(entry, decision=Decision.CLOSED))
    except HostFault as fault:
        raise MigrationRefused(Reason.NOT_STORED, str(fault)) from None


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
