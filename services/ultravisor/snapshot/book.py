"""Which snapshots may be restored: each once, and only while its VM has begun in no other way since (S3, S6).

The ledger has a line when a snapshot was completed, when it was restored, and when it became void because its VM began
otherwise: was started again, or arrived from another host. So the newest state of a secure VM is the only one that can
run, and runs once.
"""

from __future__ import annotations

import msgspec

from services.ultravisor.migration.ledger import Decision, Entry, FileLedger
from services.ultravisor.migration.refusals import MigrationRefused, Reason

_REFUSALS = {
    Decision.RESTORED: Reason.RESTORED_BEFORE,
    Decision.VOID: Reason.BEGAN_SINCE,
}


def check_restorable(ledger: FileLedger, session_id: bytes, vm: str) -> None:
    """Raise MigrationRefused unless the snapshot may be restored now."""
    entry = ledger.newest(session_id)
    if entry is None or entry.vm != vm:
        raise MigrationRefused(Reason.NOT_SAVED)
    if entry.decision is not Decision.SAVED:
        raise MigrationRefused(_REFUSALS.get(entry.decision, Reason.NOT_SAVED))
    if _saved(ledger, vm)[-1].session != entry.session:
        raise MigrationRefused(Reason.OLDER_SNAPSHOT)


def vm_begins(ledger: FileLedger, vm: str) -> int:
    """The VM begins in another way than out of a snapshot: what it could be restored from is void; how many those are.

    Raises HostFault when that cannot be stored; the VM must not begin then.
    """
    saved = _saved(ledger, vm)
    for entry in saved:
        ledger.record(msgspec.structs.replace(entry, decision=Decision.VOID))
    return len(saved)


def _saved(ledger: FileLedger, vm: str) -> list[Entry]:
    """Oldest first."""
    return [entry for entry in ledger.of_vm(vm) if entry.decision is Decision.SAVED]
