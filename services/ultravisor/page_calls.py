"""Ultracalls of the hypervisor about memory: slots, page in, page out, page invalidate.

All are leaves: none waits for kvm. Page-out waits for the guest's acknowledgement only, which waits for nobody.
Checks come in the order of the real ultravisor (`svm/svm-main.c`), and so do their codes.
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.codes import UCode
from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gfn_of
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_state import TRANSIENT, BadTransition, GfnState, PageEvent
from services.ultravisor.partition import Partition
from services.ultravisor.svm import MAX_SLOTS, Slot, Svm, SvmPhase
from shared.real_address import offset_in_ram

_INVALIDATABLE = frozenset(
    {
        GfnState.SHARED,
        GfnState.SHARED_INV,
        GfnState.SHARED_IMPLICIT,
        GfnState.SHARED_IMPLICIT_INV,
        GfnState.PSEUDO_SHARED,
        GfnState.PSEUDO_SHARED_INV,
        GfnState.HV_SHARED,
        GfnState.HV_SHARED_INV,
        GfnState.HV_UNSHARING,
        GfnState.HV_UNSHARING_INV,
    }
)

_SHARED_OUT = frozenset(
    {
        GfnState.SHARED,
        GfnState.SHARED_INV,
        GfnState.SHARED_IMPLICIT,
        GfnState.SHARED_IMPLICIT_INV,
        GfnState.PSEUDO_SHARED,
        GfnState.PSEUDO_SHARED_INV,
    }
)
"""The hypervisor has a frame of its own for these already: nothing is to be done."""


def register_slot(svm: Svm, gpa: int, size_bytes: int, flags: int, slot: int) -> UCode:
    """UV_REGISTER_MEM_SLOT: reserve secure memory for a slot of a VM that turns secure."""
    if gpa % PAGE_BYTES:
        return UCode.U_P2
    if size_bytes == 0 or size_bytes % PAGE_BYTES or gpa + size_bytes > svm.ram.size_bytes:
        return UCode.U_P3
    if flags:
        return UCode.U_P4
    new = Slot(slot, gfn_of(gpa), size_bytes >> PAGE_SHIFT)
    if slot >= MAX_SLOTS or slot in svm.slots or any(_overlap(new, old) for old in svm.slots.values()):
        return UCode.U_P5
    return UCode.U_SUCCESS if svm.register_slot(new) else UCode.U_PARAMETER


def unregister_slot(svm: Svm, slot: int) -> UCode:
    """UV_UNREGISTER_MEM_SLOT: drop a slot and its pages."""
    if slot not in svm.slots:
        return UCode.U_P2
    svm.unregister_slot(slot)
    return UCode.U_SUCCESS


def page_in(svm: Svm, src_ra: int, gpa: int, flags: int, order: int, cause: int = 0) -> UCode:
    """UV_PAGE_IN: the hypervisor offers the frame at `src_ra` for `gpa`."""
    if order != PAGE_SHIFT:
        return UCode.U_P5
    if flags:
        return UCode.U_P4
    offset = offset_in_ram(src_ra, svm.lpid)
    if offset is None or offset != gpa:
        # Frame and GFN are one here: another frame of the same VM would alias two GFNs.
        return UCode.U_P2
    if svm.phase is SvmPhase.ABORTING:
        return UCode.U_STATE
    gfn = gfn_of(gpa)
    if gpa % PAGE_BYTES or not svm.in_slots(gfn):
        return UCode.U_P3
    return _page_in_by_state(svm, gfn, cause)


def _page_in_by_state(svm: Svm, gfn: int, cause: int) -> UCode:
    state = svm.states[gfn]
    if state is GfnState.SECURE:
        return _take_in(svm, gfn)
    if state is GfnState.PAGING_IN:
        return _open_image(svm, gfn, cause)
    if state is GfnState.PAGED_OUT:
        svm.apply(gfn, PageEvent.IN_BEGIN, cause)
        return _open_image(svm, gfn, cause)
    try:
        new = svm.apply(gfn, PageEvent.HV_PAGE_IN, cause)
    except BadTransition:
        return UCode.U_RETRY if state in TRANSIENT else UCode.U_P2
    svm.withheld.pop(gfn, None)
    if new is GfnState.SHARED:
        svm.map_shared(gfn)
    return UCode.U_SUCCESS


def _take_in(svm: Svm, gfn: int) -> UCode:
    if svm.phase is not SvmPhase.STARTING or gfn in svm.taken_in:
        return UCode.U_P2
    try:
        svm.take_in(gfn)
    except HostFault:
        return UCode.U_P2
    return UCode.U_SUCCESS


def _open_image(svm: Svm, gfn: int, cause: int) -> UCode:
    try:
        good = svm.open_in(gfn, gfn << PAGE_SHIFT)
    except HostFault:
        good = False
    if not good:
        svm.apply(gfn, PageEvent.IN_FAILED, cause)
        svm.refused_images[gfn] = svm.refused_images.get(gfn, 0) + 1
        return UCode.U_P3
    svm.refused_images.pop(gfn, None)
    svm.withheld.pop(gfn, None)
    svm.apply(gfn, PageEvent.IN_DONE, cause)
    svm.map_secure(gfn)
    return UCode.U_SUCCESS


class PageRequest(NamedTuple):
    """Arguments of UV_PAGE_OUT and what caused it."""

    dst_ra: int
    gpa: int
    flags: int
    order: int
    cause: int

    @classmethod
    def of(cls, registers: list[int], cause: int) -> PageRequest:
        """From the registers `[lpid, dst_ra, gpa, flags, order]`."""
        _, dst_ra, gpa, flags, order = registers[:5]
        return cls(dst_ra, gpa, flags, order, cause)


async def page_out(partition: Partition, svm: Svm, requests: list[PageRequest]) -> list[UCode]:
    """UV_PAGE_OUT, several at once: put the encrypted image of each `gpa` into the frame at its `dst_ra`.

    The secure frames are kept. All pages share one invalidation of the guest.
    """
    codes = [_begin_page_out(svm, request) for request in requests]
    leaving = [i for i, code in enumerate(codes) if code is None]
    if leaving:
        gfns = [gfn_of(requests[i].gpa) for i in leaving]
        acknowledged = await partition.invalidator.invalidate(gfns, requests[leaving[0]].cause)
        may_write = acknowledged and svm.phase is SvmPhase.SECURE and _is_whole(svm.ram)
        for i, gfn in zip(leaving, gfns, strict=True):
            if may_write:
                codes[i] = _seal(svm, gfn, requests[i].cause)
            else:
                _keep_page(svm, gfn, requests[i].cause)
    return [UCode.U_RETRY if code is None else code for code in codes]


def _begin_page_out(svm: Svm, request: PageRequest) -> UCode | None:
    """The answer, or None when the page is on its way: unmapped, and waiting for the guest to forget it."""
    refused = _check_page_out(svm, request)
    if refused is not None:
        return refused
    gfn = gfn_of(request.gpa)
    if svm.phase is SvmPhase.ABORTING:
        return _give_back(svm, gfn)
    if svm.phase is SvmPhase.STARTING:
        # Given back now, the page could be offered again with another content after it was measured.
        return UCode.U_RETRY
    state = svm.states[gfn]
    if state in _SHARED_OUT:
        return UCode.U_SUCCESS
    if state is not GfnState.SECURE:
        return UCode.U_RETRY if state in TRANSIENT else UCode.U_PARAMETER
    svm.apply(gfn, PageEvent.OUT_BEGIN, request.cause)
    svm.map.clear(gfn)
    return None


def _check_page_out(svm: Svm, request: PageRequest) -> UCode | None:
    if request.order != PAGE_SHIFT:
        return UCode.U_P5
    if request.flags:
        return UCode.U_P4
    if offset_in_ram(request.dst_ra, svm.lpid) != request.gpa:
        return UCode.U_P2
    if request.gpa % PAGE_BYTES or not svm.in_slots(gfn_of(request.gpa)):
        return UCode.U_P3
    return None


def _is_whole(ram: NormalRam) -> bool:
    try:
        ram.check_end()
    except HostFault:
        return False
    return True


def _seal(svm: Svm, gfn: int, cause: int) -> UCode:
    try:
        svm.seal_out(gfn)
    except HostFault:
        _keep_page(svm, gfn, cause)
        return UCode.U_RETRY
    svm.apply(gfn, PageEvent.OUT_DONE, cause)
    return UCode.U_SUCCESS


def _keep_page(svm: Svm, gfn: int, cause: int) -> None:
    svm.apply(gfn, PageEvent.OUT_FAILED, cause)
    svm.map_secure(gfn)


def _give_back(svm: Svm, gfn: int) -> UCode:
    try:
        svm.give_back(gfn)
    except HostFault:
        return UCode.U_RETRY
    return UCode.U_SUCCESS


async def page_inval(partition: Partition, svm: Svm, gpa: int, order: int, cause: int) -> UCode:
    """UV_PAGE_INVAL: the hypervisor takes the normal frame of a shared page away."""
    if order != PAGE_SHIFT:
        return UCode.U_P3
    if svm.phase is SvmPhase.ABORTING:
        return UCode.U_STATE
    gfn = gfn_of(gpa)
    if gpa % PAGE_BYTES or not svm.in_slots(gfn) or svm.states[gfn] not in _INVALIDATABLE:
        return UCode.U_P2
    state = svm.states[gfn]
    svm.apply(gfn, PageEvent.HV_INVAL, cause)
    if state in (GfnState.SHARED, GfnState.SHARED_INV):
        # Again for a page without frame: the guest may not have acknowledged the first time.
        svm.map.clear(gfn)
        if not await partition.invalidator.invalidate([gfn], cause):
            return UCode.U_RETRY
    return UCode.U_SUCCESS


def _overlap(a: Slot, b: Slot) -> bool:
    return a.gfn < b.gfn + b.n_pages and b.gfn < a.gfn + a.n_pages
