"""A secure VM goes on out of a snapshot that this ultravisor took: once, and only as its newest state."""

from __future__ import annotations

from services.ultravisor.migration.handshake import Host
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.migration.records import ends_at_destination
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.svm_parts import SvmFrames
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.snapshot.book import check_restorable
from services.ultravisor.snapshot.head import Head, read_head, session_to_restore, snapshot_id
from services.ultravisor.snapshot.sides import SnapshotImporter
from services.ultravisor.svm_import import Import


class Restoring(Import):
    """One snapshot that is being restored."""

    what = "restore"

    def __init__(
        self, partition: Partition, host: Host, ledger: FileLedger, account: SecureAccount, raw_head: bytes
    ) -> None:
        """Raises MigrationRefused for a snapshot that may not be restored here, or now."""
        head = read_head(raw_head, host)
        if not partition.entry.restoring:
            raise MigrationRefused(Reason.NOT_RESTORING)
        check_restorable(ledger, snapshot_id(raw_head), partition.name)
        _check_debuggable(head, debuggable=host.debuggable or partition.entry.debuggable)
        super().__init__(partition, account, head.subject)
        self._ledger = ledger
        session = session_to_restore(raw_head, host)
        self.session_id = session.session_id
        try:
            svm = self._make_svm()
        except MigrationRefused:
            self._release_account()
            raise
        sealer, opener = ends_at_destination(session)
        self._importer = SnapshotImporter(session, host.identity, ledger, sealer, opener, SvmFrames(svm))

    def start(self) -> bool:
        """The VM runs here from now on, and the snapshot is used up. False when it did already.

        Raises MigrationRefused: then it does not.
        """
        if self._started:
            return False
        importer = self._loaded()
        assert isinstance(importer, SnapshotImporter)
        importer.start(self._ledger)
        self._runs(b"")
        return True

    def check_abandon(self) -> None:
        """As Import.check_abandon: it may be given up at any time."""


def _check_debuggable(head: Head, *, debuggable: bool) -> None:
    if debuggable and not head.debuggable and not head.subject.policy.to_debuggable:
        raise MigrationRefused(Reason.DEBUGGED)
