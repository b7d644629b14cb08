"""Exporter and importer of a snapshot: as those of a migration, with a line of the ledger in the place of the token.

exporter   COPYING  STOPPED  FINISHED  MOVED: the snapshot is the VM now, nothing of it may run on
           TOKEN_GIVEN: that may have been stored; the VM runs on only once it is stored that the snapshot is void
importer   RECEIVING  CHECKED  READY  STARTED: the snapshot is used up, and the VM runs
"""

from __future__ import annotations

from services.ultravisor.migration.exporter import Exporter, ExportPhase
from services.ultravisor.migration.importer import Importer, ImportPhase
from services.ultravisor.migration.ledger import Decision, FileLedger
from services.ultravisor.snapshot.book import check_restorable


class SnapshotExporter(Exporter):
    """One snapshot that is being taken."""

    def commit(self) -> None:
        """All is in the file: from here on the VM is there and nowhere else.

        Raises MigrationRefused when that cannot be stored; it may be tried again, or cancelled.
        """
        self._expect(ExportPhase.FINISHED, ExportPhase.TOKEN_GIVEN)
        try:
            self._decide(Decision.SAVED)
        finally:
            if self._in_doubt:
                self.phase = ExportPhase.TOKEN_GIVEN
        self.phase = ExportPhase.MOVED

    def cancel(self) -> None:
        """The VM stays. Raises MigrationRefused once the snapshot is complete, or while it may be."""
        if self.phase is not ExportPhase.TOKEN_GIVEN:
            super().cancel()
            return
        self._settle(Decision.SAVED)
        if self._in_doubt:
            self._decide(Decision.VOID)
        self.phase = ExportPhase.RETURNED


class SnapshotImporter(Importer):
    """One snapshot that is being restored."""

    def start(self, ledger: FileLedger) -> None:
        """The VM may run; raises MigrationRefused when the snapshot may not be restored, or that cannot be stored."""
        self._expect(ImportPhase.READY)
        check_restorable(ledger, self._session.session_id, self._session.subject.vm)
        self._decide(Decision.RESTORED)
        self.phase = ImportPhase.STARTED

    def abandon(self) -> bytes:
        """Give up, and wipe. A start that may have been stored never happens: at worst the snapshot is used up."""
        self._expect(ImportPhase.RECEIVING, ImportPhase.CHECKED, ImportPhase.READY, ImportPhase.ABANDONED)
        if not self._wiped:
            self._wipe()
        return b""
