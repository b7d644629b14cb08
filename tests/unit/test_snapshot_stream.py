"""A snapshot under real keys, in the hands of its host: it comes back whole and once, or not at all (S1, S3, S6)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule

from protocol.errors import HostFault
from services.ultravisor.migration.exporter import ExportPhase
from services.ultravisor.migration.handshake import Host
from services.ultravisor.migration.importer import ImportPhase
from services.ultravisor.migration.ledger import Decision, Entry, FileLedger
from services.ultravisor.migration.records import ends_at_destination, ends_at_source
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.snapshot.book import check_restorable, vm_begins
from services.ultravisor.snapshot.head import new_head, read_head, session_to_restore, session_to_save, snapshot_id
from services.ultravisor.snapshot.sides import SnapshotExporter, SnapshotImporter
from tests.unit.migration_pair import N_PAGES, STATE, STATES, SUBJECT, Frames, make_host

HOST = make_host("alpha")
INCARNATION = 4


@dataclass
class Snapshot:
    """What the host holds of it; `memory` is what was saved."""

    head: bytes
    records: list[bytes]
    memory: bytes
    exporter: SnapshotExporter


def take(ledger: FileLedger, frames: Frames, host: Host = HOST) -> Snapshot:
    """A snapshot but for its commit."""
    head = new_head(host, SUBJECT, INCARNATION, debuggable=False)
    session = session_to_save(head, host)
    exporter = SnapshotExporter(session, host.identity, ledger, *ends_at_source(session), frames.read)
    exporter.stop()
    records = [exporter.end_epoch(), exporter.pages(range(5)), exporter.pages(range(5, N_PAGES))]
    records += [*exporter.state(STATE), exporter.finish(STATES)]
    return Snapshot(head, records, bytes(frames.raw), exporter)


def importer_of(head: bytes, ledger: FileLedger, frames: Frames, host: Host = HOST) -> SnapshotImporter:
    session = session_to_restore(head, host)
    return SnapshotImporter(session, host.identity, ledger, *ends_at_destination(session), frames)


def filled() -> Frames:
    frames = Frames()
    frames.raw[:] = os.urandom(len(frames.raw))
    return frames


def new_ledger() -> FileLedger:
    # Closed with the process: a test makes some hundreds of them at most.
    return FileLedger(os.memfd_create("ledger", os.MFD_CLOEXEC))


@pytest.fixture
def ledger() -> Iterator[FileLedger]:
    fd = os.memfd_create("ledger", os.MFD_CLOEXEC)
    yield FileLedger(fd)
    os.close(fd)


LEDGER = new_ledger()
MEMORY = filled()
ONE, OTHER = take(LEDGER, MEMORY), take(LEDGER, MEMORY)
"""Two of the same VM with the same content."""


def test_it_comes_back_whole(ledger: FileLedger) -> None:
    snapshot, frames = take(ledger, MEMORY), Frames()
    snapshot.exporter.commit()
    importer = importer_of(snapshot.head, ledger, frames)
    for record in snapshot.records:
        importer.take(record)
    assert importer.state == STATE and importer.states == STATES
    importer.ready()
    assert not importer.guest_may_run
    importer.start(ledger)

    assert importer.guest_may_run
    assert snapshot.exporter.phase is ExportPhase.MOVED and not snapshot.exporter.guest_may_run
    private = 6 * Frames.page_bytes
    assert bytes(frames.raw[:private]) == snapshot.memory[:private]
    assert not any(frames.raw[private:])


def test_s1_no_page_and_no_state_is_in_it_in_plain() -> None:
    stream = ONE.head + b"".join(ONE.records)
    secrets = [bytes(MEMORY.read(gfn)) for gfn in range(N_PAGES)] + [STATE]

    assert not any(secret[at : at + 16] in stream for secret in secrets for at in range(0, len(secret), 16))


def test_two_snapshots_of_the_same_memory_have_nothing_in_common() -> None:
    assert snapshot_id(ONE.head) != snapshot_id(OTHER.head)
    assert all(one[20:] != other[20:] for one, other in zip(ONE.records, OTHER.records, strict=True))


@st.composite
def tampered(draw: st.DrawFn) -> list[bytes]:
    """Records of ONE as its host could give them back."""
    records = list(ONE.records)
    index = draw(st.integers(0, len(records) - 1))
    match draw(st.sampled_from(["flip", "drop", "swap", "repeat", "cut", "longer", "other", "end"])):
        case "flip":
            record = bytearray(records[index])
            record[draw(st.integers(0, len(record) - 1))] ^= 1 << draw(st.integers(0, 7))
            records[index] = bytes(record)
        case "drop":
            del records[index]
        case "swap":
            other = draw(st.integers(0, len(records) - 1).filter(lambda other: other != index))
            records[index], records[other] = records[other], records[index]
        case "repeat":
            records.insert(index, records[index])
        case "cut":
            records[index] = records[index][: draw(st.integers(0, len(records[index]) - 1))]
        case "longer":
            records[index] += draw(st.binary(min_size=1, max_size=20))
        case "other":
            records[index] = OTHER.records[index]
        case _:
            del records[index:]
    return records


@given(tampered())
def test_s3_whatever_its_host_does_to_the_records_nothing_of_it_runs(records: list[bytes]) -> None:
    frames = Frames()
    importer = importer_of(ONE.head, LEDGER, frames)
    with pytest.raises(MigrationRefused) as refused:
        for record in records:
            importer.take(record)
        importer.ready()

    flaws = {Reason.NOT_NEXT, Reason.NOT_GENUINE, Reason.MALFORMED, Reason.WRONG_PHASE}
    assert refused.value.reason in flaws
    assert not importer.guest_may_run
    importer.abandon()
    assert not any(frames.raw)


@given(at=st.integers(0, len(ONE.head) - 1), bit=st.integers(0, 7))
def test_s3_under_an_altered_head_no_record_opens(at: int, bit: int) -> None:
    head = bytearray(ONE.head)
    head[at] ^= 1 << bit
    with pytest.raises(MigrationRefused):
        importer_of(bytes(head), LEDGER, Frames()).take(ONE.records[0])


def test_s6_another_host_opens_nothing_even_under_its_own_head() -> None:
    beta = make_host("beta")
    with pytest.raises(MigrationRefused, match="another ultravisor"):
        read_head(ONE.head, beta)
    claimed = msgspec.structs.replace(read_head(ONE.head, HOST), identity=beta.certificate.identity)
    with pytest.raises(MigrationRefused, match="altered"):
        importer_of(msgspec.msgpack.encode(claimed), LEDGER, Frames(), beta).take(ONE.records[0])


def test_s3_with_two_that_are_open_only_the_newest_is_restored(ledger: FileLedger) -> None:
    """No order of events leads here; the rule holds by itself."""
    peer = HOST.certificate.identity
    for name in (b"old", b"new"):
        ledger.record(Entry.of(name, "vm1", peer, Decision.SAVED))
    with pytest.raises(MigrationRefused, match="newer snapshot"):
        check_restorable(ledger, b"old", "vm1")
    check_restorable(ledger, b"new", "vm1")
    with pytest.raises(MigrationRefused, match="not completed"):
        check_restorable(ledger, b"new", "vm2")


def test_s6_a_snapshot_that_may_have_been_stored_is_void_when_the_vm_begins(
    ledger: FileLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, *_: object) -> None:
        raise OSError(28, "No space left on device")

    snapshot = take(ledger, MEMORY)
    with monkeypatch.context() as disk:
        # The line is written; that it is on stable storage nobody says, and it cannot be taken back.
        disk.setattr(os, "fsync", full)
        disk.setattr(os, "ftruncate", full)
        with pytest.raises(MigrationRefused, match="cannot be stored"):
            snapshot.exporter.commit()
        assert not snapshot.exporter.guest_may_run
        with pytest.raises(HostFault):
            vm_begins(ledger, SUBJECT.vm)
    assert vm_begins(ledger, SUBJECT.vm) == 1
    with pytest.raises(MigrationRefused, match="started again"):
        check_restorable(ledger, snapshot_id(snapshot.head), SUBJECT.vm)


class Host1(RuleBasedStateMachine):
    """A host that saves, restores, boots and keeps every snapshot: what runs is always the newest state (S3, S6)."""

    snapshots: Bundle[tuple[int, Snapshot]] = Bundle("snapshots")

    @initialize()
    def begin(self) -> None:
        self.fd = os.memfd_create("ledger", os.MFD_CLOEXEC)
        self.ledger = FileLedger(self.fd)
        self.runs = True
        self.newest = 0
        """Counts what the VM did; a snapshot is of one count."""
        self.saved: int | None = None
        """The only count that may come back."""

    def teardown(self) -> None:
        os.close(self.fd)

    @rule()
    def work(self) -> None:
        if self.runs:
            self.newest += 1

    @rule(target=snapshots, commits=st.booleans())
    def save(self, commits: bool) -> tuple[int, Snapshot]:
        snapshot = take(self.ledger, MEMORY)
        if not self.runs:
            # A snapshot that its host made up: nobody committed it.
            return self.newest, snapshot
        if commits:
            snapshot.exporter.commit()
            self.runs, self.saved = False, self.newest
        else:
            snapshot.exporter.cancel()
        return self.newest, snapshot

    @rule()
    def boot(self) -> None:
        if not self.runs:
            vm_begins(self.ledger, SUBJECT.vm)
            self.runs, self.saved = True, None
            self.newest += 1

    @rule()
    def crash(self) -> None:
        self.runs = False
        self.ledger = FileLedger(self.fd)

    @rule(of=snapshots)
    def restore(self, of: tuple[int, Snapshot]) -> None:
        count, snapshot = of
        importer = importer_of(snapshot.head, self.ledger, Frames())
        for record in snapshot.records:
            importer.take(record)
        importer.ready()
        committed = snapshot.exporter.phase is ExportPhase.MOVED
        if self.runs or self.saved is None or count != self.saved or not committed:
            with pytest.raises(MigrationRefused):
                importer.start(self.ledger)
            assert importer.phase is ImportPhase.READY
            return
        importer.start(self.ledger)
        self.runs, self.saved = True, None
        self.newest += 1

    @rule(of=consumes(snapshots))
    def lose(self, of: tuple[int, Snapshot]) -> None:
        """A file is deleted; nothing follows."""


TestHost = Host1.TestCase
