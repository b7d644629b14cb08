"""Two real ultravisors between which a played kvm and qemu carry a secure VM, step by step (S1, S3, S5, S6, S7)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import messages as m
from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import HostFault, UserError
from protocol.geometry import PAGE_BYTES, STREAM_BUFFER_BYTES
from services.testing.image import PlayedImage
from services.ultravisor import migration_queries
from services.ultravisor.arrival import Arrival
from services.ultravisor.departure import Departure
from services.ultravisor.migration.handshake import Host
from services.ultravisor.migration.ledger import Decision, Entry, FileLedger, LedgerTorn
from services.ultravisor.migration.statements import Word, sign
from services.ultravisor.migration_queries import MigrationQueries
from services.ultravisor.page_state import PageEvent
from services.ultravisor.secure_memory import SecureMemory
from services.ultravisor.svm import SvmPhase
from shared.gfn_bitmap import bitmap_of
from shared.memfd import SealedMemory
from shared.migration_policy import POLICY_FILE
from tests.unit.migration_pair import make_host
from tests.unit.ultravisor_rig import LPID, MEMORY_BYTES, N_PAGES, UltravisorRig, played_image, ultravisor_rig

MAY = {POLICY_FILE: b'{"may_migrate": true}', "secret": b"the key of the disk"}
DIRTY_OFFSET = 8 << 20
SHARED_GFN = 40
SECRET_GFN = 41
KERNEL = b"kernel" * 100


class Refused(Exception):
    """A step that was not U_SUCCESS."""

    def __init__(self, call: Call, code: int) -> None:
        self.code = UCode(code)
        super().__init__(f"{call.name}: {self.code.name}")


async def step(rig: UltravisorRig, call: Call, *args: int) -> list[int]:
    """A step with these arguments after the lpid; its results."""
    code, *results = await rig.kvm.deliver(call, [LPID, *args])
    if code != UCode.U_SUCCESS:
        raise Refused(call, code)
    return list(results)


async def give(rig: UltravisorRig, call: Call, message: bytes) -> list[int]:
    """A step that takes `message`."""
    rig.stream.write(0, message)
    return await step(rig, call, 0, len(message))


async def exchange(rig: UltravisorRig, call: Call, message: bytes) -> bytes:
    """A step that takes a message and gives one."""
    return rig.stream.read(0, (await give(rig, call, message))[0])


async def fetch(rig: UltravisorRig, call: Call, *args: int) -> bytes:
    """A step that gives a message."""
    return rig.stream.read(0, (await step(rig, call, 0, *args))[0])


@dataclass
class Pair:
    """A secure VM at `source`; `carry` is what becomes of each record on its way."""

    source: UltravisorRig
    destination: UltravisorRig
    marks: SealedMemory
    """The guest's dirty map at the source."""
    carry: Callable[[bytes], bytes | None] = lambda record: record
    carried: list[bytes] = field(default_factory=list)

    async def shake_hands(self) -> None:
        offer = await fetch(self.source, u.UV_EXPORT_OFFER)
        answer = await exchange(self.destination, u.UV_IMPORT_OFFER, offer)
        confirm = await exchange(self.source, u.UV_EXPORT_ANSWER, answer)
        await give(self.destination, u.UV_IMPORT_CONFIRM, confirm)

    async def record(self, record: bytes) -> bool:
        """Carry a record; whether all is there."""
        self.carried.append(record)
        carried = self.carry(record)
        return False if carried is None else bool((await give(self.destination, u.UV_IMPORT_RECORD, carried))[0])

    async def pages(self) -> None:
        while (results := await step(self.source, u.UV_EXPORT_PAGES, 0))[0]:
            await self.record(self.source.stream.read(0, results[0]))

    async def end_round(self, call: Call = u.UV_EXPORT_ROUND) -> tuple[int, bytes]:
        """How many pages are owed after it, and which host-readable ones were written."""
        n_bytes, n_owed = await step(self.source, call, 0, DIRTY_OFFSET)
        await self.record(self.source.stream.read(0, n_bytes))
        return n_owed, self.source.stream.read(DIRTY_OFFSET, N_PAGES // 8)

    async def state(self) -> bool:
        """Send what is no page; whether the destination has all."""
        checked, more = False, 1
        while more:
            n_bytes, more = await step(self.source, u.UV_EXPORT_STATE, 0)
            checked = await self.record(self.source.stream.read(0, n_bytes))
        return checked

    async def until_ready(self) -> bytes:
        """All of it, up to the destination's READY."""
        await self.shake_hands()
        await self.pages()
        await self.end_round(u.UV_EXPORT_STOP)
        await self.pages()
        await self.state()
        return await fetch(self.destination, u.UV_IMPORT_READY)

    async def move(self) -> None:
        ready = await self.until_ready()
        token = await exchange(self.source, u.UV_EXPORT_READY, ready)
        word = await exchange(self.destination, u.UV_IMPORT_TOKEN, token)
        assert await give(self.source, u.UV_EXPORT_STATEMENT, word) == [1]

    def queries(self, rig: UltravisorRig, host: Host | None) -> MigrationQueries:
        return MigrationQueries({"vm1": rig.partition}, rig.life, rig.migrations, host, rig.ledger)


@pytest.fixture
def hosts() -> tuple[Host, Host]:
    return make_host("alpha"), make_host("beta")


@pytest.fixture
def image(key: RSAPrivateKey) -> PlayedImage:
    return played_image(key, KERNEL, MAY)


@pytest.fixture
async def pair(
    nursery: trio.Nursery, key: RSAPrivateKey, hosts: tuple[Host, Host], image: PlayedImage
) -> AsyncIterator[Pair]:
    alpha, beta = hosts
    with ultravisor_rig(nursery, key, host=alpha) as source, ultravisor_rig(nursery, key, host=beta) as destination:
        await source.secure(image)
        marks = SealedMemory("dirty", N_PAGES, others_write=True)
        source.partition.take_dirty_map(os.dup(marks.fd))
        other = SealedMemory("dirty", N_PAGES, others_write=True)
        destination.partition.take_dirty_map(os.dup(other.fd))
        source.page(SECRET_GFN)[:6] = b"secret"
        assert not await source.share(SHARED_GFN)
        yield Pair(source, destination, marks)
        marks.close()
        other.close()


# -- before ------------------------------------------------------------------------------------------------------


async def test_memory_for_the_pages_that_a_vm_has_is_made_before_it_arrives(
    pair: Pair, hosts: tuple[Host, Host]
) -> None:
    at_source = pair.queries(pair.source, hosts[0]).queries()
    destination = pair.destination
    at_destination = pair.queries(destination, hosts[1]).queries()
    destination.partition.entry = msgspec.structs.replace(destination.partition.entry, incoming=True)

    pages = await at_source["migration.pages"]({"vm": "vm1"})
    assert await at_destination["migration.expect"]({"vm": "vm1", **pages}) == {"expected": True}
    assert await at_destination["migration.expect"]({"vm": "vm1", **pages}) == {"expected": True}, "asked twice"
    expected, left = destination.partition._expected, pair.source.partition.svm
    assert expected is not None
    assert left is not None
    with trio.fail_after(5):
        while gfns_touched(expected) != gfns_touched(left.memory):  # noqa: ASYNC110
            await trio.sleep(0.002)
    await pair.move()

    assert destination.partition.svm is not None
    assert destination.partition.svm.memory is expected
    assert bytes(destination.page(SECRET_GFN)[:6]) == b"secret"


async def test_nothing_is_made_for_a_vm_that_does_not_arrive_or_has_no_room(
    pair: Pair, hosts: tuple[Host, Host]
) -> None:
    destination = pair.destination
    expect = pair.queries(destination, hosts[1]).queries()["migration.expect"]
    touched = bitmap_of(range(N_PAGES), N_PAGES)
    assert await expect({"vm": "vm1", "touched": touched}) == {"expected": False}, "it starts here"

    destination.partition.entry = msgspec.structs.replace(destination.partition.entry, incoming=True)
    assert destination.migrations.account.charge(destination.migrations.account.free_bytes)
    assert await expect({"vm": "vm1", "touched": touched}) == {"expected": False}, "there is no room"
    assert destination.partition._expected is None


async def test_nothing_more_is_made_for_a_vm_that_is_arriving(pair: Pair, hosts: tuple[Host, Host]) -> None:
    """Its ultravisor was held up, and hears late what it is to expect."""
    destination = pair.destination
    expect = pair.queries(destination, hosts[1]).queries()["migration.expect"]
    destination.partition.entry = msgspec.structs.replace(destination.partition.entry, incoming=True)
    await pair.shake_hands()

    await expect({"vm": "vm1", "touched": bitmap_of([3], N_PAGES)})

    assert destination.partition.migration is not None
    assert destination.partition._expected is None


async def test_of_a_vm_that_is_too_large_to_move_no_bitmap_is_made(
    pair: Pair, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration_queries, "MAX_FINAL_PAGES", N_PAGES - 1)
    pages = pair.queries(pair.source, hosts[0]).queries()["migration.pages"]

    with pytest.raises(UserError, match=f"vm1 has {N_PAGES} pages; at most {N_PAGES - 1} move"):
        await pages({"vm": "vm1"})


async def test_what_was_made_for_a_vm_that_never_came_is_released_with_it(pair: Pair, hosts: tuple[Host, Host]) -> None:
    partition = pair.destination.partition
    partition.entry = msgspec.structs.replace(partition.entry, incoming=True)
    expect = pair.queries(pair.destination, hosts[1]).queries()["migration.expect"]
    assert await expect({"vm": "vm1", "touched": bitmap_of([3, N_PAGES - 1], N_PAGES)}) == {"expected": True}
    assert partition._expected is not None
    memory = partition._expected

    partition.drop_expected()

    assert partition._expected is None
    with pytest.raises(ValueError, match="released"):
        memory.buffer[0] = 1


@pytest.mark.parametrize(
    "touched", [b"", bytes(N_PAGES // 8 + 1), bytes(1 << 17), "0" * (N_PAGES // 8), [[-5, 3]], None]
)
async def test_s7_what_another_ultravisor_says_of_its_pages_is_checked(
    pair: Pair, hosts: tuple[Host, Host], touched: object
) -> None:
    partition = pair.destination.partition
    partition.entry = msgspec.structs.replace(partition.entry, incoming=True)
    expect = pair.queries(pair.destination, hosts[1]).queries()["migration.expect"]

    with pytest.raises(UserError, match=f"no bitmap of the {N_PAGES} pages of vm1"):
        await expect({"vm": "vm1", "touched": touched})
    assert partition._expected is None


def gfns_touched(memory: SecureMemory) -> list[int]:
    return [gfn for gfn, mark in enumerate(memory.touched()) if mark]


# -- all goes well -----------------------------------------------------------------------------------------------


async def test_a_secure_vm_runs_on_where_it_was_moved_with_its_newest_pages_and_its_processor(pair: Pair) -> None:
    await pair.shake_hands()
    await pair.pages()
    pair.source.page(SECRET_GFN)[:6] = b"newest"
    pair.marks.buffer[SECRET_GFN] = 1
    assert (await pair.end_round())[0] == 1
    await pair.pages()
    await pair.end_round(u.UV_EXPORT_STOP)
    await pair.state()
    ready = await fetch(pair.destination, u.UV_IMPORT_READY)
    token = await exchange(pair.source, u.UV_EXPORT_READY, ready)
    word = await exchange(pair.destination, u.UV_IMPORT_TOKEN, token)

    assert await give(pair.source, u.UV_EXPORT_STATEMENT, word) == [1]
    await trio.testing.wait_all_tasks_blocked()
    assert pair.destination.partition.secure
    assert bytes(pair.destination.page(SECRET_GFN)[:6]) == b"newest"
    assert pair.destination.state(SHARED_GFN) == "SHARED_INV"
    assert pair.destination.guest.names() == ["SVM_LOAD", "SVM_THAW"]
    _, load = pair.destination.guest.calls[0]
    assert isinstance(load, m.LoadProcessorBody)
    assert load.state == b"registers"


async def test_nothing_of_it_stays_where_it_was(pair: Pair) -> None:
    await pair.move()

    assert pair.source.partition.svm is None
    assert pair.source.account.used_bytes == 0
    assert pair.destination.account.used_bytes == MEMORY_BYTES
    assert pair.source.guest.names()[-1] == "SVM_ENDED"
    assert pair.source.audited("migration-moved")
    assert pair.destination.audited("migration-started")


async def test_the_files_of_its_blob_come_with_it(pair: Pair) -> None:
    await pair.move()

    files = pair.destination.life.files[LPID]
    assert files.peek("secret") == b"the key of the disk"
    assert not await pair.destination.share(SHARED_GFN - 1)


async def test_no_record_shows_a_byte_of_the_vm(pair: Pair) -> None:
    """S1: what kvm and qemu carry."""
    await pair.move()

    whole = b"".join(pair.carried)
    assert b"secret" not in whole
    assert b"registers" not in whole
    assert KERNEL[:32] not in whole


async def test_the_round_tells_which_shared_pages_the_guest_wrote(pair: Pair) -> None:
    await pair.shake_hands()
    pair.marks.buffer[SHARED_GFN] = 1

    n_owed, written = await pair.end_round()

    assert written[SHARED_GFN >> 3] == 1 << (SHARED_GFN & 7)
    assert n_owed == N_PAGES - sum(pair.source.state(gfn).startswith("SHARED") for gfn in range(N_PAGES))


async def test_stores_of_before_the_migration_send_no_page_twice(pair: Pair) -> None:
    pair.marks.buffer[SECRET_GFN] = 1
    await pair.shake_hands()
    await pair.pages()

    assert (await pair.end_round())[0] == 0


async def test_it_can_go_back_where_it_came_from(pair: Pair, key: RSAPrivateKey, nursery: trio.Nursery) -> None:
    await pair.move()
    await trio.testing.wait_all_tasks_blocked()
    pair.destination.page(SECRET_GFN)[:6] = b"better"
    back = Pair(pair.destination, pair.source, pair.marks)

    await back.move()

    assert bytes(pair.source.page(SECRET_GFN)[:6]) == b"better"
    assert pair.destination.partition.svm is None


# -- one runner (S6) ---------------------------------------------------------------------------------------------


async def test_a_destination_does_not_let_it_run_before_the_token(pair: Pair) -> None:
    await pair.until_ready()

    assert pair.destination.partition.svm is not None
    assert pair.destination.partition.svm.phase is SvmPhase.ARRIVED
    assert not pair.destination.partition.secure
    assert "SVM_THAW" not in pair.destination.guest.names()


async def test_s7_a_vm_that_has_arrived_loses_no_memory_slot_before_it_runs(pair: Pair) -> None:
    await pair.until_ready()

    assert await pair.destination.kvm.ucall(u.UV_UNREGISTER_MEM_SLOT, LPID, 0) == UCode.U_STATE

    assert pair.destination.account.used_bytes == MEMORY_BYTES


async def test_a_source_that_gave_the_token_does_not_take_it_back(pair: Pair) -> None:
    await exchange(pair.source, u.UV_EXPORT_READY, await pair.until_ready())

    with pytest.raises(Refused, match="U_STATE"):
        await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    assert "SVM_THAW" not in pair.source.guest.names()


async def test_a_source_cancels_until_it_gave_the_token(pair: Pair) -> None:
    await pair.until_ready()

    for _ in range(2):
        # The answer to the first may have been lost.
        await step(pair.source, u.UV_EXPORT_CANCEL, 0)

    assert pair.source.guest.names()[-1] == "SVM_THAW"
    assert pair.source.guest.names().count("SVM_THAW") == 1
    assert pair.source.partition.secure
    await fetch(pair.source, u.UV_EXPORT_OFFER)


async def test_a_handshake_that_was_cancelled_does_not_go_on(pair: Pair) -> None:
    offer = await fetch(pair.source, u.UV_EXPORT_OFFER)
    answer = await exchange(pair.destination, u.UV_IMPORT_OFFER, offer)

    await step(pair.source, u.UV_EXPORT_CANCEL, 0)

    with pytest.raises(Refused, match="U_STATE"):
        await exchange(pair.source, u.UV_EXPORT_ANSWER, answer)


async def test_a_destination_that_gave_up_lets_the_source_run_it_again(pair: Pair) -> None:
    await exchange(pair.source, u.UV_EXPORT_READY, await pair.until_ready())
    word = await fetch(pair.destination, u.UV_IMPORT_ABANDON)

    assert await give(pair.source, u.UV_EXPORT_STATEMENT, word) == [0]
    assert pair.source.guest.names()[-1] == "SVM_THAW"
    assert pair.destination.partition.svm is None
    assert pair.destination.account.used_bytes == 0


async def test_a_destination_that_started_it_does_not_give_it_up(pair: Pair) -> None:
    token = await exchange(pair.source, u.UV_EXPORT_READY, await pair.until_ready())
    word = await exchange(pair.destination, u.UV_IMPORT_TOKEN, token)

    assert await fetch(pair.destination, u.UV_IMPORT_ABANDON) == word
    assert pair.destination.partition.secure


async def test_what_ends_at_the_destination_before_the_token_never_starts_there(pair: Pair) -> None:
    token = await exchange(pair.source, u.UV_EXPORT_READY, await pair.until_ready())
    await pair.destination.kvm.terminate()

    with pytest.raises(Refused, match="U_STATE"):
        await exchange(pair.destination, u.UV_IMPORT_TOKEN, token)
    word = await fetch(pair.destination, u.UV_IMPORT_ABANDON)
    assert await give(pair.source, u.UV_EXPORT_STATEMENT, word) == [0]


async def test_a_frozen_vm_has_no_page_taken_away(pair: Pair) -> None:
    await pair.shake_hands()
    await pair.end_round(u.UV_EXPORT_STOP)

    assert await pair.source.kvm.page_out(SECRET_GFN) == UCode.U_RETRY
    await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    assert await pair.source.kvm.page_out(SECRET_GFN) == UCode.U_SUCCESS


async def test_a_guest_that_does_not_stand_still_is_let_go_and_asked_again(pair: Pair) -> None:
    await pair.shake_hands()
    pair.source.guest.codes[m.SVM_FREEZE.number] = HCode.H_BUSY
    with pytest.raises(Refused, match="U_RETRY"):
        await pair.end_round(u.UV_EXPORT_STOP)

    pair.source.guest.codes.clear()
    await pair.end_round(u.UV_EXPORT_STOP)


async def test_a_guest_that_does_not_take_over_its_state_ends_the_arrival(pair: Pair) -> None:
    pair.destination.guest.codes[m.SVM_LOAD.number] = HCode.H_PARAMETER
    with pytest.raises(Refused, match="U_PERMISSION"):
        await pair.until_ready()

    await step(pair.destination, u.UV_IMPORT_ABANDON, 0)
    await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    assert pair.source.partition.secure
    assert pair.destination.account.used_bytes == 0


async def test_an_operator_carries_the_words_when_the_link_is_gone(pair: Pair, hosts: tuple[Host, Host]) -> None:
    await exchange(pair.source, u.UV_EXPORT_READY, await pair.until_ready())
    source = pair.queries(pair.source, hosts[0]).queries()
    destination = pair.queries(pair.destination, hosts[1]).queries()

    token = (await source["migration.word"]({"vm": "vm1", "as": "source"}))["word"]
    word = (await destination["migration.take"]({"vm": "vm1", "as": "destination", "word": token}))["word"]
    moved = await source["migration.take"]({"vm": "vm1", "as": "source", "word": word})

    assert moved == {"moved": True}
    assert pair.destination.partition.secure
    assert pair.source.partition.svm is None


async def test_a_word_about_a_token_that_was_never_given_moves_nothing(pair: Pair, hosts: tuple[Host, Host]) -> None:
    """S6: what a crash left of the source is its ledger, and that has no entry."""
    await pair.until_ready()
    word = await fetch(pair.destination, u.UV_IMPORT_ABANDON)
    pair.source.partition.migration = None
    source = pair.queries(pair.source, hosts[0]).queries()

    assert await source["migration.take"]({"vm": "vm1", "as": "source", "word": word.hex()}) == {"moved": False}


async def test_a_migration_is_not_cancelled_while_a_step_of_it_could_still_thaw_the_guest(
    pair: Pair, nursery: trio.Nursery
) -> None:
    """S6: left behind, the step would let the guest run when the next migration believes it frozen."""
    await pair.shake_hands()
    freeze = pair.source.guest.held[m.SVM_FREEZE.number] = trio.Event()
    nursery.start_soon(pair.end_round, u.UV_EXPORT_STOP)
    await trio.testing.wait_all_tasks_blocked()

    with pytest.raises(Refused, match="U_RETRY"):
        await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    with pytest.raises(Refused, match="U_STATE"):
        await fetch(pair.source, u.UV_EXPORT_OFFER)
    freeze.set()
    await trio.testing.wait_all_tasks_blocked()
    await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    assert pair.source.guest.names()[-1] == "SVM_THAW"


async def test_no_word_is_given_about_a_migration_that_begins(pair: Pair, hosts: tuple[Host, Host]) -> None:
    """S6: the session has its name from the answer on, and whoever knows it may ask."""
    offer = await fetch(pair.source, u.UV_EXPORT_OFFER)
    answer = await exchange(pair.destination, u.UV_IMPORT_OFFER, offer)
    await exchange(pair.source, u.UV_EXPORT_ANSWER, answer)
    departure = pair.source.partition.migration
    assert isinstance(departure, Departure)
    token = sign(hosts[0].identity, Word.TOKEN, departure.session_id).hex()
    destination = pair.queries(pair.destination, hosts[1]).queries()

    with pytest.raises(HostFault, match="open"):
        await destination["migration.take"]({"vm": "another", "as": "destination", "word": token})


async def test_a_guest_that_does_not_thaw_is_waited_for_while_the_source_hears_the_word(
    pair: Pair, nursery: trio.Nursery
) -> None:
    thaw = pair.destination.guest.held[m.SVM_THAW.number] = trio.Event()
    await pair.move()
    assert pair.source.partition.svm is None
    back = Pair(pair.destination, pair.source, pair.marks)
    await back.shake_hands()
    with pytest.raises(Refused, match="U_RETRY"):
        await back.end_round(u.UV_EXPORT_STOP)
    thaw.set()
    await trio.testing.wait_all_tasks_blocked()
    assert pair.destination.partition.secure
    await back.end_round(u.UV_EXPORT_STOP)


async def test_a_destination_that_has_nothing_of_the_vm_says_no_word(pair: Pair, hosts: tuple[Host, Host]) -> None:
    destination = pair.queries(pair.destination, hosts[1]).queries()

    assert await destination["migration.abandon"]({"vm": "vm1", "session": ""}) == {"word": None}
    assert await destination["migration.abandon"]({"vm": "gone", "session": ""}) == {"word": None}


async def test_a_vm_whose_token_may_have_been_stored_comes_back_by_the_word_of_a_destination_that_crashed(
    pair: Pair, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source cannot say that it never gave the token, and the destination has nothing left but its ledger."""
    ready = await pair.until_ready()
    tear(pair.source.ledger, monkeypatch)
    with pytest.raises(Refused, match="U_PERMISSION"):
        await exchange(pair.source, u.UV_EXPORT_READY, ready)
    with pytest.raises(Refused, match="U_STATE"):
        await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    pair.destination.partition.migration = None
    source = pair.queries(pair.source, hosts[0]).queries()
    destination = pair.queries(pair.destination, hosts[1]).queries()

    given = await source["migration.word"]({"vm": "vm1", "as": "source"})
    assert given["word"] is None
    assert "disk" in given["withheld"]
    back = await destination["migration.abandon"]({"vm": "vm1", "session": given["session"]})
    assert await source["migration.take"]({"vm": "vm1", "as": "source", "word": back["word"]}) == {"moved": False}

    assert pair.source.guest.names()[-1] == "SVM_THAW"
    await step(pair.source, u.UV_EXPORT_CANCEL, 0)


def earlier_migration(pair: Pair, hosts: tuple[Host, Host]) -> bytes:
    """One that both ledgers still have, whose token nobody answered; its session."""
    session = bytes(32)
    for rig, host, decision in (
        (pair.source, hosts[1], Decision.GIVEN),
        (pair.destination, hosts[0], Decision.STARTED),
    ):
        rig.ledger.record(Entry.of(session, "vm1", host.identity.public_key().public_bytes_raw(), decision))
    return session


async def test_s6_a_token_of_an_earlier_migration_says_nothing_about_this_one(
    pair: Pair, hosts: tuple[Host, Host]
) -> None:
    """Nobody closed that one at its source, and its destination had started the VM; this one never gets so far."""
    earlier = earlier_migration(pair, hosts)
    await pair.until_ready()
    await pair.source.kvm.terminate()
    source = pair.queries(pair.source, hosts[0]).queries()
    destination = pair.queries(pair.destination, hosts[1]).queries()

    given = await source["migration.word"]({"vm": "vm1", "as": "source"})
    assert given["word"] is None
    started = sign(hosts[1].identity, Word.STARTED, earlier).hex()
    with pytest.raises(HostFault, match="another migration of vm1"):
        await source["migration.take"]({"vm": "vm1", "as": "source", "word": started})
    back = await destination["migration.abandon"]({"vm": "vm1", "session": given["session"]})
    assert await source["migration.take"]({"vm": "vm1", "as": "source", "word": back["word"]}) == {"moved": False}


async def test_s6_a_source_that_crashed_gives_no_token_of_an_earlier_migration(
    pair: Pair, hosts: tuple[Host, Host]
) -> None:
    """All that it has left is its ledger, with a token that nobody answered before the VM came back."""
    earlier_migration(pair, hosts)
    await pair.until_ready()
    pair.source.partition.migration = None
    source = pair.queries(pair.source, hosts[0]).queries()
    destination = pair.queries(pair.destination, hosts[1]).queries()

    given = await source["migration.word"]({"vm": "vm1", "as": "source"})
    assert given["word"] is None
    back = await destination["migration.abandon"]({"vm": "vm1", "session": given["session"]})
    assert await source["migration.take"]({"vm": "vm1", "as": "source", "word": back["word"]}) == {"moved": False}
    assert pair.destination.partition.svm is None


async def test_a_migration_does_not_begin_while_an_earlier_token_cannot_be_closed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.source.ledger.record(Entry.of(bytes(32), "vm1", bytes(32), Decision.GIVEN))
    tear(pair.source.ledger, monkeypatch)

    with pytest.raises(Refused, match="U_PERMISSION"):
        await pair.shake_hands()
    assert pair.source.partition.migration is None


def tear(ledger: FileLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say from here on what it stored."""

    def torn(*_entry: Entry) -> None:
        raise LedgerTorn("the disk is full")

    monkeypatch.setattr(ledger, "record", torn)
    monkeypatch.setattr(ledger, "settle", torn)


async def test_a_source_takes_the_vm_back_once_its_ledger_says_that_the_token_was_not_given(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = await pair.until_ready()
    tear(pair.source.ledger, monkeypatch)
    with pytest.raises(Refused, match="U_PERMISSION"):
        await exchange(pair.source, u.UV_EXPORT_READY, ready)
    with pytest.raises(Refused, match="U_STATE"):
        await step(pair.source, u.UV_EXPORT_CANCEL, 0)

    monkeypatch.undo()
    await step(pair.source, u.UV_EXPORT_CANCEL, 0)

    assert pair.source.guest.names()[-1] == "SVM_THAW"


async def test_a_vm_that_ended_where_its_start_may_have_been_stored_is_given_up_once_the_ledger_can_be_read(
    pair: Pair, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await exchange(pair.source, u.UV_EXPORT_READY, await pair.until_ready())
    tear(pair.destination.ledger, monkeypatch)
    with pytest.raises(Refused, match="U_PERMISSION"):
        await exchange(pair.destination, u.UV_IMPORT_TOKEN, token)
    await pair.destination.kvm.terminate()
    destination = pair.queries(pair.destination, hosts[1]).queries()
    order = {"vm": "vm1", "as": "destination", "word": token.hex()}
    with pytest.raises(HostFault, match="may find the VM started"):
        await destination["migration.take"](order)

    monkeypatch.undo()
    word = bytes.fromhex((await destination["migration.take"](order))["word"])

    assert await give(pair.source, u.UV_EXPORT_STATEMENT, word) == [0]


async def test_s6_a_destination_does_not_give_up_by_its_ledger_what_it_could_start(
    pair: Pair, hosts: tuple[Host, Host]
) -> None:
    await pair.until_ready()
    arrival = pair.destination.partition.migration
    assert isinstance(arrival, Arrival)
    destination = pair.queries(pair.destination, hosts[1]).queries()

    with pytest.raises(HostFault, match="open"):
        await destination["migration.abandon"]({"vm": "another", "session": arrival.session_id.hex()})


# -- refused -----------------------------------------------------------------------------------------------------


async def test_a_vm_whose_blob_says_nothing_does_not_leave(
    nursery: trio.Nursery, key: RSAPrivateKey, hosts: tuple[Host, Host]
) -> None:
    with ultravisor_rig(nursery, key, host=hosts[0]) as source:
        await source.secure(played_image(key, KERNEL, {}))
        with pytest.raises(Refused, match="U_PERMISSION"):
            await fetch(source, u.UV_EXPORT_OFFER)
        assert "may not migrate" in source.audited("migration-refused")[0]["reason"]


@pytest.mark.parametrize("policy", [b"{", b'{"may_migrate": 1}', b'{"roots": ["zz"]}', b'{"more": true}'])
async def test_a_policy_that_cannot_be_read_lets_it_go_nowhere(
    nursery: trio.Nursery, key: RSAPrivateKey, hosts: tuple[Host, Host], policy: bytes
) -> None:
    with ultravisor_rig(nursery, key, host=hosts[0]) as source:
        await source.secure(played_image(key, KERNEL, {POLICY_FILE: policy}))
        with pytest.raises(Refused, match="U_PERMISSION"):
            await fetch(source, u.UV_EXPORT_OFFER)


async def test_a_destination_without_room_refuses_the_offer(
    pair: Pair, nursery: trio.Nursery, key: RSAPrivateKey, hosts: tuple[Host, Host]
) -> None:
    offer = await fetch(pair.source, u.UV_EXPORT_OFFER)
    with ultravisor_rig(nursery, key, MEMORY_BYTES - 1, hosts[1]) as small:
        with pytest.raises(Refused, match="U_PERMISSION"):
            await exchange(small, u.UV_IMPORT_OFFER, offer)
        assert "secure memory" in small.audited("migration-refused")[0]["reason"]


async def test_a_host_without_an_identity_takes_part_in_nothing(
    nursery: trio.Nursery, key: RSAPrivateKey, image: PlayedImage
) -> None:
    with ultravisor_rig(nursery, key) as rig:
        await rig.secure(image)
        with pytest.raises(Refused, match="U_PERMISSION"):
            await fetch(rig, u.UV_EXPORT_OFFER)


async def test_a_second_migration_waits_for_the_first_to_end(pair: Pair) -> None:
    await pair.shake_hands()
    with pytest.raises(Refused, match="U_STATE"):
        await fetch(pair.source, u.UV_EXPORT_OFFER)


# -- hostile kvm and qemu (S5, S7) -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", list(u.MIGRATION_UCALLS.values()), ids=lambda call: call.name)
async def test_a_step_out_of_turn_or_with_a_bad_place_is_a_code(
    nursery: trio.Nursery, key: RSAPrivateKey, hosts: tuple[Host, Host], image: PlayedImage, call: Call
) -> None:
    codes = set()
    with ultravisor_rig(nursery, key, host=hosts[0]) as rig:
        await rig.secure(image)
        for more in ([], [0], [0, 0], [STREAM_BUFFER_BYTES, 1], [0, 1 << 40]):
            codes.add(UCode((await rig.kvm.deliver(call, [LPID, *more]))[0]))
        codes.add(UCode((await rig.kvm.deliver(call, [LPID + 1, 0, 0]))[0]))
        assert rig.partition.secure
    assert UCode.U_PARAMETER in codes


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("how", ["dropped", "repeated", "altered", "of other content"])
async def test_a_record_that_was_tampered_with_ends_the_arrival_and_the_source_runs_on(
    pair: Pair, which: int, how: str
) -> None:
    """S3."""

    def carry(record: bytes) -> bytes | None:
        if len(pair.carried) - 1 != which:
            return record
        if how == "dropped":
            return None
        if how == "repeated":
            return pair.carried[max(0, which - 1)] if which else record[:-1]
        return record[:-1] + bytes([record[-1] ^ 1]) if how == "altered" else os.urandom(len(record))

    pair.carry = carry
    with pytest.raises(Refused, match=r"U_PERMISSION|U_STATE"):
        await pair.until_ready()
    await step(pair.destination, u.UV_IMPORT_ABANDON, 0)
    await step(pair.source, u.UV_EXPORT_CANCEL, 0)

    assert pair.destination.account.used_bytes == 0
    assert pair.destination.partition.svm is None
    assert pair.source.partition.secure
    assert not await pair.source.share(SHARED_GFN - 1)


async def test_ready_of_somebody_else_gets_no_token_and_the_source_can_still_take_it_back(pair: Pair) -> None:
    await pair.until_ready()
    with pytest.raises(Refused, match="U_PERMISSION"):
        await give(pair.source, u.UV_EXPORT_READY, os.urandom(100))

    await step(pair.source, u.UV_EXPORT_CANCEL, 0)
    assert pair.source.guest.names()[-1] == "SVM_THAW"


async def test_a_page_that_is_in_transition_is_waited_for(pair: Pair) -> None:
    await pair.shake_hands()
    await pair.pages()
    await pair.end_round(u.UV_EXPORT_STOP)
    svm = pair.source.partition.svm
    assert svm is not None
    svm.apply(SECRET_GFN, PageEvent.OUT_BEGIN)
    with pytest.raises(Refused, match="U_RETRY"):
        await step(pair.source, u.UV_EXPORT_STATE, 0)
    svm.apply(SECRET_GFN, PageEvent.OUT_FAILED)
    assert await pair.state()


async def test_more_pages_than_a_record_holds_take_several(pair: Pair) -> None:
    for gfn in range(N_PAGES // 2):
        pair.source.page(gfn)[: PAGE_BYTES // 2] = os.urandom(PAGE_BYTES // 2)
    await pair.shake_hands()
    await pair.pages()

    assert len(pair.carried) > 2
    await pair.end_round(u.UV_EXPORT_STOP)
    assert await pair.state()


async def test_a_page_that_is_touched_first_while_pages_go_is_sent_again(pair: Pair) -> None:
    """S3: what was untouched when the round began is sent as zeros, whatever it holds by then."""
    untouched = SECRET_GFN + 1
    assert pair.source.state(untouched) == "SECURE"
    await pair.shake_hands()
    pair.source.page(untouched)[:5] = b"later"
    pair.marks.buffer[untouched] = 1
    await pair.pages()
    assert (await pair.end_round(u.UV_EXPORT_STOP))[0] == 1
    await pair.pages()
    await pair.state()
    await fetch(pair.destination, u.UV_IMPORT_READY)

    assert bytes(pair.destination.page(untouched)[:5]) == b"later"
