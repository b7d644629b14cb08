"""Sharing: how a page of a secure VM becomes visible to the host, and stops being so. Only the VM itself asks (S2).

    UV_SHARE_PAGE   SECURE -> HV_SHARING -> (H_SVM_PAGE_IN shared; kvm answers with UV_PAGE_IN) HV_SHARED -> SHARED
    UV_UNSHARE_PAGE SHARED -> HV_UNSHARING -> (H_SVM_PAGE_IN; kvm drops its frame) HV_UNSHARED -> SECURE

A range is all or nothing. A page that changes is zeroed on the side that the guest will see, before it is mapped; one
that already is in the asked state keeps its content (the document and the real code differ here; this is the code's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from protocol.codes import HCode, UCode
from protocol.errors import CallTimeout, HostFault, PefboxError
from protocol.geometry import PAGE_BYTES
from protocol.hcalls import H_PAGE_IN_NONSHARED, H_PAGE_IN_SHARED
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.page_requests import always, ask_page_in, for_each_page
from services.ultravisor.page_state import TRANSIENT, GfnState, PageEvent
from services.ultravisor.partition import Partition
from services.ultravisor.svm import Svm

MAX_REFUSALS = 3
_PAGES_AT_ONCE = 64

_SMALL_PAGES = PAGE_BYTES >> 12
"""Pages of 4 KiB in one of ours."""

_EXPLICIT = frozenset({GfnState.SHARED, GfnState.SHARED_INV})
_IMPLICIT = frozenset(
    {
        GfnState.SHARED_IMPLICIT,
        GfnState.SHARED_IMPLICIT_INV,
        GfnState.PSEUDO_SHARED,
        GfnState.PSEUDO_SHARED_INV,
    }
)


class SvmBroken(PefboxError):
    """The secure VM cannot go on; `reason` goes to the audit log."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


async def share(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfn: int, n_pages: int, cause: int) -> UCode:
    """UV_SHARE_PAGE for a checked range; raises SvmBroken."""
    refused = check_range(svm, gfn, n_pages)
    if refused is not None:
        return refused
    pages = range(gfn, gfn + n_pages)
    if any(svm.states[page] in TRANSIENT for page in pages):
        return UCode.U_RETRY
    for page in (p for p in pages if svm.states[p] is GfnState.PAGED_OUT):
        if not await bring_in(partition, svm, hypervisor, page, cause):
            return UCode.U_RETRY
    changing = [page for page in pages if svm.states[page] is GfnState.SECURE]
    if any(svm.states[page] in TRANSIENT | {GfnState.PAGED_OUT} for page in pages):
        return UCode.U_RETRY
    return await _share_pages(partition, svm, hypervisor, changing, cause)


async def _share_pages(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfns: list[int], cause: int) -> UCode:
    _begin(svm, gfns, PageEvent.SHARE, cause)
    if gfns and not await partition.invalidator.invalidate(gfns, cause):
        await _revert_share(partition, svm, hypervisor, gfns, cause)
        return UCode.U_RETRY
    code = await _page_in_all(partition, hypervisor, gfns, H_PAGE_IN_SHARED, cause)
    if code != HCode.H_SUCCESS or not await _zero_shared(svm, gfns):
        await _revert_share(partition, svm, hypervisor, gfns, cause)
        return UCode.U_RETRY if code == HCode.H_BUSY else UCode.U_PARAMETER
    for page in gfns:
        if svm.apply(page, PageEvent.SHARE_DONE, cause) is GfnState.SHARED:
            svm.map_shared(page)
    return UCode.U_SUCCESS


async def unshare(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfn: int, n_pages: int, cause: int) -> UCode:
    """UV_UNSHARE_PAGE for a checked range; raises SvmBroken."""
    refused = check_range(svm, gfn, n_pages)
    if refused is not None:
        return refused
    pages = range(gfn, gfn + n_pages)
    if any(svm.states[page] in TRANSIENT for page in pages):
        return UCode.U_RETRY
    if any(svm.states[page] in _IMPLICIT for page in pages):
        return UCode.U_P2
    changing = [page for page in pages if svm.states[page] in _EXPLICIT]
    return await _unshare_pages(partition, svm, hypervisor, changing, cause)


async def unshare_all(partition: Partition, svm: Svm, hypervisor: Hypervisor, cause: int) -> UCode:
    """UV_UNSHARE_ALL_PAGES: every page that the guest shared itself; raises SvmBroken."""
    if any(svm.states.counts[state] for state in TRANSIENT):
        return UCode.U_RETRY
    return await _unshare_pages(partition, svm, hypervisor, svm.states.in_state(*_EXPLICIT), cause)


async def _unshare_pages(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfns: list[int], cause: int) -> UCode:
    if not gfns:
        return UCode.U_SUCCESS
    _begin(svm, gfns, PageEvent.UNSHARE, cause)
    if not await partition.invalidator.invalidate(gfns, cause):
        _keep_shared(svm, gfns, cause)
        return UCode.U_RETRY
    for page in gfns:
        partition.mark_dirty(page)
        svm.zero_secure(page)
        await _let_others_work(page)
    if await _page_in_all(partition, hypervisor, gfns, H_PAGE_IN_NONSHARED, cause) != HCode.H_SUCCESS:
        raise SvmBroken("hypervisor-refused-unshare")
    _finish_unshare(svm, gfns, cause)
    return UCode.U_SUCCESS


def _keep_shared(svm: Svm, gfns: Iterable[int], cause: int) -> None:
    for page in gfns:
        if svm.apply(page, PageEvent.UNSHARE_REVERT, cause) is GfnState.SHARED:
            svm.map_shared(page)


async def bring_in(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfn: int, cause: int) -> bool:
    """Have kvm give a paged-out page back; False when it should be tried again. Raises SvmBroken (S3).

    Three refused images of one page end the VM.
    """

    def is_out() -> bool:
        return svm.states[gfn] is GfnState.PAGED_OUT

    code = await _page_in_one(partition, hypervisor, gfn, H_PAGE_IN_NONSHARED, cause, is_out)
    if not is_out():
        return svm.states[gfn] is GfnState.SECURE
    if svm.refused_images.get(gfn, 0) >= MAX_REFUSALS:
        raise SvmBroken("page-integrity")
    _note_withheld(svm, gfn, code)
    return False


async def bring_back_shared(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfn: int, cause: int) -> bool:
    """Have kvm give the normal frame of a shared page back after it took it away; False when it should be tried again.

    Raises SvmBroken when kvm gave none three times. What the frame holds is the host's: it could write there before.
    """
    before = svm.states[gfn]

    def is_taken_away() -> bool:
        return svm.states[gfn] is before

    code = await _page_in_one(partition, hypervisor, gfn, H_PAGE_IN_SHARED, cause, is_taken_away)
    if not is_taken_away():
        return True
    _note_withheld(svm, gfn, code)
    return False


def _note_withheld(svm: Svm, gfn: int, code: int) -> None:
    """kvm was asked for a page and answered `code` without giving it."""
    if code == HCode.H_BUSY:
        return
    svm.withheld[gfn] = svm.withheld.get(gfn, 0) + 1
    if svm.withheld[gfn] >= MAX_REFUSALS:
        raise SvmBroken("page-withheld")


def check_range(svm: Svm, gfn: int, n_pages: int) -> UCode | None:
    """The refusal of a range, or None when it lies wholly inside the slots."""
    if n_pages == 0 or n_pages > svm.n_pages:
        return UCode.U_P3
    return None if svm.in_slots(gfn, n_pages) else UCode.U_P2


def small_pages_hint(svm: Svm, gfn: int, n_pages: int) -> str | None:
    """Why a range outside the slots was probably asked for, or None: Linux counts it in its own page size.

    A kernel with pages of 4 KiB names frames 16 times too high. Where such a frame happens to lie inside memory it
    cannot be told from one that was meant; Linux allocates from the top, so its first call is caught.
    """
    if n_pages == 0 or svm.in_slots(gfn, n_pages):
        return None
    first, last = gfn // _SMALL_PAGES, (gfn + n_pages - 1) // _SMALL_PAGES
    if n_pages > svm.n_pages * _SMALL_PAGES or not svm.in_slots(first, last - first + 1):
        return None
    return (
        f"gfn {gfn:#x} lies outside memory; counted in pages of 4 KiB it lies inside: "
        "a secure kernel needs CONFIG_PPC_64K_PAGES"
    )


def _begin(svm: Svm, gfns: Iterable[int], event: PageEvent, cause: int) -> None:
    for page in gfns:
        svm.apply(page, event, cause)
        svm.map.clear(page)


async def _revert_share(partition: Partition, svm: Svm, hypervisor: Hypervisor, gfns: list[int], cause: int) -> None:
    taken = []
    for page in gfns:
        if svm.apply(page, PageEvent.SHARE_REVERT, cause) is GfnState.SECURE:
            svm.map_secure(page)
        else:
            taken.append(page)
    if await _page_in_all(partition, hypervisor, taken, H_PAGE_IN_NONSHARED, cause) != HCode.H_SUCCESS:
        raise SvmBroken("hypervisor-refused-unshare")
    _finish_unshare(svm, taken, cause)


def _finish_unshare(svm: Svm, gfns: Iterable[int], cause: int) -> None:
    for page in gfns:
        if svm.states[page] is not GfnState.HV_UNSHARED:
            raise SvmBroken("hypervisor-kept-shared-page")
        svm.apply(page, PageEvent.UNSHARE_DONE, cause)
        svm.map_secure(page)


async def _let_others_work(gfn: int) -> None:
    """Once in a while during work on many pages: a whole VM is a second of zeroing."""
    if gfn % _PAGES_AT_ONCE == 0:
        await trio.lowlevel.checkpoint()


async def _zero_shared(svm: Svm, gfns: Iterable[int]) -> bool:
    try:
        for page in gfns:
            if svm.states[page] not in (GfnState.HV_SHARED, GfnState.HV_SHARED_INV):
                return False
            svm.zero_shared(page)
            await _let_others_work(page)
    except HostFault:
        return False
    return True


async def _page_in_all(partition: Partition, hypervisor: Hypervisor, gfns: list[int], flags: int, cause: int) -> int:
    """H_SVM_PAGE_IN for every GFN, several open at once; H_SUCCESS, a refusal, or H_BUSY when that was all."""
    codes: set[int] = set()

    async def one(page: int) -> None:
        codes.add(await _page_in_one(partition, hypervisor, page, flags, cause))

    await for_each_page(gfns, one)
    refusals = codes - {HCode.H_SUCCESS, HCode.H_BUSY}
    if refusals:
        return min(refusals)
    return HCode.H_BUSY if HCode.H_BUSY in codes else HCode.H_SUCCESS


async def _page_in_one(
    partition: Partition,
    hypervisor: Hypervisor,
    gfn: int,
    flags: int,
    cause: int,
    still_wanted: Callable[[], bool] = always,
) -> int:
    try:
        return await ask_page_in(hypervisor, partition.lpid, gfn, flags, cause, still_wanted)
    except CallTimeout as timeout:
        raise SvmBroken(f"hypervisor-silent: {timeout}") from None
