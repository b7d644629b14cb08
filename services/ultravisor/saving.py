"""A secure VM is put into a snapshot: its pages and state leave sealed, and with the last step it runs here no more."""

from __future__ import annotations

from services.ultravisor.migration.exporter import ExportPhase
from services.ultravisor.migration.handshake import Host, Subject
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.migration.records import ends_at_source
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.snapshot.head import new_head, session_to_save
from services.ultravisor.snapshot.sides import SnapshotExporter
from services.ultravisor.svm_export import Export, NotYet, SvmOfHost


class Saving(Export):
    """One snapshot that is being taken."""

    what = "snapshot"

    def __init__(self, of: SvmOfHost, host: Host, ledger: FileLedger) -> None:
        """Raises MigrationRefused for a VM that cannot be saved."""
        super().__init__(of)
        entry = of.partition.entry
        subject = Subject(entry.name, entry.lpid, of.svm.n_pages, of.policy)
        self.head = new_head(host, subject, entry.incarnation, debuggable=host.debuggable or entry.debuggable)
        """What goes in front of the records."""
        session = session_to_save(self.head, host)
        sealer, opener = ends_at_source(session)
        exporter = SnapshotExporter(session, host.identity, ledger, sealer, opener, self._read_page)
        self._exporter = self._snapshot = exporter
        self.session_id = session.session_id
        self._requeue()

    def commit(self) -> bool:
        """All is in the file: the VM is there and nowhere else. False when it was already. Raises MigrationRefused,
        NotYet.
        """
        if self._snapshot.phase is ExportPhase.MOVED:
            return False
        self._expect_rest()
        self._running()
        self._snapshot.commit()
        return True

    def cancel(self) -> None:
        """As Export.cancel; raises NotYet also while nobody can say whether the snapshot is complete."""
        self._expect_rest()
        in_doubt = self._snapshot.phase is ExportPhase.TOKEN_GIVEN
        try:
            self._snapshot.cancel()
        except MigrationRefused as refused:
            if in_doubt and refused.reason is Reason.NOT_STORED:
                raise NotYet(str(refused)) from None
            raise
