"""H_REGISTER_VPA: the order in which areas come and go, and what of a guest's memory is looked at."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codes import HCode
from protocol.errors import MalformedMessage
from protocol.geometry import PAGE_BYTES
from services.kvm.guest_call import GuestCall
from services.kvm.vpa import VPA_BYTES, VirtualProcessorAreas, VpaFunction, VpaState
from services.qemu.testing import TestRam

VPA, DTL, SLB = 0x1000, 0x2000, 0x3000
OK, PARAMETER, RESOURCE = HCode.H_SUCCESS, HCode.H_PARAMETER, HCode.H_RESOURCE


class Rig:
    """A VM with one processor and one page of RAM."""

    def __init__(self) -> None:
        self.ram = TestRam(PAGE_BYTES)
        self.areas = VirtualProcessorAreas(self.ram.accessor, 1)

    def put(self, gpa: int, n_bytes: int, *, short: bool = False) -> int:
        self.ram.bytes[gpa : gpa + 8] = struct.pack(">IHH", 0, n_bytes, 0) if short else struct.pack(">II", 0, n_bytes)
        return gpa

    async def call(self, function: int, gpa: int = 0, vcpu: int = 0) -> int:
        flags = function << 63 - 18
        return (await self.areas.h_register_vpa(GuestCall(0, [flags, vcpu, gpa], 0, lambda _result: None)))[0]


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.put(VPA, VPA_BYTES, short=True)
    rig.put(DTL, 4096)
    rig.put(SLB, 64)
    return rig


async def test_areas_come_after_their_vpa_and_go_before_it(rig: Rig) -> None:
    assert await rig.call(VpaFunction.REGISTER_DTL, DTL) == RESOURCE
    assert await rig.call(VpaFunction.REGISTER_VPA, VPA) == OK
    assert await rig.call(VpaFunction.REGISTER_DTL, DTL) == OK
    assert await rig.call(VpaFunction.REGISTER_SLB, SLB) == OK
    assert await rig.call(VpaFunction.DEREGISTER_VPA) == RESOURCE
    assert await rig.call(VpaFunction.DEREGISTER_DTL) == OK
    assert await rig.call(VpaFunction.DEREGISTER_VPA) == RESOURCE
    assert await rig.call(VpaFunction.DEREGISTER_SLB) == OK
    assert await rig.call(VpaFunction.DEREGISTER_VPA) == OK


async def test_a_vpa_is_marked_as_that_of_a_shared_processor(rig: Rig) -> None:
    rig.ram.bytes[VPA + 9] = 0x40
    await rig.call(VpaFunction.REGISTER_VPA, VPA)
    assert rig.ram.bytes[VPA + 9] == 0x42


@pytest.mark.parametrize(
    ("function", "gpa", "vcpu"),
    [
        (VpaFunction.REGISTER_VPA, VPA, 1),
        (VpaFunction.REGISTER_VPA, VPA + 32, 0),
        (VpaFunction.REGISTER_VPA, DTL, 0),
        (VpaFunction.REGISTER_VPA, PAGE_BYTES, 0),
        (VpaFunction.REGISTER_VPA, 1 << 63, 0),
        (0, VPA, 0),
        (4, VPA, 0),
    ],
)
async def test_s5_what_is_no_area_is_a_parameter_error(rig: Rig, function: int, gpa: int, vcpu: int) -> None:
    assert await rig.call(function, gpa, vcpu) == PARAMETER


@pytest.mark.parametrize(
    ("n_bytes", "code"), [(47, PARAMETER), (48, OK), (PAGE_BYTES - DTL, OK), (PAGE_BYTES, PARAMETER)]
)
async def test_a_log_has_room_for_an_entry_and_lies_in_memory(rig: Rig, n_bytes: int, code: HCode) -> None:
    await rig.call(VpaFunction.REGISTER_VPA, VPA)
    rig.put(DTL, n_bytes)
    assert await rig.call(VpaFunction.REGISTER_DTL, DTL) == code


async def test_the_areas_are_state_and_a_reset_forgets_them(rig: Rig) -> None:
    await rig.call(VpaFunction.REGISTER_VPA, VPA)
    saved = rig.areas.save()
    rig.areas.reset()
    assert await rig.call(VpaFunction.REGISTER_SLB, SLB) == RESOURCE
    rig.areas.load(saved)
    assert await rig.call(VpaFunction.REGISTER_SLB, SLB) == OK
    with pytest.raises(MalformedMessage):
        rig.areas.load(VpaState([]))


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([VPA, DTL, SLB, 0, 64])), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_log_is_without_its_vpa(steps: list[tuple[int, int]]) -> None:
    rig = Rig()
    rig.put(VPA, VPA_BYTES, short=True)
    rig.put(DTL, 4096)
    for function, gpa in steps:
        await rig.call(function, gpa)
        (areas,) = rig.areas.save().areas
        assert areas.vpa is not None or (areas.dtl is None and areas.slb is None)
