"""A migration under real keys: it arrives whole, and whoever holds the stream can only end it (S1, S3, S6)."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import HostFault
from services.ultravisor.migration.exporter import ExportPhase
from services.ultravisor.migration.importer import ImportPhase
from services.ultravisor.migration.ledger import Decision, Entry, FileLedger, LedgerTorn
from services.ultravisor.migration.payloads import MAX_STATE_BYTES, pages_of
from services.ultravisor.migration.records import HEADER, MAX_SEALED_BYTES
from services.ultravisor.migration.recovery import word_of_destination, word_of_source
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.statements import Word, check, sign
from services.ultravisor.page_state import GfnState
from shared.page_batch import MAX_PAGES, Page, encode_pages
from tests.unit.migration_pair import N_PAGES, PAGE_BYTES, STATE, STATES, Pair, make_host

N_CASES = 10_000 if os.environ.get("PEFBOX_MODEL") == "full" else 500
FLAWS = {Reason.NOT_NEXT, Reason.NOT_GENUINE, Reason.MALFORMED}


def arrive(pair: Pair) -> None:
    for record in pair.export_all():
        pair.importer.take(record)


def test_everything_arrives_and_one_side_runs_at_each_step() -> None:
    pair = Pair()
    exporter, importer = pair.exporter, pair.importer
    arrive(pair)

    assert not exporter.guest_may_run and not importer.guest_may_run
    assert importer.state == STATE and importer.states == STATES
    token = exporter.take_ready(importer.ready())
    assert not exporter.guest_may_run and not importer.guest_may_run
    word = importer.take_token(token)
    assert importer.guest_may_run
    exporter.take_statement(word)

    assert exporter.phase is ExportPhase.MOVED
    private = 6 * PAGE_BYTES
    assert pair.frames.raw[:private] == pair.memory.raw[:private]
    assert not any(pair.frames.raw[private:])
    assert [entry.decision for entry in pair.book_s.entries.values()] == [Decision.CLOSED]
    assert [entry.decision for entry in pair.book_d.entries.values()] == [Decision.STARTED]


def test_no_page_and_no_state_is_in_the_stream_in_plain() -> None:
    pair = Pair()
    stream = b"".join(pair.export_all())
    secrets = [bytes(pair.memory.read(gfn)) for gfn in range(N_PAGES) if gfn != 3] + [STATE]

    assert not any(secret[at : at + 16] in stream for secret in secrets for at in range(0, len(secret), 16))


def test_nothing_is_exported_in_a_phase_that_does_not_know_it() -> None:
    pair = Pair()
    exporter = pair.exporter
    with pytest.raises(MigrationRefused, match="not at that step"):
        exporter.finish(STATES)
    exporter.stop()
    with pytest.raises(MigrationRefused, match="newest version: gfn 0x0"):
        exporter.finish(STATES)
    with pytest.raises(MigrationRefused, match="page states"):
        exporter.finish(bytes([GfnState.HV_SHARING] * N_PAGES))
    with pytest.raises(MigrationRefused, match="bytes of state"):
        exporter.state(bytes(MAX_STATE_BYTES + 1))
    exporter.cancel()
    assert exporter.guest_may_run
    for step in (exporter.stop, exporter.end_epoch, exporter.token, lambda: exporter.pages([0])):
        with pytest.raises(MigrationRefused, match="not at that step: returned"):
            step()


def test_more_than_a_record_holds_is_refused_where_it_is_made() -> None:
    exporter = Pair().exporter
    too_many = MAX_SEALED_BYTES // PAGE_BYTES + 1

    for gfns in ([1] * too_many, [N_PAGES], [0] * (MAX_PAGES + 1)):
        with pytest.raises(MigrationRefused, match="for one record"):
            exporter.pages(gfns)
    assert exporter.owed == frozenset(range(N_PAGES))


def test_a_source_that_gave_the_token_cannot_take_the_vm_back_by_itself() -> None:
    pair = Pair()
    arrive(pair)
    token = pair.exporter.take_ready(pair.importer.ready())

    with pytest.raises(MigrationRefused) as caught:
        pair.exporter.cancel()

    assert caught.value.reason is Reason.TOKEN_GIVEN
    assert not pair.exporter.guest_may_run
    word = pair.importer.abandon()
    with pytest.raises(MigrationRefused):
        pair.importer.take_token(token)
    pair.exporter.take_statement(word)
    assert pair.exporter.guest_may_run
    assert not any(pair.frames.raw)


def test_a_page_that_is_missing_ends_the_import() -> None:
    """Nothing is dropped on the way: the source believes that it sent a page which it did not."""
    pair = Pair()
    exporter = pair.exporter
    pair.importer.take(exporter.pages(range(1, N_PAGES)))
    exporter._owed.clear()
    exporter.stop()

    with pytest.raises(MigrationRefused, match="gfn 0x0 never came"):
        pair.importer.take(exporter.finish(STATES))

    assert pair.importer.phase is ImportPhase.ABANDONED
    assert not any(pair.frames.raw)


Tamper = Callable[[random.Random, list[bytes], list[bytes]], None]


def _drop(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    del stream[rng.randrange(len(stream))]


def _repeat(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    record = rng.choice(stream)
    stream.insert(rng.randrange(len(stream) + 1), record)


def _reorder(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    first, second = rng.sample(range(len(stream)), 2)
    stream[first], stream[second] = stream[second], stream[first]


def _alter(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    index = rng.randrange(len(stream))
    record = bytearray(stream[index])
    record[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
    stream[index] = bytes(record)


def _cut_short(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    index = rng.randrange(len(stream))
    stream[index] = stream[index][: rng.randrange(len(stream[index]))]


def _swap_between_vms(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    index = rng.randrange(len(stream))
    stream[index] = other[index]


def _renumber(rng: random.Random, stream: list[bytes], other: list[bytes]) -> None:
    """An old record with the number of the one that is due."""
    old, due = sorted(rng.sample(range(len(stream)), 2))
    kind, epoch, _, n_bytes = HEADER.unpack_from(stream[old])
    stream[due] = HEADER.pack(kind, epoch, due, n_bytes) + stream[old][HEADER.size :]


TAMPERS: list[Tamper] = [_drop, _repeat, _reorder, _alter, _cut_short, _swap_between_vms, _renumber]


def test_a_man_in_the_middle_can_only_end_the_migration() -> None:
    """Whatever was done to the stream, the import is refused before it could start, and the source resumes."""
    rng = random.Random(7)
    alpha, beta = make_host("alpha"), make_host("beta")
    outcomes: Counter[tuple[str, Reason | None]] = Counter()
    for case in range(N_CASES):
        pair, other = Pair("vm1", alpha, beta), Pair("vm2", alpha, beta)
        stream, foreign = pair.export_all(), other.export_all()
        tamper = TAMPERS[case % len(TAMPERS)]
        tamper(rng, stream, foreign)
        outcomes[tamper.__name__, feed(pair, stream)] += 1
        assert not pair.importer.guest_may_run
        pair.exporter.cancel()
        assert pair.exporter.guest_may_run
        pair.importer.abandon()
        assert not any(pair.frames.raw)

    assert sum(outcomes.values()) == N_CASES
    assert {reason for _, reason in outcomes} <= {None, Reason.WRONG_PHASE, *FLAWS}
    assert {name for name, reason in outcomes if reason is Reason.WRONG_PHASE} <= {"_repeat"}
    # With its end dropped a stream is one that has not ended yet.
    assert {name for name, reason in outcomes if reason is None} <= {"_drop"}


def feed(pair: Pair, stream: list[bytes]) -> Reason | None:
    """Why the first record that did not pass was refused; None when the import still waits."""
    for record in stream:
        complete = pair.importer.phase is ImportPhase.CHECKED
        try:
            pair.importer.take(record)
        except MigrationRefused as refused:
            # What comes behind a whole migration changes nothing of it.
            assert pair.importer.phase is (ImportPhase.CHECKED if complete else ImportPhase.ABANDONED)
            assert not complete or pair.frames.raw[: 6 * PAGE_BYTES] == pair.memory.raw[: 6 * PAGE_BYTES]
            return refused.reason
    assert pair.importer.phase is ImportPhase.RECEIVING, "a stream that was tampered with was believed"
    return None


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), max_size=20), st.binary(max_size=40))
def test_a_record_of_pages_is_what_was_encoded_or_is_refused(entries: list[tuple[int, bool]], tail: bytes) -> None:
    pages = [Page(gfn, os.urandom(PAGE_BYTES) if filled else b"") for gfn, filled in entries]
    payload = b"".join(encode_pages(pages))

    assert [(page.gfn, bytes(page.content)) for page in pages_of(payload, PAGE_BYTES)] == [
        (page.gfn, page.content) for page in pages
    ]
    if tail:
        with pytest.raises(MigrationRefused, match="malformed"):
            list(pages_of(payload + tail, PAGE_BYTES))
    with pytest.raises(MigrationRefused, match="malformed"):
        list(pages_of(payload[:-1], PAGE_BYTES))


def test_a_statement_holds_for_one_migration_and_one_signer() -> None:
    pair = Pair()
    identity, public = pair.destination.identity, pair.destination.certificate.identity
    raw = sign(identity, Word.STARTED, bytes(32))

    assert check(raw, bytes(32), public) is Word.STARTED
    for session_id, peer in ((b"\1" * 32, public), (bytes(32), pair.source.certificate.identity)):
        with pytest.raises(MigrationRefused):
            check(raw, session_id, peer)
    for changed in (raw.replace(b"started", b"abandon"), raw[:-1], raw + b"x" * 300, b""):
        with pytest.raises(MigrationRefused):
            check(changed, bytes(32), public)


def test_after_a_crash_each_side_says_what_its_ledger_knows() -> None:
    pair = Pair()
    arrive(pair)
    token = pair.exporter.take_ready(pair.importer.ready())
    session_id = bytes.fromhex(next(iter(pair.book_s.entries)))
    peer = pair.source.certificate.identity

    again = word_of_source(pair.book_s, pair.source.identity, session_id)
    assert again is not None and check(again, session_id, peer) is Word.TOKEN
    assert word_of_source(pair.book_s, pair.source.identity, bytes(32)) is None
    word = word_of_destination(pair.book_d, pair.destination.identity, session_id, ())
    assert check(word, session_id, pair.destination.certificate.identity) is Word.ABANDONED
    pair.importer.take_token(token)
    word = word_of_destination(pair.book_d, pair.destination.identity, session_id, ())
    pair.exporter.take_statement(word)
    assert pair.exporter.phase is ExportPhase.MOVED
    assert word_of_source(pair.book_s, pair.source.identity, session_id) is None


def open_ledger(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


def test_a_ledger_remembers_its_newest_decisions_and_drops_a_torn_line(tmp_path: Path) -> None:
    fd = open_ledger(tmp_path / "ledger")
    ledger = FileLedger(fd)
    one, two = (Entry.of(bytes([n]) * 32, f"vm{n}", bytes(32), Decision.GIVEN) for n in (1, 2))
    ledger.record(one)
    ledger.record(two)
    ledger.record(Entry(one.session, one.vm, one.peer, Decision.CLOSED))
    os.write(fd, b'{"session": "torn')

    again = FileLedger(open_ledger(tmp_path / "ledger"))

    assert again.open_entries() == [two]
    again.record(Entry.of(b"\3" * 32, "vm3", bytes(32), Decision.STARTED))
    third = FileLedger(open_ledger(tmp_path / "ledger")).newest(b"\3" * 32)
    assert third is not None and third.decision is Decision.STARTED


def test_a_damaged_ledger_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_bytes(b"noise\n")

    with pytest.raises(HostFault, match="damaged"):
        FileLedger(open_ledger(tmp_path / "ledger"))


def test_a_decision_that_cannot_be_stored_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = FileLedger(open_ledger(tmp_path / "ledger"))
    pair = Pair()
    arrive(pair)
    pair.exporter._ledger = ledger
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: os.pwrite(fd, data[:5], 0))
        with pytest.raises(MigrationRefused) as caught:
            pair.exporter.take_ready(pair.importer.ready())

    assert caught.value.reason is Reason.NOT_STORED
    assert (tmp_path / "ledger").read_bytes() == b""
    pair.exporter.cancel()
    assert pair.exporter.guest_may_run


def test_a_decision_that_may_have_been_stored_binds_the_source(tmp_path: Path) -> None:
    fd = open_ledger(tmp_path / "ledger")
    ledger = FileLedger(fd)
    pair = Pair()
    arrive(pair)
    pair.exporter._ledger = ledger
    # Neither written nor cut back.
    os.dup2(os.open("/dev/full", os.O_RDWR), fd)

    with pytest.raises(MigrationRefused, match="cannot be stored"):
        pair.exporter.take_ready(pair.importer.ready())

    assert not pair.exporter.guest_may_run
    with pytest.raises(MigrationRefused, match="start token was given"):
        pair.exporter.cancel()
    pair.exporter.take_statement(pair.importer.abandon())
    assert pair.exporter.guest_may_run


def test_a_start_that_cannot_be_stored_waits(tmp_path: Path) -> None:
    pair = Pair()
    arrive(pair)
    token = pair.exporter.take_ready(pair.importer.ready())
    fd = open_ledger(tmp_path / "ledger")
    pair.importer._ledger = FileLedger(fd)
    kept = os.dup(fd)
    os.dup2(os.open("/dev/full", os.O_RDWR), fd)
    with pytest.raises(MigrationRefused, match="cannot be stored"):
        pair.importer.take_token(token)
    assert not pair.importer.guest_may_run
    os.dup2(kept, fd)

    pair.importer.take_token(token)

    assert pair.importer.guest_may_run


def test_a_torn_ledger_keeps_what_is_stored_behind_the_tear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    ledger = FileLedger(open_ledger(path))
    one, two, three = (Entry.of(bytes([n]) * 32, f"vm{n}", bytes(32), Decision.STARTED) for n in (1, 2, 3))

    def refuse(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(LedgerTorn):
            ledger.record(one)
    ledger.record(two)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: os.pwrite(fd, data[:5], 0))
        with pytest.raises(HostFault):
            ledger.record(three)

    again = FileLedger(open_ledger(path))
    assert again.newest(b"\2" * 32) == two
    assert again.newest(b"\3" * 32) is None


def test_a_start_that_may_have_been_stored_is_not_abandoned(tmp_path: Path) -> None:
    pair = Pair()
    arrive(pair)
    token = pair.exporter.take_ready(pair.importer.ready())
    fd = open_ledger(tmp_path / "ledger")
    pair.importer._ledger = FileLedger(fd)
    kept = os.dup(fd)
    os.dup2(os.open("/dev/full", os.O_RDWR), fd)
    with pytest.raises(MigrationRefused):
        pair.importer.take_token(token)
    with pytest.raises(MigrationRefused, match="may find the VM started"):
        pair.importer.abandon()
    os.dup2(kept, fd)

    pair.importer.take_token(token)

    assert pair.importer.guest_may_run


def test_s3_a_frame_that_cannot_be_written_ends_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    record = pair.exporter.pages([0])

    def refuse(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(pair.frames, "write", refuse)
    with pytest.raises(OSError, match="no memory"):
        pair.importer.take(record)

    assert pair.importer.phase is ImportPhase.ABANDONED


def test_s6_an_open_import_is_not_abandoned_behind_its_back() -> None:
    pair = Pair()
    with pytest.raises(MigrationRefused, match="an import of it is open"):
        word_of_destination(pair.book_d, pair.destination.identity, bytes(32), {bytes(32)})


def test_a_word_that_is_repeated_is_stored_once() -> None:
    pair = Pair()
    arrive(pair)
    word = pair.importer.take_token(pair.exporter.take_ready(pair.importer.ready()))
    pair.exporter.take_statement(word)
    pair.book_s.entries.clear()

    pair.exporter.take_statement(word)

    assert not pair.book_s.entries


def test_reasons_are_whole_sentences_for_the_operator() -> None:
    assert all(re.match(r"^[a-z].*[a-z]$", reason.value) for reason in Reason)
