"""A real secure VM between two ultravisors: taken apart, sent, put together (S1, S3)."""

from __future__ import annotations

import os

import msgspec
import pytest

from protocol.codes import UCode
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from services.ultravisor import page_calls
from services.ultravisor.esm_files import EsmFiles, EsmFilesState, EsmFileState
from services.ultravisor.migration.exporter import Exporter
from services.ultravisor.migration.importer import Importer, ImportPhase
from services.ultravisor.migration.records import ends_at_destination, ends_at_source
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.migration.svm_parts import SvmFrames, SvmRest, put_together, states_to_send
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_state import GfnState, PageEvent
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.svm import Slot, Svm, SvmPhase
from shared.partition_map import MapKind, kind_of
from shared.real_address import real_address
from tests.unit.migration_pair import SUBJECT, MemoryLedger, make_host, shake_hands

N_PAGES = 8
SIZE_BYTES = N_PAGES * PAGE_BYTES
LPID = SUBJECT.lpid
SHARED, IMPLICIT, PSEUDO, OUT = 3, 4, 5, 6


class Side:
    """One ultravisor's VM of 8 pages."""

    def __init__(self, incarnation: int, account_bytes: int = SIZE_BYTES) -> None:
        fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE_BYTES)
        self.account = SecureAccount(account_bytes)
        self.svm = Svm("vm1", LPID, incarnation, NormalRam(fd, SIZE_BYTES), self.account)

    def close(self) -> None:
        self.svm.release()
        self.svm.ram.close()


def running_source() -> Side:
    """Secure, with content in every page, and a page of each kind."""
    side = Side(1)
    svm = side.svm
    page_calls.register_slot(svm, 0, SIZE_BYTES, 0, 7)
    svm.phase = SvmPhase.SECURE
    for gfn in range(N_PAGES):
        svm.secure_page(gfn)[:] = os.urandom(PAGE_BYTES)
    for event in (PageEvent.SHARE, PageEvent.HV_PAGE_IN, PageEvent.SHARE_DONE):
        svm.apply(SHARED, event)
    svm.apply(IMPLICIT, PageEvent.MAKE_IMPLICIT)
    svm.apply(PSEUDO, PageEvent.MAKE_PSEUDO)
    svm.apply(OUT, PageEvent.OUT_BEGIN)
    svm.seal_out(OUT)
    svm.apply(OUT, PageEvent.OUT_DONE)
    return side


def rest_of(svm: Svm) -> SvmRest:
    files = EsmFilesState(b"k" * 32, {"secret": EsmFileState(b"i" * 12, b"m" * 16, b"c" * 100, 4, 64)})
    return SvmRest(list(svm.slots.values()), [IMPLICIT], EsmFiles(files).save(), b"registers" * 100)


def move(source: Side, destination: Side) -> SvmRest:
    """As far as the destination may start; what came that is no page."""
    alpha, beta = make_host("alpha"), make_host("beta")
    at_source, at_destination = shake_hands(alpha, beta)
    sealer, opener = ends_at_source(at_source)
    exporter = Exporter(at_source, alpha.identity, MemoryLedger(), sealer, opener, source.svm.secure_page)
    sealer, opener = ends_at_destination(at_destination)
    frames = SvmFrames(destination.svm)
    importer = Importer(at_destination, beta.identity, MemoryLedger(), sealer, opener, frames)
    importer.take(exporter.pages(range(N_PAGES)))
    exporter.stop()
    for record in exporter.state(rest_of(source.svm).encode()):
        importer.take(record)
    importer.take(exporter.finish(states_to_send(source.svm)))
    assert importer.phase is ImportPhase.CHECKED
    rest = SvmRest.decode(importer.state)
    put_together(destination.svm, importer.states, rest)
    return rest


def test_a_secure_vm_arrives_with_its_pages_states_slots_and_files() -> None:
    source, destination = running_source(), Side(2)
    rest = move(source, destination)
    svm = destination.svm

    assert [svm.states[gfn] for gfn in range(N_PAGES)] == [
        *[GfnState.SECURE] * 3,
        GfnState.SHARED_INV,
        GfnState.SHARED_IMPLICIT_INV,
        GfnState.PSEUDO_SHARED_INV,
        GfnState.SECURE,
        GfnState.SECURE,
    ]
    for gfn in range(N_PAGES):
        private = gfn not in (SHARED, IMPLICIT)
        assert bytes(svm.secure_page(gfn)) == (bytes(source.svm.secure_page(gfn)) if private else bytes(PAGE_BYTES))
        assert kind_of(svm.map.words[gfn]) == (MapKind.SECURE if private else MapKind.ABSENT)
    assert rest == rest_of(source.svm)
    assert svm.slots == source.svm.slots
    assert svm.states.counts[GfnState.SECURE] == 5
    assert destination.account.used_bytes == SIZE_BYTES
    destination.close()
    assert destination.account.used_bytes == 0
    source.close()


def test_a_shared_page_is_the_hosts_again_when_it_gives_its_frame() -> None:
    source, destination = running_source(), Side(2)
    move(source, destination)
    destination.svm.phase = SvmPhase.SECURE
    address = real_address(LPID, gpa_of(SHARED))

    assert page_calls.page_in(destination.svm, address, gpa_of(SHARED), 0, PAGE_SHIFT) is UCode.U_SUCCESS

    assert destination.svm.states[SHARED] is GfnState.SHARED
    assert kind_of(destination.svm.map.words[SHARED]) == MapKind.SHARED
    source.close()
    destination.close()


def test_s3_an_image_of_the_source_is_none_at_the_destination() -> None:
    """The page was paged out there, and the hypervisor brings the image along."""
    source, destination = running_source(), Side(2)
    image = source.svm.ram.read(gpa_of(OUT), PAGE_BYTES)
    move(source, destination)
    svm = destination.svm
    svm.phase = SvmPhase.SECURE
    svm.apply(OUT, PageEvent.OUT_BEGIN)
    svm.seal_out(OUT)
    svm.apply(OUT, PageEvent.OUT_DONE)
    svm.ram.write(gpa_of(OUT), image)

    code = page_calls.page_in(svm, real_address(LPID, gpa_of(OUT)), gpa_of(OUT), 0, PAGE_SHIFT)

    assert code is UCode.U_P3
    source.close()
    destination.close()


def test_a_page_in_transition_cannot_travel() -> None:
    source = running_source()
    source.svm.apply(0, PageEvent.SHARE)

    with pytest.raises(MigrationRefused, match="gfn 0x0 is HV_SHARING"):
        states_to_send(source.svm)
    source.close()


def test_a_destination_without_room_refuses_and_charges_nothing_when_it_is_released() -> None:
    source, destination = running_source(), Side(2, SIZE_BYTES - 1)

    with pytest.raises(MigrationRefused) as caught:
        move(source, destination)

    assert caught.value.reason is Reason.NO_ROOM
    source.close()
    destination.close()
    assert destination.account.used_bytes == 0


@pytest.mark.parametrize(
    "slots",
    [
        [Slot(0, 0, N_PAGES + 1)],
        [Slot(0, 0, 0)],
        [Slot(0, -1, 2)],
        [Slot(0, 0, 4), Slot(0, 4, 4)],
        [Slot(0, 0, 4), Slot(1, 3, 4)],
        [Slot(1000, 0, 4)],
        [Slot(0, 2, 2), Slot(1, 0, 8)],
    ],
)
def test_slots_that_cannot_be_are_refused(slots: list[Slot]) -> None:
    source, destination = running_source(), Side(2)
    rest = msgspec.structs.replace(rest_of(source.svm), slots=slots)

    with pytest.raises(MigrationRefused, match="memory slot"):
        put_together(destination.svm, states_to_send(source.svm), rest)
    source.close()
    destination.close()


def test_what_does_not_come_is_wiped_page_by_page() -> None:
    side = Side(1)
    frames = SvmFrames(side.svm)
    frames.write(2, os.urandom(PAGE_BYTES))
    frames.wipe()

    assert not any(side.svm.memory.buffer.tobytes())
    side.close()


@pytest.mark.parametrize("raw", [b"", b"noise", msgspec.msgpack.encode([[], [], 5, b""])])
def test_state_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(MigrationRefused) as caught:
        SvmRest.decode(raw)

    assert caught.value.reason is Reason.NOT_WHOLE
