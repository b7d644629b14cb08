"""The ultravisor's link to kvm: the filter of a hypercall, cookies, ultracalls, and what a lying kvm achieves."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import hcalls as h
from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.declare import Call, Caller
from protocol.geometry import PAGE_BYTES, gpa_of
from services.testing.image import FIRST_FREE_GFN, PlayedImage
from tests.unit.ultravisor_rig import (
    LPID,
    N_PAGES,
    Registers,
    UltravisorRig,
    answering,
    page_registers,
    played_image,
    silence,
    ultravisor_rig,
)

GFN = FIRST_FREE_GFN + 3
REFLECTED = [
    call
    for call in h.HCALLS
    if Caller.SVM in call.callers and call not in (h.H_RANDOM, h.H_RTAS) and not call.open_ended
]


@pytest.fixture(scope="module")
def image(key: RSAPrivateKey) -> PlayedImage:
    return played_image(key, b"kernel", {})


@pytest.fixture
async def rig(nursery: trio.Nursery, key: RSAPrivateKey, image: PlayedImage) -> AsyncIterator[UltravisorRig]:
    """A secure VM."""
    with ultravisor_rig(nursery, key) as made:
        await made.secure(image)
        made.kvm.frames.clear()
        yield made


async def reflected(rig: UltravisorRig, call: Call, registers: list[int]) -> Registers:
    """A hypercall of the secure VM; what the guest gets."""
    before = len(rig.guest.replies)
    at_once: Registers | None = await rig.guest.deliver(call, registers)
    if at_once is not None:
        return at_once
    await trio.testing.wait_all_tasks_blocked()
    (reply,) = rig.guest.replies[before:]
    result: Registers = reply[1]
    return result


# -- the filter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", REFLECTED, ids=lambda call: call.name)
async def test_exactly_the_declared_registers_cross_the_boundary(rig: UltravisorRig, call: Call) -> None:
    args, outputs = list(range(0x100, 0x100 + call.n_args)), list(range(0x200, 0x200 + len(call.results)))
    rig.kvm.lies[call.number] = answering(HCode.H_SUCCESS, *outputs)
    rig.kvm.extra_outputs = [0x5EC2E7] * 3

    result = await reflected(rig, call, [0, *args, 0xDEAD, 0xBEEF])

    ((number, _, body),) = rig.kvm.frames
    assert (number, body) == (call.number, [LPID, 0, *args])
    assert result == [HCode.H_SUCCESS, *outputs]


async def test_results_that_kvm_leaves_out_are_zero(rig: UltravisorRig) -> None:
    rig.kvm.lies[h.H_GET_TERM_CHAR.number] = answering(HCode.H_SUCCESS, 5)

    assert await reflected(rig, h.H_GET_TERM_CHAR, [0, 1]) == [HCode.H_SUCCESS, 5, 0, 0]


async def test_a_call_with_too_few_registers_does_not_cross(rig: UltravisorRig) -> None:
    assert await reflected(rig, h.H_PUT_TCE, [0, 1, 2]) == [HCode.H_PARAMETER]
    assert not rig.kvm.frames


async def test_random_numbers_of_a_secure_vm_do_not_come_from_the_hypervisor(rig: UltravisorRig) -> None:
    first, second = [await reflected(rig, h.H_RANDOM, [0]) for _ in range(2)]

    assert first[0] == second[0] == HCode.H_SUCCESS
    assert first[1] != second[1]
    assert not rig.kvm.frames


@pytest.mark.parametrize("call", [h.H_SVM_PAGE_IN, h.H_SVM_INIT_ABORT, h.H_SVM_PAGE_OUT], ids=lambda call: call.name)
def test_the_calls_of_the_ultravisor_are_not_served_to_a_guest(call: Call) -> None:
    assert Caller.SVM not in call.callers
    assert call not in REFLECTED


# -- cookies ----------------------------------------------------------------------------------------------------------


async def test_a_cookie_is_good_once_and_unlike_any_other(rig: UltravisorRig) -> None:
    for _ in range(20):
        await reflected(rig, h.H_EOI, [0, 1])
    cookies = [cookie for _, cookie, _ in rig.kvm.frames]

    assert len(set(cookies)) == 20
    replies = len(rig.guest.replies)
    assert rig.kvm.give_back(cookies[-1], [HCode.H_SUCCESS]) == [UCode.U_PARAMETER]
    assert len(rig.guest.replies) == replies


@pytest.mark.parametrize("registers", [[], [0], [0, 0], [0, 12345], [2**64 - 1, 2**64 - 1, 3, 4, 5]])
async def test_a_return_with_a_cookie_that_is_not_open_is_an_error_for_kvm_and_nothing_dies(
    rig: UltravisorRig, registers: Registers
) -> None:
    assert await rig.kvm.deliver(u.UV_RETURN, registers) == [UCode.U_PARAMETER]

    assert await reflected(rig, h.H_EOI, [0, 1]) == [HCode.H_SUCCESS]
    assert rig.partition.secure


async def test_the_end_of_the_vm_answers_its_open_calls_and_a_late_return_is_an_error(rig: UltravisorRig) -> None:
    rig.kvm.lies[h.H_CEDE.number] = silence
    assert await rig.guest.deliver(h.H_CEDE, [0]) is None
    ((_, cookie, _),) = rig.kvm.frames

    assert await rig.kvm.terminate() == UCode.U_SUCCESS

    assert [body for _, body in rig.guest.replies] == [[HCode.H_STATE]]
    assert rig.kvm.give_back(cookie, [HCode.H_SUCCESS]) == [UCode.U_PARAMETER]


# -- a kvm that is held up ---------------------------------------------------------------------------------------------


async def test_a_hypercall_that_a_kvm_has_which_is_held_up_stays_open_and_is_answered_late(rig: UltravisorRig) -> None:
    rig.kvm.lies[h.H_XIRR.number] = silence
    assert await rig.guest.deliver(h.H_XIRR, [0, 0]) is None
    ((_, cookie, _),) = rig.kvm.frames

    rig.kvm.peer_state = "stopped"
    rig.kvm.hypervisor.kvm_is_held_up()
    assert not rig.guest.replies
    rig.kvm.give_back(cookie, [HCode.H_SUCCESS, 0x1000])

    assert [body for _, body in rig.guest.replies] == [[HCode.H_SUCCESS, 0x1000]]


async def test_a_kvm_that_is_held_up_gets_hypercalls_but_no_wait_of_the_guest(rig: UltravisorRig) -> None:
    rig.kvm.peer_state = "stopped"

    assert await rig.guest.deliver(h.H_CEDE, [0]) == [HCode.H_BUSY]
    assert await rig.guest.deliver(h.H_EOI, [0, 1]) is None

    assert rig.kvm.names() == ["H_EOI"]


async def test_l1_the_death_of_kvm_ends_every_open_hypercall(rig: UltravisorRig) -> None:
    for call in (h.H_XIRR, h.H_CEDE):
        rig.kvm.lies[call.number] = silence
        assert await rig.guest.deliver(call, [0, 0]) is None

    rig.kvm.hypervisor.kvm_is_gone()

    assert [body for _, body in rig.guest.replies] == [[HCode.H_HARDWARE]] * 2


# -- a kvm that lies about pages --------------------------------------------------------------------------------------


async def test_a_share_that_kvm_refuses_changes_nothing(rig: UltravisorRig) -> None:
    rig.page(GFN)[:6] = b"secret"
    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(HCode.H_PARAMETER)

    assert await rig.share(GFN) == UCode.U_PARAMETER

    assert rig.state(GFN) == "SECURE"
    assert bytes(rig.page(GFN)[:6]) == b"secret"
    assert rig.partition.svm is not None
    assert rig.partition.svm.map[GFN]


async def test_a_share_for_which_kvm_gives_no_frame_changes_nothing(rig: UltravisorRig) -> None:
    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(HCode.H_SUCCESS)

    assert await rig.share(GFN) == UCode.U_PARAMETER

    assert rig.state(GFN) == "SECURE"


async def test_a_range_is_shared_as_a_whole_or_not_at_all(rig: UltravisorRig) -> None:
    async def refuse_the_last(args: Registers) -> Registers | None:
        if args[:2] == [gpa_of(GFN + 2), h.H_PAGE_IN_SHARED]:
            return [HCode.H_PARAMETER]
        return await rig.kvm.obey(h.H_SVM_PAGE_IN.number)(args)

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = refuse_the_last
    for gfn in range(GFN, GFN + 3):
        rig.page(gfn)[:6] = b"secret"

    assert await rig.share(GFN, 3) == UCode.U_PARAMETER

    assert [rig.state(gfn) for gfn in range(GFN, GFN + 3)] == ["SECURE"] * 3
    assert b"secret" not in rig.ram()
    assert [bytes(rig.page(gfn)[:6]) for gfn in range(GFN, GFN + 3)] == [b"secret"] * 3


async def test_a_kvm_that_keeps_a_frame_of_a_share_that_failed_ends_the_vm(rig: UltravisorRig) -> None:
    async def keep_the_first(args: Registers) -> Registers | None:
        if args[0] == gpa_of(GFN + 1):
            return [HCode.H_PARAMETER]
        if args[1] == h.H_PAGE_IN_NONSHARED:
            return [HCode.H_SUCCESS]
        return await rig.kvm.obey(h.H_SVM_PAGE_IN.number)(args)

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = keep_the_first

    assert await rig.share(GFN, 2) == UCode.U_STATE

    assert rig.notices == [("vm-failed", "vm1", "hypervisor-kept-shared-page")]
    assert rig.account.used_bytes == 0


async def test_a_kvm_that_keeps_an_unshared_frame_ends_the_vm(rig: UltravisorRig) -> None:
    assert await rig.share(GFN) == UCode.U_SUCCESS
    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(HCode.H_SUCCESS)

    assert await rig.unshare(GFN) == UCode.U_STATE

    assert rig.notices == [("vm-failed", "vm1", "hypervisor-kept-shared-page")]


async def test_a_kvm_that_refuses_to_unshare_ends_the_vm(rig: UltravisorRig) -> None:
    assert await rig.share(GFN) == UCode.U_SUCCESS
    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(HCode.H_PARAMETER)

    assert await rig.unshare(GFN) == UCode.U_STATE

    assert rig.audited("svm-failed") == [{"reason": "hypervisor-refused-unshare"}]


@pytest.mark.parametrize("code", [HCode.H_SUCCESS, HCode.H_PARAMETER])
async def test_a_kvm_that_withholds_a_page_three_times_ends_the_vm(rig: UltravisorRig, code: HCode) -> None:
    assert await rig.kvm.page_out(GFN) == UCode.U_SUCCESS
    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(code)

    assert [await rig.fault(GFN) for _ in range(3)] == [HCode.H_BUSY, HCode.H_BUSY, UCode.U_STATE]

    assert rig.notices == [("vm-failed", "vm1", "page-withheld")]


@pytest.mark.parametrize("code", [HCode.H_SUCCESS, HCode.H_PARAMETER])
async def test_a_kvm_that_withholds_a_shared_page_three_times_ends_the_vm(rig: UltravisorRig, code: HCode) -> None:
    """S7: the guest does not fault on it for ever."""
    assert await rig.share(GFN) == UCode.U_SUCCESS
    assert await rig.kvm.page_inval(GFN) == UCode.U_SUCCESS
    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(code)

    assert [await rig.fault(GFN) for _ in range(3)] == [HCode.H_BUSY, HCode.H_BUSY, UCode.U_STATE]

    assert rig.notices == [("vm-failed", "vm1", "page-withheld")]


async def test_a_shared_page_is_the_guests_again_at_its_next_touch(rig: UltravisorRig) -> None:
    assert await rig.share(GFN) == UCode.U_SUCCESS
    refused = rig.kvm.lies
    refused[h.H_SVM_PAGE_IN.number] = answering(HCode.H_PARAMETER)
    assert await rig.kvm.page_inval(GFN) == UCode.U_SUCCESS
    assert [await rig.fault(GFN) for _ in range(2)] == [HCode.H_BUSY] * 2
    del refused[h.H_SVM_PAGE_IN.number]

    for _ in range(3):
        assert await rig.fault(GFN) == HCode.H_SUCCESS
        assert rig.state(GFN) == "SHARED"
        assert await rig.kvm.page_inval(GFN) == UCode.U_SUCCESS

    assert rig.partition.secure


async def test_an_image_that_was_altered_three_times_ends_the_vm(rig: UltravisorRig) -> None:
    rig.page(GFN)[:6] = b"secret"
    assert await rig.kvm.page_out(GFN) == UCode.U_SUCCESS
    rig.write(GFN, bytes(PAGE_BYTES))

    assert [await rig.fault(GFN) for _ in range(3)] == [HCode.H_BUSY, HCode.H_BUSY, UCode.U_STATE]

    assert rig.notices == [("vm-failed", "vm1", "page-integrity")]
    assert len(rig.audited("page-refused")) == 3


async def test_a_shared_page_that_kvm_took_away_comes_back_with_the_next_touch(rig: UltravisorRig) -> None:
    assert await rig.share(GFN) == UCode.U_SUCCESS
    assert await rig.kvm.page_inval(GFN) == UCode.U_SUCCESS
    assert rig.state(GFN) == "SHARED_INV"

    assert await rig.fault(GFN) == HCode.H_SUCCESS

    assert rig.state(GFN) == "SHARED"
    assert await rig.kvm.page_inval(GFN) == UCode.U_SUCCESS
    assert await rig.unshare(GFN) == UCode.U_SUCCESS
    assert rig.state(GFN) == "SECURE"


# -- arguments of the hypervisor's ultracalls -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({0: LPID + 1}, UCode.U_PARAMETER),
        ({1: 0}, UCode.U_P2),
        ({1: 1 << 48 | LPID << 40 | gpa_of(GFN)}, UCode.U_P2),
        ({1: (LPID + 1) << 40 | gpa_of(GFN)}, UCode.U_P2),
        ({1: LPID << 40 | gpa_of(GFN + 1)}, UCode.U_P2),
        ({1: LPID << 40 | gpa_of(N_PAGES), 2: gpa_of(N_PAGES)}, UCode.U_P3),
        ({3: 1}, UCode.U_P4),
        ({4: 12}, UCode.U_P5),
    ],
)
@pytest.mark.parametrize("call", [u.UV_PAGE_IN, u.UV_PAGE_OUT], ids=lambda call: call.name)
async def test_page_calls_check_their_arguments(
    rig: UltravisorRig, call: Call, change: dict[int, int], code: UCode
) -> None:
    registers = [change.get(i, value) for i, value in enumerate(page_registers(GFN))]

    assert await rig.kvm.ucall(call, *registers) == code
    assert rig.state(GFN) == "SECURE"


@pytest.mark.parametrize("call", [c for c in u.UCALLS if Caller.HYPERVISOR in c.callers], ids=lambda call: call.name)
async def test_a_call_without_its_registers_is_a_parameter_error(rig: UltravisorRig, call: Call) -> None:
    needed = 2 if call is u.UV_RETURN else call.n_args
    for n_registers in range(needed):
        assert await rig.kvm.ucall(call, *[LPID] * n_registers) == UCode.U_PARAMETER, n_registers
    assert rig.partition.secure


@pytest.mark.parametrize(
    "gpa, order, code",
    [
        (gpa_of(GFN), 12, UCode.U_P3),
        (gpa_of(N_PAGES), 16, UCode.U_P2),
        (gpa_of(GFN) + 1, 16, UCode.U_P2),
        (gpa_of(GFN), 16, UCode.U_P2),
    ],
)
async def test_page_inval_is_for_shared_pages_only(rig: UltravisorRig, gpa: int, order: int, code: UCode) -> None:
    assert await rig.kvm.ucall(u.UV_PAGE_INVAL, LPID, gpa, order) == code
    assert rig.state(GFN) == "SECURE"


async def test_the_page_table_of_a_secure_vm_is_its_own(rig: UltravisorRig) -> None:
    assert await rig.kvm.ucall(u.UV_WRITE_PATE, LPID, 1 << 63, 5) == UCode.U_PERMISSION
    assert await rig.kvm.ucall(u.UV_WRITE_PATE, LPID, rig.partition.pate[0], 5) == UCode.U_SUCCESS
    assert rig.partition.pate[1] == 5
    assert await rig.kvm.ucall(u.UV_WRITE_PATE, 77, 0, 0) == UCode.U_PARAMETER


async def test_restricted_registers_are_those_of_the_list(rig: UltravisorRig) -> None:
    for spr in (0xB4, 0xBC, 0xBB):
        assert await rig.kvm.ucall(u.UV_RESTRICTED_SPR_WRITE, spr, spr + 1) == UCode.U_SUCCESS
        read: Registers = await rig.kvm.deliver(u.UV_RESTRICTED_SPR_READ, [spr])
        assert read == [UCode.U_SUCCESS, 0, spr + 1]
    for spr in (0x352, 0x31F):
        assert await rig.kvm.ucall(u.UV_RESTRICTED_SPR_WRITE, spr, 1) == UCode.U_SUCCESS
        assert await rig.kvm.ucall(u.UV_RESTRICTED_SPR_READ, spr) == UCode.U_PARAMETER
    for spr in (0, 0xB5, 1 << 40):
        assert await rig.kvm.ucall(u.UV_RESTRICTED_SPR_WRITE, spr, 1) == UCode.U_PARAMETER
        assert await rig.kvm.ucall(u.UV_RESTRICTED_SPR_READ, spr) == UCode.U_PARAMETER


async def test_a_secure_vm_is_terminated_once_and_its_memory_credited(rig: UltravisorRig) -> None:
    assert await rig.kvm.terminate() == UCode.U_SUCCESS
    assert rig.account.used_bytes == 0
    assert await rig.kvm.terminate() == UCode.U_SUCCESS
    assert len(rig.audited("svm-terminated")) == 1
    assert await rig.kvm.page_out(GFN) == UCode.U_PARAMETER
    assert await rig.kvm.ucall(u.UV_SVM_TERMINATE, 77) == UCode.U_PARAMETER


@pytest.mark.parametrize("call", [u.UV_SHARE_PAGE, u.UV_UNSHARE_PAGE], ids=lambda call: call.name)
@pytest.mark.parametrize(
    ("gfn", "n_pages", "code"),
    [
        (GFN, 0, UCode.U_P3),
        (0, N_PAGES + 1, UCode.U_P3),
        (N_PAGES, 1, UCode.U_P2),
        (N_PAGES - 1, 2, UCode.U_P2),
        ((1 << 64) - 1, 2, UCode.U_P2),
        (GFN, (1 << 64) - 1, UCode.U_P3),
    ],
)
async def test_a_range_outside_the_vm_is_refused(
    rig: UltravisorRig, call: Call, gfn: int, n_pages: int, code: UCode
) -> None:
    assert await rig.ucall(call, gfn, n_pages) == code
    assert not rig.kvm.frames


async def test_ultracalls_of_a_secure_vm_are_refused_to_a_normal_one(nursery: trio.Nursery, key: RSAPrivateKey) -> None:
    with ultravisor_rig(nursery, key) as normal:
        for call in (u.UV_SHARE_PAGE, u.UV_UNSHARE_PAGE, u.UV_UNSHARE_ALL_PAGES, u.UV_ESMB_GET_FILE):
            assert await normal.ucall(call, *[1] * call.n_args) == UCode.U_PERMISSION
        assert await reflected(normal, h.H_EOI, [0, 1]) == [HCode.H_PARAMETER]
