"""Migration as kvm asks for it, step by step: UV_EXPORT_... at the source, UV_IMPORT_... at the destination.

A snapshot is taken and restored by the same steps but for its beginning and its end (`snapshot_calls`).
"""

from __future__ import annotations

from typing import TypeVar

from protocol import ucalls as u
from services.runtime.link import Link
from services.ultravisor.arrival import Arrival
from services.ultravisor.departure import Departure
from services.ultravisor.life import SvmLife
from services.ultravisor.migration.handshake import MAX_HANDSHAKE_BYTES, Host
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.migration.records import MAX_RECORD_BYTES
from services.ultravisor.migration.recovery import close_earlier
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.statements import MAX_STATEMENT_BYTES
from services.ultravisor.migration_host import policy_of
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.step_calls import StepCall, StepCalls
from services.ultravisor.svm_export import Export, NotYet, RoundEnd, SvmOfHost
from services.ultravisor.svm_import import Import
from services.ultravisor.thaw import thaw_guest

PartyT = TypeVar("PartyT", Departure, Arrival, Export, Import)


class MigrationCalls(StepCalls):
    """Handlers of the link to kvm. `partitions` are the VMs of this host by lpid."""

    def __init__(
        self,
        partitions: dict[int, Partition],
        life: SvmLife,
        account: SecureAccount,
        host: Host | None,
        ledger: FileLedger | None,
    ) -> None:
        """Without `host` and `ledger` every migration is refused."""
        super().__init__(partitions, life)
        self.account = account
        self._host, self._ledger = host, ledger

    def register(self, link: Link) -> None:
        """Serve every step. Records come and go in one order, so the reader itself serves them."""
        self._waiting(link, u.UV_EXPORT_OFFER, self.uv_export_offer)
        self._waiting(link, u.UV_EXPORT_ANSWER, self.uv_export_answer)
        self._at_once(link, u.UV_EXPORT_PAGES, self.uv_export_pages)
        self._waiting(link, u.UV_EXPORT_ROUND, self.uv_export_round)
        self._waiting(link, u.UV_EXPORT_STOP, self.uv_export_stop)
        self._at_once(link, u.UV_EXPORT_STATE, self.uv_export_state)
        self._waiting(link, u.UV_EXPORT_READY, self.uv_export_ready)
        self._waiting(link, u.UV_EXPORT_STATEMENT, self.uv_export_statement)
        self._waiting(link, u.UV_EXPORT_CANCEL, self.uv_export_cancel)
        self._waiting(link, u.UV_IMPORT_OFFER, self.uv_import_offer)
        self._waiting(link, u.UV_IMPORT_CONFIRM, self.uv_import_confirm)
        self._at_once(link, u.UV_IMPORT_RECORD, self.uv_import_record)
        self._waiting(link, u.UV_IMPORT_READY, self.uv_import_ready)
        self._waiting(link, u.UV_IMPORT_TOKEN, self.uv_import_token)
        self._waiting(link, u.UV_IMPORT_ABANDON, self.uv_import_abandon)

    # -- source -----------------------------------------------------------------------------------------------

    async def uv_export_offer(self, at: StepCall) -> list[int]:
        """UV_EXPORT_OFFER."""
        host, ledger = self.identity()
        departure = Departure(self.svm_of_host(at.partition), host, ledger)
        close_earlier(ledger, at.partition.name)
        at.partition.migration = departure
        self._note(at.partition, "migration-offered")
        return at.put(departure.offer)

    async def uv_export_answer(self, at: StepCall) -> list[int]:
        """UV_EXPORT_ANSWER."""
        departure = _party(at.partition, Departure)
        confirm = departure.take_answer(at.take(MAX_HANDSHAKE_BYTES))
        self._note(at.partition, "migration-begun", peer=departure.peer, session=departure.session_id.hex())
        await departure.forget_marks(at.cause)
        return at.put(confirm)

    def uv_export_pages(self, at: StepCall) -> list[int]:
        """UV_EXPORT_PAGES."""
        departure = _party(at.partition, Export)
        batch = departure.next_pages()
        if batch is None:
            return [0, 0, 0, 0]
        return [*at.put(batch.record), batch.zero_pages, batch.data_pages, departure.n_queued]

    async def uv_export_round(self, at: StepCall) -> list[int]:
        """UV_EXPORT_ROUND."""
        return _put_round(at, await _party(at.partition, Export).end_round(at.cause))

    async def uv_export_stop(self, at: StepCall) -> list[int]:
        """UV_EXPORT_STOP."""
        return _put_round(at, await _party(at.partition, Export).stop(at.cause))

    def uv_export_state(self, at: StepCall) -> list[int]:
        """UV_EXPORT_STATE."""
        record, more = _party(at.partition, Export).next_state()
        return [*at.put(record), int(more)]

    async def uv_export_ready(self, at: StepCall) -> list[int]:
        """UV_EXPORT_READY."""
        departure = _party(at.partition, Departure)
        token = departure.take_ready(at.take(MAX_RECORD_BYTES))
        self._note(at.partition, "migration-token-given", peer=departure.peer, session=departure.session_id.hex())
        return at.put(token)

    async def uv_export_statement(self, at: StepCall) -> list[int]:
        """UV_EXPORT_STATEMENT."""
        return [int(await self.take_word(at.partition, at.take(MAX_STATEMENT_BYTES), at.cause))]

    async def take_word(self, partition: Partition, raw: bytes, cause: int) -> bool:
        """The destination's word about the VM that leaves: whether it runs there. Raises MigrationRefused."""
        departure = _party(partition, Departure)
        moved = departure.take_word(raw)
        facts = {"peer": departure.peer, "session": departure.session_id.hex()}
        if moved:
            self._note(partition, "migration-moved", **facts)
            await self.life.terminate(partition, "migrated")
        else:
            self._note(partition, "migration-returned", **facts)
            await departure.thaw(cause)
        return moved

    async def uv_export_cancel(self, at: StepCall) -> list[int]:
        """UV_EXPORT_CANCEL."""
        departure = _party(at.partition, Export)
        was_open = departure.in_progress
        departure.cancel()
        if was_open:
            self._note(at.partition, f"{departure.what}-cancelled", session=departure.session_id.hex())
        await departure.thaw(at.cause)
        return []

    # -- destination ------------------------------------------------------------------------------------------

    async def uv_import_offer(self, at: StepCall) -> list[int]:
        """UV_IMPORT_OFFER."""
        host, ledger = self.identity()
        self.refuse_second(at.partition)
        offer = at.take(MAX_HANDSHAKE_BYTES)
        arrival = at.partition.migration = Arrival(at.partition, host, ledger, self.account, offer)
        return at.put(arrival.answer)

    async def uv_import_confirm(self, at: StepCall) -> list[int]:
        """UV_IMPORT_CONFIRM."""
        arrival = _party(at.partition, Arrival)
        arrival.take_confirm(at.take(MAX_HANDSHAKE_BYTES))
        self._note(at.partition, "migration-begun", peer=arrival.peer, session=arrival.session_id.hex())
        return []

    def uv_import_record(self, at: StepCall) -> list[int]:
        """UV_IMPORT_RECORD."""
        return [int(_party(at.partition, Import).take_record(at.borrow(MAX_RECORD_BYTES)))]

    async def uv_import_ready(self, at: StepCall) -> list[int]:
        """UV_IMPORT_READY."""
        arrival = _party(at.partition, Import)
        record = await arrival.ready(at.cause)
        assert arrival.kept is not None
        # Before the start: the guest's first instruction may ask for them.
        self.life.files[at.partition.lpid], self.life.bounce[at.partition.lpid] = arrival.kept
        return at.put(record)

    async def uv_import_token(self, at: StepCall) -> list[int]:
        """UV_IMPORT_TOKEN."""
        return at.put(await self.take_token(at.partition, at.take(MAX_STATEMENT_BYTES), at.cause))

    async def take_token(self, partition: Partition, raw: bytes, cause: int) -> bytes:
        """The start token: the VM runs here. Returns the word for the source; raises MigrationRefused."""
        arrival = _party(partition, Arrival)
        began = not arrival.in_progress
        word = arrival.take_token(raw)
        if not began:
            self._note(partition, "migration-started", peer=arrival.peer, session=arrival.session_id.hex())
            partition.note_esm("secure", f"arrived from {arrival.peer}")
            # Behind the word: a guest that is held up must not keep the source from hearing it.
            self.thaw_arrived(partition, cause)
        return word

    def thaw_arrived(self, partition: Partition, cause: int) -> None:
        """Let a VM run that has all come, in the background."""
        # It counts as under way from now on, not from when the task begins.
        partition.n_thaws += 1
        self.life.in_background(self._thaw, partition, cause)

    async def _thaw(self, partition: Partition, cause: int) -> None:
        try:
            runs = await thaw_guest(partition, cause)
        finally:
            partition.n_thaws -= 1
        if not runs and partition.secure:
            await self.life.fail(partition, "guest-did-not-start: it does not thaw")

    async def uv_import_abandon(self, at: StepCall) -> list[int]:
        """UV_IMPORT_ABANDON."""
        return at.put(await self.abandon(at.partition))

    async def abandon(self, partition: Partition) -> bytes:
        """The VM never runs here: the word for the source, empty before the handshake. Raises MigrationRefused."""
        arrival = _party(partition, Import)
        if arrival.in_progress:
            arrival.check_abandon()
            self._note(partition, f"{arrival.what}-abandoned", session=arrival.session_id.hex())
            if arrival.guest_has_it:
                await self.life.terminate(partition, f"{arrival.what}-abandoned")
        return arrival.abandon()

    async def drop(self, partition: Partition) -> None:
        """The VM is removed from this host: what has not arrived never will."""
        migration = partition.migration
        if isinstance(migration, Import) and migration.in_progress:
            try:
                await self.abandon(partition)
            except MigrationRefused as refused:
                self._note(partition, "migration-in-doubt", reason=str(refused))

    # -- what snapshots share ---------------------------------------------------------------------------------

    def svm_of_host(self, partition: Partition) -> SvmOfHost:
        """The secure VM with what is kept of it; raises MigrationRefused, also while it is moved or saved.

        Raises NotYet while its guest has not begun: until then it has no state that could be saved.
        """
        svm = partition.svm if partition.secure else None
        files, bounce = self.life.files.get(partition.lpid), self.life.bounce.get(partition.lpid)
        if svm is None or files is None or bounce is None:
            raise MigrationRefused(Reason.WRONG_PHASE, "no secure VM")
        self.refuse_second(partition)
        if partition.secure_since is None:
            raise NotYet("the guest is being started")
        partition.migration_refusal = None
        return SvmOfHost(partition, svm, files, bounce.gfns, policy_of(files))

    def refuse_second(self, partition: Partition) -> None:
        """Raise MigrationRefused while the VM is moved, saved or restored."""
        if partition.migration is not None and partition.migration.in_progress:
            raise MigrationRefused(Reason.WRONG_PHASE, f"a {partition.migration.what} of this VM is under way")

    def identity(self) -> tuple[Host, FileLedger]:
        """What this host is to others, and its ledger; raises MigrationRefused."""
        if self._host is None or self._ledger is None:
            raise MigrationRefused(Reason.NO_IDENTITY)
        return self._host, self._ledger


def _party(partition: Partition, kind: type[PartyT]) -> PartyT:
    if not isinstance(partition.migration, kind):
        raise MigrationRefused(Reason.WRONG_PHASE, "no such migration is under way")
    return partition.migration


def _put_round(at: StepCall, end: RoundEnd) -> list[int]:
    at.stream.write(at.args[1], end.written_shared)
    return [*at.put(end.record), end.n_owed]
