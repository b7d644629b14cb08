"""What an operator may ask and have carried between two ultravisors: before a migration, and after one that was cut.

Everything that is carried holds by itself (a certificate, a signed word), so the carrier is trusted with nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import HostFault, UserError
from protocol.geometry import PAGE_SHIFT
from services.runtime.process import Query
from services.ultravisor.arrival import Arrival
from services.ultravisor.departure import Departure
from services.ultravisor.life import SvmLife
from services.ultravisor.migration.certificates import HostCertificate
from services.ultravisor.migration.exporter import ExportPhase
from services.ultravisor.migration.handshake import VERSION, Host
from services.ultravisor.migration.ledger import Decision, Entry, FileLedger
from services.ultravisor.migration.payloads import MAX_FINAL_PAGES
from services.ultravisor.migration.recovery import word_of_destination, word_of_source
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.statements import Word, check, session_of
from services.ultravisor.migration_calls import MigrationCalls
from services.ultravisor.migration_host import policy_of
from services.ultravisor.partition import Partition
from shared.gfn_bitmap import bitmap_of_marks, gfns_of


class MigrationQueries:
    """By name; `partitions` are the VMs of this host by name."""

    def __init__(
        self,
        partitions: dict[str, Partition],
        life: SvmLife,
        calls: MigrationCalls,
        host: Host | None,
        ledger: FileLedger | None,
    ) -> None:
        self._partitions, self._life, self._calls = partitions, life, calls
        self._host, self._ledger = host, ledger

    def queries(self) -> dict[str, Query]:
        """All of them."""
        return {
            "migration.certificate": self._certificate,
            "migration.check": self._check,
            "migration.pages": self._pages,
            "migration.expect": self._expect,
            "migration.status": self._status,
            "migration.word": self._word,
            "migration.take": self._take,
            "migration.abandon": self._abandon,
        }

    # -- before -----------------------------------------------------------------------------------------------

    async def _certificate(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Who this ultravisor is."""
        host = self._identity()
        return {
            "certificate": msgspec.msgpack.encode(host.certificate).hex(),
            "measurement": host.measurement.hex(),
            "debuggable": host.debuggable,
            "version": VERSION,
        }

    async def _check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Why a migration with the ultravisor that `peer` describes would be refused here, or None."""
        try:
            self._check_peer(arguments)
        except MigrationRefused as refused:
            return {"reason": str(refused)}
        return {"reason": None}

    def _check_peer(self, arguments: dict[str, Any]) -> None:
        host, peer = self._identity(), arguments["peer"]
        try:
            certificate = msgspec.msgpack.decode(bytes.fromhex(peer["certificate"]), type=HostCertificate)
        except (*DECODE_ERRORS, ValueError):
            raise MigrationRefused(Reason.BAD_CERTIFICATE, "unreadable") from None
        if peer["version"] != VERSION:
            raise MigrationRefused(Reason.OTHER_VERSION, f"{peer['version']}, here {VERSION}")
        host.trust.check(certificate, bytes.fromhex(peer["measurement"]), host.now())
        if arguments["as"] == "source":
            policy = policy_of(self._life.files.get(self._named(arguments).lpid))
            policy.check(certificate, debuggable=bool(peer["debuggable"]))

    async def _pages(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Which pages of secure memory the VM has touched, as a bitmap; raises UserError when it is no secure one."""
        partition = self._named(arguments)
        if not partition.secure or partition.svm is None:
            raise UserError(f"{partition.name} is no secure VM")
        if partition.svm.n_pages > MAX_FINAL_PAGES:
            raise UserError(f"{partition.name} has {partition.svm.n_pages} pages; at most {MAX_FINAL_PAGES} move")
        return {"touched": bitmap_of_marks(bytes(partition.svm.memory.touched()))}

    async def _expect(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A VM with such pages, as `migration.pages` of another ultravisor says, will arrive here: whether memory is
        being made for it. Raises UserError for a bitmap of another VM than this."""
        partition = self._named(arguments)
        if not partition.entry.incoming or self._calls.account.free_bytes < partition.ram.size_bytes:
            return {"expected": False}
        n_pages, touched = partition.ram.size_bytes >> PAGE_SHIFT, arguments["touched"]
        if not isinstance(touched, bytes) or len(touched) != (n_pages + 7) // 8:
            raise UserError(f"no bitmap of the {n_pages} pages of {partition.name}")
        partition.expect_pages([gfn for gfn in gfns_of(touched) if gfn < n_pages])
        return {"expected": True}

    # -- during and after -------------------------------------------------------------------------------------

    async def _status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        partition = self._named(arguments)
        migration = partition.migration
        refusal = partition.migration_refusal
        if not isinstance(migration, Departure | Arrival):
            return {"role": None, "phase": None, "session": None, "peer": None, "refusal": refusal}
        role = "source" if isinstance(migration, Departure) else "destination"
        session = migration.session_id.hex()
        return {"role": role, "phase": migration.phase, "session": session, "peer": migration.peer, "refusal": refusal}

    async def _word(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The source's word: its start token, or None when it never gave it. `session` names the migration.

        `withheld` is why a token that it may have given cannot be given now.
        """
        vm = str(arguments["vm"])
        departure = self._departure(vm)
        if departure is not None:
            return _word_of(departure)
        # After a crash there is no VM here any more: only what the ledger says of it.
        entry = self._open_entry(vm)
        word = None if entry is None else self._token_of(entry)
        return {"word": None if word is None else word.hex(), "session": "" if entry is None else entry.session}

    async def _take(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The other side's word. As destination: the token, returns the word for the source."""
        vm, raw = str(arguments["vm"]), bytes.fromhex(str(arguments["word"]))
        try:
            if arguments["as"] == "destination":
                return {"word": (await self._take_token(vm, raw)).hex()}
            return {"moved": await self._take_word(vm, raw)}
        except MigrationRefused as refused:
            raise HostFault(str(refused)) from None

    async def _take_token(self, vm: str, raw: bytes) -> bytes:
        partition = self._partitions.get(vm)
        arrival = None if partition is None else partition.migration
        if partition is not None and isinstance(arrival, Arrival) and arrival.session_id == session_of(raw):
            return arrival.abandon() if arrival.is_over else await self._calls.take_token(partition, raw, 0)
        return self._word_from_ledger(session_of(raw))

    async def _take_word(self, vm: str, raw: bytes) -> bool:
        departure = self._departure(vm)
        if departure is not None and departure.session_id != session_of(raw):
            # An earlier one, say, that nobody closed: it tells nothing about where the VM is now.
            raise HostFault(f"this word is about another migration of {vm}")
        if departure is not None and departure.in_progress:
            return await self._calls.take_word(self._partitions[vm], raw, 0)
        entry = None if self._ledger is None else self._ledger.newest(session_of(raw))
        if self._ledger is None or entry is None:
            # The token was never given, so the VM cannot have started there.
            return False
        if entry.vm != vm or entry.decision not in (Decision.GIVEN, Decision.CLOSED):
            raise HostFault(f"this word is about no migration of {vm} from here")
        moved = check(raw, bytes.fromhex(entry.session), bytes.fromhex(entry.peer)) is Word.STARTED
        if entry.decision is Decision.GIVEN:
            self._ledger.record(msgspec.structs.replace(entry, decision=Decision.CLOSED))
        return moved

    async def _abandon(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The destination gives up the migration `session` for good; its word for the source.

        None when it has nothing of the VM, and no session was named: then there was no handshake.
        """
        partition = self._partitions.get(str(arguments["vm"]))
        session_id = bytes.fromhex(str(arguments["session"]))
        arrival = None if partition is None else partition.migration
        try:
            if partition is not None and isinstance(arrival, Arrival) and session_id in (b"", arrival.session_id):
                return {"word": (await self._calls.abandon(partition)).hex() or None}
            return {"word": self._word_from_ledger(session_id).hex() if session_id else None}
        except MigrationRefused as refused:
            raise HostFault(str(refused)) from None

    # -- helpers ----------------------------------------------------------------------------------------------

    def _departure(self, vm: str) -> Departure | None:
        """The newest migration of the VM from here that this ultravisor has lived through."""
        partition = self._partitions.get(vm)
        migration = None if partition is None else partition.migration
        return migration if isinstance(migration, Departure) else None

    def _open_entry(self, vm: str) -> Entry | None:
        """The newest token of the VM that nobody has answered."""
        entries = [] if self._ledger is None else self._ledger.open_entries()
        return next((entry for entry in reversed(entries) if entry.vm == vm), None)

    def _token_of(self, entry: Entry) -> bytes | None:
        assert self._ledger is not None
        return word_of_source(self._ledger, self._identity().identity, bytes.fromhex(entry.session))

    def _word_from_ledger(self, session_id: bytes) -> bytes:
        """After a crash: this host holds nothing that could start the VM, so its word is what the ledger says."""
        if self._ledger is None:
            raise HostFault("this host has no ledger of migrations")
        arrivals = (partition.migration for partition in self._partitions.values())
        live = [arrival.session_id for arrival in arrivals if isinstance(arrival, Arrival) and arrival.in_progress]
        return word_of_destination(self._ledger, self._identity().identity, session_id, live)

    def _identity(self) -> Host:
        if self._host is None:
            raise UserError("this host's ultravisor has no identity for migrations")
        return self._host

    def _named(self, arguments: dict[str, Any]) -> Partition:
        partition = self._partitions.get(str(arguments["vm"]))
        if partition is None:
            raise UserError(f"the ultravisor knows no VM {arguments['vm']}")
        return partition


def _word_of(departure: Departure) -> dict[str, Any]:
    session = departure.session_id.hex()
    if not departure.in_progress:
        return {"word": None, "session": session}
    try:
        return {"word": departure.token().hex(), "session": session}
    except MigrationRefused as refused:
        withheld = str(refused) if departure.phase == ExportPhase.TOKEN_GIVEN.value else ""
        return {"word": None, "session": session, "withheld": withheld}
