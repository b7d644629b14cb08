"""Memory of a secure VM as the ultravisor reads and writes it for the VM: argument blocks and buffers of RTAS."""

from __future__ import annotations

import trio

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, gfn_of, pages_spanned
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.invalidation import ACKNOWLEDGE_SECONDS
from services.ultravisor.page_state import GfnState
from services.ultravisor.partition import Partition
from services.ultravisor.sharing import bring_back_shared, bring_in
from services.ultravisor.svm import Svm


class GuestMemory:
    """Loads and stores by guest physical address, wherever the page is; raises GuestFault, SvmBroken."""

    def __init__(self, partition: Partition, svm: Svm, hypervisor: Hypervisor, cause: int) -> None:
        self._partition = partition
        self._svm = svm
        self._hypervisor = hypervisor
        self._cause = cause

    async def load(self, gpa: int, n_bytes: int) -> bytes:
        """`n_bytes` from `gpa`."""
        await self._present(gpa, n_bytes)
        parts = []
        for gfn, first, length in _pieces(gpa, n_bytes):
            if self._svm.states[gfn] is GfnState.SHARED:
                parts.append(self._svm.ram.read(gfn * PAGE_BYTES + first, length))
            else:
                parts.append(bytes(self._svm.secure_page(gfn)[first : first + length]))
        return b"".join(parts)

    async def store(self, gpa: int, data: bytes) -> None:
        """Put `data` at `gpa`."""
        await self._present(gpa, len(data))
        at = 0
        for gfn, first, length in _pieces(gpa, len(data)):
            part = data[at : at + length]
            self._partition.mark_dirty(gfn)
            if self._svm.states[gfn] is GfnState.SHARED:
                self._svm.ram.write(gfn * PAGE_BYTES + first, part)
            else:
                self._svm.secure_page(gfn)[first : first + length] = part
            at += length

    async def _present(self, gpa: int, n_bytes: int) -> None:
        if not n_bytes:
            return
        gfns = pages_spanned(gpa, n_bytes)
        if not self._svm.in_slots(gfns.start, len(gfns)):
            raise GuestFault(f"{n_bytes} bytes at {gpa:#x} lie outside the memory slots")
        deadline = trio.current_time() + _REST_SECONDS
        while not await self._brought_in(gfns):
            if trio.current_time() > deadline:
                raise GuestFault(f"a page of {n_bytes} bytes at {gpa:#x} stays in transition")
            await trio.sleep(_PAUSE_SECONDS)

    async def _brought_in(self, gfns: range) -> bool:
        """Whether all can be reached now; False when it should be tried again."""
        for gfn in gfns:
            if self._svm.states[gfn] is GfnState.PAGED_OUT:
                await bring_in(self._partition, self._svm, self._hypervisor, gfn, self._cause)
            elif self._svm.states[gfn] is GfnState.SHARED_INV:
                await bring_back_shared(self._partition, self._svm, self._hypervisor, gfn, self._cause)
        states = {self._svm.states[gfn] for gfn in gfns}
        if not states.isdisjoint(_NOT_THE_GUESTS):
            raise GuestFault(f"a page of gfns {gfns.start:#x} to {gfns.stop - 1:#x} is not the guest's")
        return states <= _REACHABLE


_REST_SECONDS = 2 * ACKNOWLEDGE_SECONDS
"""The host may page a page out at any time: that ends within so long, whether the guest acknowledges or not."""
_PAUSE_SECONDS = 0.002
_NOT_THE_GUESTS = frozenset({GfnState.SHARED_IMPLICIT, GfnState.SHARED_IMPLICIT_INV})
_REACHABLE = frozenset({GfnState.SECURE, GfnState.SHARED, GfnState.PSEUDO_SHARED, GfnState.PSEUDO_SHARED_INV})


def _pieces(gpa: int, n_bytes: int) -> list[tuple[int, int, int]]:
    pieces = []
    while n_bytes > 0:
        first = gpa % PAGE_BYTES
        length = min(n_bytes, PAGE_BYTES - first)
        pieces.append((gfn_of(gpa), first, length))
        gpa += length
        n_bytes -= length
    return pieces
