"""UV_PAGE_IN, UV_PAGE_OUT, UV_PAGE_INVAL and the memory slots: checks in their order, and what each does to a page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from protocol.codes import UCode
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from services.ultravisor import page_calls
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_calls import PageRequest
from services.ultravisor.page_state import GfnState, PageEvent
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.svm import Svm, SvmPhase
from shared.partition_map import MapKind, kind_of
from shared.real_address import SECURE_BIT, real_address
from tests.unit.page_ways import way_to

LPID = 5
N_PAGES = 8
SIZE_BYTES = N_PAGES * PAGE_BYTES
GFN = 3
SECRET = os.urandom(32) * (PAGE_BYTES // 32)


class Guest:
    """The invalidations that a guest gets, and whether it acknowledges them."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.acknowledges = True

    async def invalidate(self, gfns: list[int], _cause: int = 0) -> bool:
        self.asked.append(list(gfns))
        return self.acknowledges


class Rig:
    """A secure VM without links."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE_BYTES)
        self.account = SecureAccount(SIZE_BYTES)
        self.svm = Svm("vm1", LPID, 1, NormalRam(os.dup(self.fd), SIZE_BYTES), self.account)
        self.guest = Guest()
        self.partition = cast(Partition, SimpleNamespace(invalidator=self.guest))

    def secure(self) -> None:
        assert page_calls.register_slot(self.svm, 0, SIZE_BYTES, 0, 0) is UCode.U_SUCCESS
        self.svm.phase = SvmPhase.SECURE
        self.svm.map_all()

    def store(self, gfn: int, content: bytes) -> None:
        self.svm.secure_page(gfn)[:] = content

    def load(self, gfn: int) -> bytes:
        return bytes(self.svm.secure_page(gfn))

    def frame(self, gfn: int) -> bytes:
        return os.pread(self.fd, PAGE_BYTES, gpa_of(gfn))

    def forge(self, gfn: int, content: bytes) -> None:
        os.pwrite(self.fd, content, gpa_of(gfn))

    def page_in(self, gfn: int) -> UCode:
        return page_calls.page_in(self.svm, real_address(LPID, gpa_of(gfn)), gpa_of(gfn), 0, PAGE_SHIFT)

    async def page_out(self, *gfns: int) -> list[UCode]:
        requests = [PageRequest(real_address(LPID, gpa_of(gfn)), gpa_of(gfn), 0, PAGE_SHIFT, 0) for gfn in gfns]
        return await page_calls.page_out(self.partition, self.svm, requests)


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    yield it
    it.svm.release()
    it.svm.ram.close()
    os.close(it.fd)
    assert it.account.used_bytes == 0


@pytest.fixture
def secure(rig: Rig) -> Rig:
    rig.secure()
    rig.store(GFN, SECRET)
    return rig


# -- memory slots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "size_bytes", "flags", "slot", "code"),
    [
        (1, PAGE_BYTES, 0, 0, UCode.U_P2),
        (0, 0, 0, 0, UCode.U_P3),
        (0, PAGE_BYTES + 1, 0, 0, UCode.U_P3),
        (0, SIZE_BYTES + PAGE_BYTES, 0, 0, UCode.U_P3),
        ((1 << 64) - PAGE_BYTES, 2 * PAGE_BYTES, 0, 0, UCode.U_P3),
        (0, PAGE_BYTES, 1, 0, UCode.U_P4),
        (0, PAGE_BYTES, 0, 512, UCode.U_P5),
        (0, PAGE_BYTES, 0, 0, UCode.U_SUCCESS),
    ],
)
def test_a_slot_is_checked(rig: Rig, gpa: int, size_bytes: int, flags: int, slot: int, code: UCode) -> None:
    assert page_calls.register_slot(rig.svm, gpa, size_bytes, flags, slot) is code


def test_a_slot_number_and_a_frame_are_taken_once(rig: Rig) -> None:
    assert page_calls.register_slot(rig.svm, 0, 4 * PAGE_BYTES, 0, 0) is UCode.U_SUCCESS

    assert page_calls.register_slot(rig.svm, gpa_of(4), PAGE_BYTES, 0, 0) is UCode.U_P5
    assert page_calls.register_slot(rig.svm, gpa_of(3), PAGE_BYTES, 0, 1) is UCode.U_P5
    assert page_calls.register_slot(rig.svm, gpa_of(4), PAGE_BYTES, 0, 1) is UCode.U_SUCCESS


def test_a_slot_that_the_account_does_not_hold_is_refused_and_a_dropped_one_is_credited(rig: Rig) -> None:
    rig.account.charge(4 * PAGE_BYTES)
    assert page_calls.register_slot(rig.svm, 0, 5 * PAGE_BYTES, 0, 0) is UCode.U_PARAMETER
    assert page_calls.register_slot(rig.svm, 0, 4 * PAGE_BYTES, 0, 0) is UCode.U_SUCCESS

    assert page_calls.unregister_slot(rig.svm, 0) is UCode.U_SUCCESS
    assert page_calls.unregister_slot(rig.svm, 0) is UCode.U_P2

    assert rig.account.used_bytes == 4 * PAGE_BYTES
    rig.account.credit(4 * PAGE_BYTES)


# -- page out ---------------------------------------------------------------------------------------------------------


async def test_a_page_leaves_as_an_image_and_comes_back(secure: Rig) -> None:
    assert await secure.page_out(GFN) == [UCode.U_SUCCESS]

    assert secure.svm.states[GFN] is GfnState.PAGED_OUT
    assert not secure.svm.map[GFN]
    assert secure.guest.asked == [[GFN]]
    assert SECRET[:32] not in secure.frame(GFN)

    secure.store(GFN, bytes(PAGE_BYTES))
    assert secure.page_in(GFN) is UCode.U_SUCCESS
    assert secure.load(GFN) == SECRET
    assert kind_of(secure.svm.map[GFN]) is MapKind.SECURE


async def test_pages_that_leave_together_cost_the_guest_one_invalidation(secure: Rig) -> None:
    assert await secure.page_out(1, GFN, 1, 5) == [UCode.U_SUCCESS, UCode.U_SUCCESS, UCode.U_RETRY, UCode.U_SUCCESS]

    assert secure.guest.asked == [[1, GFN, 5]]


async def test_a_page_that_the_guest_does_not_let_go_stays(secure: Rig) -> None:
    secure.guest.acknowledges = False

    assert await secure.page_out(GFN) == [UCode.U_RETRY]

    assert secure.svm.states[GFN] is GfnState.SECURE
    assert kind_of(secure.svm.map[GFN]) is MapKind.SECURE
    assert secure.frame(GFN) == bytes(PAGE_BYTES)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (PageRequest(real_address(LPID, gpa_of(GFN)), gpa_of(GFN), 0, 12, 0), UCode.U_P5),
        (PageRequest(real_address(LPID, gpa_of(GFN)), gpa_of(GFN), 1, PAGE_SHIFT, 0), UCode.U_P4),
        (PageRequest(0, gpa_of(GFN), 0, PAGE_SHIFT, 0), UCode.U_P2),
        (PageRequest(real_address(LPID + 1, gpa_of(GFN)), gpa_of(GFN), 0, PAGE_SHIFT, 0), UCode.U_P2),
        (PageRequest(real_address(LPID, gpa_of(GFN)) | SECURE_BIT, gpa_of(GFN), 0, PAGE_SHIFT, 0), UCode.U_P2),
        (PageRequest(real_address(LPID, gpa_of(GFN + 1)), gpa_of(GFN), 0, PAGE_SHIFT, 0), UCode.U_P2),
        (PageRequest(real_address(LPID, SIZE_BYTES), SIZE_BYTES, 0, PAGE_SHIFT, 0), UCode.U_P3),
    ],
    ids=["order", "flags", "no frame", "another VM", "secure frame", "another frame", "outside the slots"],
)
async def test_arguments_of_a_page_out_are_checked(secure: Rig, request_: PageRequest, code: UCode) -> None:
    assert await page_calls.page_out(secure.partition, secure.svm, [request_]) == [code]
    assert secure.svm.states[GFN] is GfnState.SECURE
    assert not secure.guest.asked


async def test_a_shared_page_goes_nowhere_and_one_that_is_out_is_out(secure: Rig) -> None:
    for event in (PageEvent.SHARE, PageEvent.HV_PAGE_IN, PageEvent.SHARE_DONE):
        secure.svm.apply(1, event)
    await secure.page_out(GFN)

    assert await secure.page_out(1, GFN) == [UCode.U_SUCCESS, UCode.U_PARAMETER]
    assert secure.frame(1) == bytes(PAGE_BYTES)


async def test_a_full_segment_keeps_the_page(secure: Rig) -> None:
    os.ftruncate(secure.fd, 0)

    assert await secure.page_out(GFN) == [UCode.U_RETRY]

    assert secure.svm.states[GFN] is GfnState.SECURE
    assert secure.load(GFN) == SECRET


# -- page in ----------------------------------------------------------------------------------------------------------


async def test_a_forged_image_is_refused_and_the_good_one_is_taken_afterwards(secure: Rig) -> None:
    await secure.page_out(GFN, 4)
    good = secure.frame(GFN)

    for forged in (bytes(PAGE_BYTES), secure.frame(4), good[:-1] + bytes([good[-1] ^ 1])):
        secure.forge(GFN, forged)
        assert secure.page_in(GFN) is UCode.U_P3
        assert secure.svm.states[GFN] is GfnState.PAGED_OUT
    assert secure.svm.refused_images[GFN] == 3

    secure.forge(GFN, good)
    assert secure.page_in(GFN) is UCode.U_SUCCESS
    assert secure.load(GFN) == SECRET
    assert GFN not in secure.svm.refused_images


async def test_an_older_image_of_the_same_page_is_refused(secure: Rig) -> None:
    await secure.page_out(GFN)
    old = secure.frame(GFN)
    secure.page_in(GFN)
    await secure.page_out(GFN)
    secure.forge(GFN, old)

    assert secure.page_in(GFN) is UCode.U_P3


def test_a_page_that_is_in_secure_memory_is_not_replaced(secure: Rig) -> None:
    secure.forge(GFN, b"evil" * (PAGE_BYTES // 4))

    assert secure.page_in(GFN) is UCode.U_P2
    assert secure.load(GFN) == SECRET


def test_a_page_is_taken_once_while_the_vm_turns_secure(rig: Rig) -> None:
    page_calls.register_slot(rig.svm, 0, SIZE_BYTES, 0, 0)
    rig.forge(GFN, SECRET)

    assert rig.page_in(GFN) is UCode.U_SUCCESS
    rig.forge(GFN, b"evil" * (PAGE_BYTES // 4))
    assert rig.page_in(GFN) is UCode.U_P2

    assert rig.load(GFN) == SECRET


async def test_a_page_that_was_taken_in_does_not_go_back_before_it_was_measured(rig: Rig) -> None:
    page_calls.register_slot(rig.svm, 0, SIZE_BYTES, 0, 0)
    rig.forge(GFN, SECRET)
    rig.page_in(GFN)

    assert await rig.page_out(GFN) == [UCode.U_RETRY]

    assert GFN in rig.svm.taken_in


async def test_an_abort_gives_back_what_the_host_had(rig: Rig) -> None:
    page_calls.register_slot(rig.svm, 0, SIZE_BYTES, 0, 0)
    rig.forge(GFN, SECRET)
    rig.page_in(GFN)
    rig.forge(GFN, bytes(PAGE_BYTES))
    rig.svm.phase = SvmPhase.ABORTING

    assert await rig.page_out(GFN) == [UCode.U_SUCCESS]

    assert rig.frame(GFN) == SECRET
    assert rig.page_in(4) is UCode.U_STATE


# -- page invalidate --------------------------------------------------------------------------------------------------


async def test_a_shared_frame_may_be_taken_away_and_given_back(secure: Rig) -> None:
    for event in (PageEvent.SHARE, PageEvent.HV_PAGE_IN, PageEvent.SHARE_DONE):
        secure.svm.apply(GFN, event)
    secure.svm.map_shared(GFN)

    code = await page_calls.page_inval(secure.partition, secure.svm, gpa_of(GFN), PAGE_SHIFT, 0)
    assert (code, secure.svm.states[GFN], secure.svm.map[GFN]) == (UCode.U_SUCCESS, GfnState.SHARED_INV, 0)
    assert secure.guest.asked == [[GFN]]

    assert secure.page_in(GFN) is UCode.U_SUCCESS
    assert kind_of(secure.svm.map[GFN]) is MapKind.SHARED


@pytest.mark.parametrize(
    ("gpa", "order", "code"),
    [
        (gpa_of(GFN), 12, UCode.U_P3),
        (gpa_of(GFN), PAGE_SHIFT, UCode.U_P2),
        (gpa_of(GFN) + 1, PAGE_SHIFT, UCode.U_P2),
        (SIZE_BYTES, PAGE_SHIFT, UCode.U_P2),
    ],
    ids=["order", "private page", "unaligned", "outside the slots"],
)
async def test_arguments_of_a_page_invalidation_are_checked(secure: Rig, gpa: int, order: int, code: UCode) -> None:
    assert await page_calls.page_inval(secure.partition, secure.svm, gpa, order, 0) is code
    assert not secure.guest.asked


# -- every state ------------------------------------------------------------------------------------------------------

OK, RETRY, P2, PARAMETER, P3 = UCode.U_SUCCESS, UCode.U_RETRY, UCode.U_P2, UCode.U_PARAMETER, UCode.U_P3
S = GfnState
ANSWERS: dict[GfnState, tuple[tuple[UCode, GfnState], tuple[UCode, GfnState], tuple[UCode, GfnState]]] = {
    S.SECURE: ((P2, S.SECURE), (OK, S.PAGED_OUT), (P2, S.SECURE)),
    S.PAGED_OUT: ((P3, S.PAGED_OUT), (PARAMETER, S.PAGED_OUT), (P2, S.PAGED_OUT)),
    S.SHARED: ((OK, S.SHARED), (OK, S.SHARED), (OK, S.SHARED_INV)),
    S.SHARED_INV: ((OK, S.SHARED), (OK, S.SHARED_INV), (OK, S.SHARED_INV)),
    S.SHARED_IMPLICIT: ((OK, S.SHARED_IMPLICIT), (OK, S.SHARED_IMPLICIT), (OK, S.SHARED_IMPLICIT_INV)),
    S.SHARED_IMPLICIT_INV: ((OK, S.SHARED_IMPLICIT), (OK, S.SHARED_IMPLICIT_INV), (OK, S.SHARED_IMPLICIT_INV)),
    S.HV_SHARING: ((OK, S.HV_SHARED), (RETRY, S.HV_SHARING), (P2, S.HV_SHARING)),
    S.HV_SHARED: ((OK, S.HV_SHARED), (RETRY, S.HV_SHARED), (OK, S.HV_SHARED_INV)),
    S.HV_SHARED_INV: ((OK, S.HV_SHARED), (RETRY, S.HV_SHARED_INV), (OK, S.HV_SHARED_INV)),
    S.HV_UNSHARING: ((OK, S.HV_UNSHARED), (RETRY, S.HV_UNSHARING), (OK, S.HV_UNSHARING_INV)),
    S.HV_UNSHARING_INV: ((OK, S.HV_UNSHARED), (RETRY, S.HV_UNSHARING_INV), (OK, S.HV_UNSHARING_INV)),
    S.HV_UNSHARED: ((RETRY, S.HV_UNSHARED), (RETRY, S.HV_UNSHARED), (P2, S.HV_UNSHARED)),
    S.PSEUDO_SHARED: ((OK, S.PSEUDO_SHARED), (OK, S.PSEUDO_SHARED), (OK, S.PSEUDO_SHARED_INV)),
    S.PSEUDO_SHARED_INV: ((OK, S.PSEUDO_SHARED), (OK, S.PSEUDO_SHARED_INV), (OK, S.PSEUDO_SHARED_INV)),
    S.PAGING_OUT: ((RETRY, S.PAGING_OUT), (RETRY, S.PAGING_OUT), (P2, S.PAGING_OUT)),
    S.PAGING_IN: ((P3, S.PAGED_OUT), (RETRY, S.PAGING_IN), (P2, S.PAGING_IN)),
}
"""What UV_PAGE_IN, UV_PAGE_OUT and UV_PAGE_INVAL answer in each state, and what the page is then."""


@pytest.mark.parametrize("state", GfnState, ids=lambda state: state.name)
async def test_each_call_of_the_hypervisor_in_each_state(state: GfnState) -> None:
    for call, (code, then) in enumerate(ANSWERS[state]):
        rig = Rig()
        rig.secure()
        for event in way_to(state):
            rig.svm.apply(GFN, event)
        if call == 0:
            answer = rig.page_in(GFN)
        elif call == 1:
            (answer,) = await rig.page_out(GFN)
        else:
            answer = await page_calls.page_inval(rig.partition, rig.svm, gpa_of(GFN), PAGE_SHIFT, 0)
        assert (answer, rig.svm.states[GFN]) == (code, then), ("page in", "page out", "page inval")[call]
