"""A secure VM comes to this host from another: one migration at its destination, from the offer to the start token."""

from __future__ import annotations

from services.ultravisor.migration.handshake import DestinationHandshake, Host
from services.ultravisor.migration.importer import Importer
from services.ultravisor.migration.ledger import Ledger
from services.ultravisor.migration.records import ends_at_destination
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.svm_parts import SvmFrames
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.svm_import import Import


class Arrival(Import):
    """One migration at its destination."""

    def __init__(
        self, partition: Partition, host: Host, ledger: Ledger, account: SecureAccount, raw_offer: bytes
    ) -> None:
        """Raises MigrationRefused for an offer that is not good, or of another VM; secure memory is set aside."""
        if partition.entry.restoring:
            raise MigrationRefused(Reason.NOT_THIS_VM, "it is to go on out of a snapshot here")
        self._host, self._ledger = host, ledger
        self._handshake = DestinationHandshake(host, raw_offer)
        super().__init__(partition, account, self._handshake.subject)
        self.session_id = self._handshake.session_id
        """From the beginning: whoever knows it must not be told that nothing of it is here."""
        self.peer = ""

    @property
    def answer(self) -> bytes:
        """The second message of the handshake."""
        return self._handshake.answer

    def take_confirm(self, raw: bytes) -> None:
        """The third message: records may come from here on. Raises MigrationRefused."""
        session = self._handshake.take_confirm(raw)
        svm = self._make_svm()
        sealer, opener = ends_at_destination(session)
        self._importer = Importer(session, self._host.identity, self._ledger, sealer, opener, SvmFrames(svm))
        self.peer = session.peer.host

    def take_token(self, raw: bytes) -> bytes:
        """The start token: the VM is this host's. Returns the word for the source; raises MigrationRefused."""
        if not self._started:
            self._runs(self._loaded().take_token(raw))
        assert self._word is not None
        return self._word
