"""H_SVM_* in KVM, with the errors of the tables (Linux `book3s_hv_uvmem.c`), against an ultravisor that refuses."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import hcalls as h
from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.geometry import PAGE_SHIFT, gpa_of
from tests.unit.kvm_rig import KvmRig, kvm_rig
from tests.unit.ultravisor_rig import MEMORY_BYTES, N_PAGES

GFN = 13
PAGE = gpa_of(GFN)
SVM_TABLE: list[Any] = [
    # before H_SVM_INIT_START
    ("normal", h.H_SVM_PAGE_IN, (PAGE, 0, 16), HCode.H_UNSUPPORTED),
    ("normal", h.H_SVM_PAGE_OUT, (PAGE, 0, 16), HCode.H_UNSUPPORTED),
    ("normal", h.H_SVM_INIT_DONE, (), HCode.H_UNSUPPORTED),
    ("normal", h.H_SVM_INIT_ABORT, (), HCode.H_UNSUPPORTED),
    # between START and DONE
    ("start", h.H_SVM_INIT_START, (), HCode.H_STATE),
    ("start", h.H_SVM_PAGE_IN, (PAGE, 0, 12), HCode.H_P3),
    ("start", h.H_SVM_PAGE_IN, (PAGE, 2, 16), HCode.H_P2),
    ("start", h.H_SVM_PAGE_IN, (PAGE, 2, 12), HCode.H_P3),
    ("start", h.H_SVM_PAGE_IN, (PAGE + 1, 0, 16), HCode.H_PARAMETER),
    ("start", h.H_SVM_PAGE_IN, (MEMORY_BYTES, 0, 16), HCode.H_PARAMETER),
    ("start", h.H_SVM_PAGE_IN, (PAGE, 0, 16), HCode.H_SUCCESS),
    ("start", h.H_SVM_PAGE_OUT, (PAGE, 0, 12), HCode.H_P3),
    ("start", h.H_SVM_PAGE_OUT, (PAGE, 1, 16), HCode.H_P2),
    ("start", h.H_SVM_INIT_ABORT, (), HCode.H_PARAMETER),
    # secure
    ("secure", h.H_SVM_INIT_START, (), HCode.H_STATE),
    ("secure", h.H_SVM_INIT_DONE, (), HCode.H_UNSUPPORTED),
    ("secure", h.H_SVM_INIT_ABORT, (), HCode.H_STATE),
    ("secure", h.H_SVM_PAGE_IN, (PAGE, 0, 16), HCode.H_PARAMETER),
    ("secure", h.H_SVM_PAGE_IN, (PAGE, 1, 16), HCode.H_SUCCESS),
    ("secure", h.H_SVM_PAGE_OUT, (PAGE, 0, 16), HCode.H_SUCCESS),
    ("secure", h.H_SVM_PAGE_OUT, (PAGE, 0, 12), HCode.H_P3),
    ("secure", h.H_SVM_PAGE_OUT, (PAGE, 1, 16), HCode.H_P2),
    ("secure", h.H_SVM_PAGE_OUT, (MEMORY_BYTES, 0, 16), HCode.H_PARAMETER),
]


async def rig_in(state: str, rig: KvmRig) -> None:
    await rig.start()
    if state != "normal":
        assert await rig.hcall(h.H_SVM_INIT_START) == HCode.H_SUCCESS
    if state == "secure":
        assert await rig.hcall(h.H_SVM_INIT_DONE) == HCode.H_SUCCESS


@pytest.mark.parametrize(("state", "call", "args", "code"), SVM_TABLE)
async def test_the_errors_of_kvm_are_those_of_the_tables(
    state: str, call: Call, args: tuple[int, ...], code: HCode
) -> None:
    with kvm_rig() as rig:
        await rig_in(state, rig)

        assert await rig.hcall(call, *args) == code


async def test_a_vm_without_confidential_guest_support_gets_authority_and_can_be_aborted() -> None:
    with kvm_rig(secure_allowed=False) as rig:
        await rig.start()

        assert await rig.hcall(h.H_SVM_INIT_START) == HCode.H_AUTHORITY
        assert await rig.hcall(h.H_SVM_INIT_ABORT) == HCode.H_PARAMETER
        assert rig.ultravisor.names() == ["UV_SVM_TERMINATE"]


async def test_a_memory_slot_that_the_ultravisor_refuses_is_a_parameter_error() -> None:
    with kvm_rig() as rig:
        await rig.start()
        rig.refuse(u.UV_REGISTER_MEM_SLOT, UCode.U_PARAMETER)

        assert await rig.hcall(h.H_SVM_INIT_START) == HCode.H_PARAMETER
        assert await rig.hcall(h.H_SVM_INIT_ABORT) == HCode.H_PARAMETER


@pytest.mark.parametrize(
    ("refused", "code"),
    [
        (UCode.U_RETRY, HCode.H_BUSY),
        (UCode.U_BUSY, HCode.H_BUSY),
        (UCode.U_P2, HCode.H_PARAMETER),
        (UCode.U_P3, HCode.H_PARAMETER),
        (UCode.U_STATE, HCode.H_PARAMETER),
        (UCode.U_NOT_AVAILABLE, HCode.H_PARAMETER),
    ],
)
async def test_what_the_ultravisor_refuses_leaves_kvms_view_as_it_was(refused: UCode, code: HCode) -> None:
    with kvm_rig() as rig:
        await rig_in("secure", rig)
        rig.refuse(u.UV_PAGE_OUT, refused)
        rig.refuse(u.UV_PAGE_IN, refused)

        assert await rig.hcall(h.H_SVM_PAGE_OUT, PAGE, 0, PAGE_SHIFT) == code
        assert await rig.hcall(h.H_SVM_PAGE_IN, PAGE, h.H_PAGE_IN_SHARED, PAGE_SHIFT) == code
        assert rig.memory.state(GFN).name == "SECURE"


async def test_an_abort_takes_back_every_page_that_was_given_and_ends_the_vm_there() -> None:
    with kvm_rig() as rig:
        await rig_in("start", rig)
        for gfn in (GFN, GFN + 1):
            await rig.hcall(h.H_SVM_PAGE_IN, gpa_of(gfn), 0, PAGE_SHIFT)
        rig.ultravisor.calls.clear()

        assert await rig.hcall(h.H_SVM_INIT_ABORT) == HCode.H_PARAMETER

        assert rig.ultravisor.names() == ["UV_PAGE_OUT", "UV_PAGE_OUT", "UV_SVM_TERMINATE"]
        assert rig.memory.page_counts()["normal"] == N_PAGES


async def test_a_secure_page_is_out_of_the_hosts_reach_and_its_frame_a_hole() -> None:
    with kvm_rig() as rig:
        rig.memory.ram[gpa_of(GFN) : gpa_of(GFN) + 5] = b"plain"

        await rig_in("secure", rig)

        assert rig.memory.page_counts()["secure"] == N_PAGES
        assert bytes(rig.memory.ram[gpa_of(GFN) : gpa_of(GFN) + 5]) == bytes(5)
