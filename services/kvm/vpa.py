"""H_REGISTER_VPA: the areas in which a hypervisor and a virtual processor tell each other what they do.

Each processor has a VPA and, once it has one, a dispatch trace log and an SLB shadow buffer. kvm marks a VPA as that of
a shared processor when it is registered, as KVM does; it counts no dispatches, since a processor here is a thread of
the host's. An area of a secure VM must be shared: what kvm reads of a private one is ciphertext.

Source: PAPR 14.11.3.2; Linux KVM `arch/powerpc/kvm/book3s_hv.c` (do_h_register_vpa); `asm/lppaca.h`.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

import msgspec

from protocol.codes import HCode
from protocol.errors import GuestFault, MalformedMessage
from services.kvm.guest_call import GuestCall, Result
from shared.guest_ram import GuestRam

AREA_ALIGN_BYTES = 64
VPA_BYTES = 640
DTL_ENTRY_BYTES = 48
SLB_MIN_BYTES = 8
_FUNCTION_SHIFT = 63 - 18
_FUNCTION_MASK = 7
_HEAD = Struct(">IHH")
"""Descriptor, then the length: a u16 in a VPA, a u32 in the others."""
_SHARED_PROC_AT = 9
_SHARED_PROC = 2


class VpaFunction(IntEnum):
    """What a call does, in bits 16 to 18 of its flags."""

    REGISTER_VPA = 1
    REGISTER_DTL = 2
    REGISTER_SLB = 3
    DEREGISTER_VPA = 5
    DEREGISTER_DTL = 6
    DEREGISTER_SLB = 7


class Area(msgspec.Struct, frozen=True):
    """A registered area."""

    gpa: int
    n_bytes: int


class VcpuAreas(msgspec.Struct):
    """The areas of one processor."""

    vpa: Area | None = None
    dtl: Area | None = None
    slb: Area | None = None


class VpaState(msgspec.Struct):
    """Those of all processors, by number."""

    areas: list[VcpuAreas]


class VirtualProcessorAreas:
    """The areas of a VM with `n_vcpus` processors."""

    def __init__(self, ram: GuestRam, n_vcpus: int) -> None:
        self._ram = ram
        self._areas = [VcpuAreas() for _ in range(n_vcpus)]

    async def h_register_vpa(self, call: GuestCall) -> Result:
        """H_REGISTER_VPA."""
        flags, vcpu, gpa = call.args
        if vcpu >= len(self._areas):
            return [HCode.H_PARAMETER]
        areas = self._areas[vcpu]
        match flags >> _FUNCTION_SHIFT & _FUNCTION_MASK:
            case VpaFunction.REGISTER_VPA:
                return [await self._register_vpa(areas, gpa)]
            case VpaFunction.REGISTER_DTL:
                return [await self._register(areas, "dtl", gpa, DTL_ENTRY_BYTES)]
            case VpaFunction.REGISTER_SLB:
                return [await self._register(areas, "slb", gpa, SLB_MIN_BYTES)]
            case VpaFunction.DEREGISTER_VPA:
                if areas.dtl is not None or areas.slb is not None:
                    return [HCode.H_RESOURCE]
                areas.vpa = None
            case VpaFunction.DEREGISTER_DTL:
                areas.dtl = None
            case VpaFunction.DEREGISTER_SLB:
                areas.slb = None
            case _:
                return [HCode.H_PARAMETER]
        return [HCode.H_SUCCESS]

    async def _register_vpa(self, areas: VcpuAreas, gpa: int) -> HCode:
        area = await self._area(gpa, VPA_BYTES, short=True)
        if area is None:
            return HCode.H_PARAMETER
        status = await self._ram.read(gpa + _SHARED_PROC_AT, 1)
        await self._ram.write(gpa + _SHARED_PROC_AT, bytes([status[0] | _SHARED_PROC]))
        areas.vpa = area
        return HCode.H_SUCCESS

    async def _register(self, areas: VcpuAreas, which: str, gpa: int, min_bytes: int) -> HCode:
        area = await self._area(gpa, min_bytes, short=False)
        if area is None:
            return HCode.H_PARAMETER
        if areas.vpa is None:
            return HCode.H_RESOURCE
        setattr(areas, which, area)
        return HCode.H_SUCCESS

    async def _area(self, gpa: int, min_bytes: int, *, short: bool) -> Area | None:
        """The area whose head is at `gpa`; None for one that is misaligned, too short, or not all in memory."""
        if gpa % AREA_ALIGN_BYTES:
            return None
        try:
            _, high, low = _HEAD.unpack(await self._ram.read(gpa, _HEAD.size))
            n_bytes = high if short else high << 16 | low
            self._ram.check(gpa, n_bytes)
        except GuestFault:
            return None
        return Area(gpa, n_bytes) if n_bytes >= min_bytes else None

    def reset(self) -> None:
        """The machine is reset: nothing is registered."""
        self._areas = [VcpuAreas() for _ in self._areas]

    def save(self) -> VpaState:
        """A copy."""
        return VpaState([msgspec.structs.replace(areas) for areas in self._areas])

    def check(self, state: VpaState) -> None:
        """Raise MalformedMessage unless a guest could have registered `state` in this VM."""
        if len(state.areas) != len(self._areas):
            raise MalformedMessage(f"areas of {len(state.areas)} processors, this VM has {len(self._areas)}")
        for areas in state.areas:
            if areas.vpa is None and (areas.dtl is not None or areas.slb is not None):
                raise MalformedMessage("an area of a processor without a VPA")
            self._check_area(areas.vpa, VPA_BYTES)
            self._check_area(areas.dtl, DTL_ENTRY_BYTES)
            self._check_area(areas.slb, SLB_MIN_BYTES)

    def _check_area(self, area: Area | None, min_bytes: int) -> None:
        if area is None:
            return
        try:
            self._ram.check(area.gpa, area.n_bytes)
        except GuestFault as fault:
            raise MalformedMessage(str(fault)) from None
        if area.gpa % AREA_ALIGN_BYTES or area.n_bytes < min_bytes:
            raise MalformedMessage(f"an area of {area.n_bytes} bytes at gpa {area.gpa:#x}")

    def load(self, state: VpaState) -> None:
        """Take over `state`; raises MalformedMessage unless it fits this VM."""
        self.check(state)
        self._areas = [msgspec.structs.replace(areas) for areas in state.areas]
