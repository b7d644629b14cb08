"""A secure VM leaves this host for another: one migration at its source, from the offer to the destination's word."""

from __future__ import annotations

from protocol.errors import HostFault
from services.ultravisor.dirty import collect_dirty
from services.ultravisor.migration.exporter import Exporter, ExportPhase
from services.ultravisor.migration.handshake import Host, SourceHandshake, Subject
from services.ultravisor.migration.ledger import Ledger
from services.ultravisor.migration.records import ends_at_source
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.svm_export import Export, SvmOfHost


class Departure(Export):
    """One migration at its source."""

    def __init__(self, of: SvmOfHost, host: Host, ledger: Ledger) -> None:
        """Raises MigrationRefused for a VM that cannot leave at all."""
        if not of.policy.may_migrate:
            raise MigrationRefused(Reason.POLICY, "it may not migrate at all")
        super().__init__(of)
        partition = of.partition
        self._host, self._ledger = host, ledger
        self._handshake = SourceHandshake(host, Subject(partition.name, partition.lpid, of.svm.n_pages, of.policy))
        self.peer = ""

    # -- handshake --------------------------------------------------------------------------------------------

    @property
    def offer(self) -> bytes:
        """The first message of the handshake."""
        return self._handshake.offer

    def take_answer(self, raw: bytes) -> bytes:
        """The second message; returns the third. Pages may be sent from here on. Raises MigrationRefused."""
        if self._cancelled:
            raise MigrationRefused(Reason.WRONG_PHASE, self.phase)
        session, confirm = self._handshake.take_answer(raw)
        sealer, opener = ends_at_source(session)
        identity = self._host.identity
        self._exporter = Exporter(session, identity, self._ledger, sealer, opener, self._read_page)
        self.session_id, self.peer = session.session_id, session.peer.host
        self._requeue()
        return confirm

    async def forget_marks(self, cause: int) -> None:
        """Stores of before say nothing: every page is sent once, and as it is from here on."""
        with self._alone():
            try:
                await collect_dirty(self._of.partition, range(self._of.svm.n_pages), cause)
            except HostFault:
                # What keeps its mark is only sent once more.
                return

    # -- the end ----------------------------------------------------------------------------------------------

    def take_ready(self, raw: bytes) -> bytes:
        """The destination has everything: the start token. Raises MigrationRefused."""
        return self._running().take_ready(raw)

    def token(self) -> bytes:
        """The start token once more; raises MigrationRefused unless it was given."""
        return self._begun().token()

    def take_word(self, raw: bytes) -> bool:
        """The destination's word: whether the VM runs there. Raises MigrationRefused, NotYet."""
        self._expect_rest()
        exporter = self._begun()
        exporter.take_statement(raw)
        return exporter.phase is ExportPhase.MOVED
