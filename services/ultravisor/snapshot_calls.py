"""Snapshots as kvm asks for them: UV_SAVE_... and UV_RESTORE_..., the beginning and the end.

What lies between are steps of a migration: UV_EXPORT_STOP, PAGES, STATE and CANCEL, and UV_IMPORT_RECORD, READY and
ABANDON.
"""

from __future__ import annotations

from protocol import ucalls as u
from protocol.declare import Call
from services.runtime.link import Link
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration_calls import MigrationCalls
from services.ultravisor.partition import Partition
from services.ultravisor.restoring import Restoring
from services.ultravisor.saving import Saving
from services.ultravisor.snapshot.head import MAX_HEAD_BYTES
from services.ultravisor.step_calls import StepCall, StepCalls

_OF_RESTORE = frozenset({u.UV_RESTORE_BEGIN, u.UV_RESTORE_START})


class SnapshotCalls(StepCalls):
    """Handlers of the link to kvm, beside those of `migrations`."""

    def __init__(self, migrations: MigrationCalls) -> None:
        super().__init__(migrations.partitions, migrations.life)
        self._migrations = migrations

    def register(self, link: Link) -> None:
        """Serve the steps."""
        self._waiting(link, u.UV_SAVE_BEGIN, self.uv_save_begin)
        self._waiting(link, u.UV_SAVE_COMMIT, self.uv_save_commit)
        self._waiting(link, u.UV_RESTORE_BEGIN, self.uv_restore_begin)
        self._waiting(link, u.UV_RESTORE_START, self.uv_restore_start)

    async def uv_save_begin(self, at: StepCall) -> list[int]:
        """UV_SAVE_BEGIN."""
        host, ledger = self._migrations.identity()
        saving = at.partition.migration = Saving(self._migrations.svm_of_host(at.partition), host, ledger)
        self._note(at.partition, "snapshot-begun", snapshot=saving.session_id.hex())
        return at.put(saving.head)

    async def uv_save_commit(self, at: StepCall) -> list[int]:
        """UV_SAVE_COMMIT."""
        saving = at.partition.migration
        if not isinstance(saving, Saving):
            raise MigrationRefused(Reason.WRONG_PHASE, "no snapshot is being taken")
        if saving.commit():
            self._note(at.partition, "snapshot-taken", snapshot=saving.session_id.hex())
        await self.life.terminate(at.partition, "saved")
        return []

    async def uv_restore_begin(self, at: StepCall) -> list[int]:
        """UV_RESTORE_BEGIN."""
        host, ledger = self._migrations.identity()
        self._migrations.refuse_second(at.partition)
        head = at.take(MAX_HEAD_BYTES)
        restoring = at.partition.migration = Restoring(at.partition, host, ledger, self._migrations.account, head)
        self._note(at.partition, "restore-begun", snapshot=restoring.session_id.hex())
        return []

    async def uv_restore_start(self, at: StepCall) -> list[int]:
        """UV_RESTORE_START."""
        restoring = at.partition.migration
        if not isinstance(restoring, Restoring):
            raise MigrationRefused(Reason.WRONG_PHASE, "no snapshot is being restored")
        if restoring.start():
            self._note(at.partition, "restored", snapshot=restoring.session_id.hex())
            at.partition.note_esm("secure", "restored from a snapshot")
            self._migrations.thaw_arrived(at.partition, at.cause)
        return []

    def _named(self, partition: Partition, call: Call) -> str:
        return Restoring.what if call in _OF_RESTORE else Saving.what
