"""A 32-bit DMA window: IO pages of 4 KiB, a byte a page in guest RAM, mapped by H_PUT_TCE.

H_PUT_TCE_INDIRECT is not used: its list page is private memory in an SVM. Source: PAPR 14.5.4; Linux
arch/powerpc/kernel/iommu.c.
"""

from __future__ import annotations

from protocol.codes import HCode
from protocol.hcalls import H_PUT_TCE, H_STUFF_TCE
from services.guest.model.cpu import Busy, Cpu, Panic, Step
from services.guest.model.pages import PageAllocator, pages_for
from services.guest.model.state import BusWindow, Window
from services.guest.model.swiotlb import Direction

IO_PAGE_SHIFT = 12
IO_PAGE_BYTES = 1 << IO_PAGE_SHIFT
MAX_IO_PAGES = 1 << 14
"""This kernel uses at most the first 64 MiB of the window."""
MAX_STUFFED_TCES = 512
"""H_STUFF_TCE takes no more at once."""
TCE_READ = 1
TCE_WRITE = 2
_PERMISSION = {
    Direction.TO_DEVICE: TCE_READ,
    Direction.FROM_DEVICE: TCE_WRITE,
    Direction.BIDIRECTIONAL: TCE_READ | TCE_WRITE,
}


class IoWindow:
    """A window that some `ibm,dma-window` names; `map` and `unmap` make the hypercalls."""

    def __init__(self, cpu: Cpu, state: Window) -> None:
        self._cpu = cpu
        self._state = state

    @property
    def liobn(self) -> int:
        """The window's table; 0 when there is no window."""
        return self._state.liobn

    def set_up(self, pages: PageAllocator, where: BusWindow, *, hint: int = 1) -> None:
        """Take the window `where`, all of it free; its first page stays unused, so that no bus address is 0.

        The search for the first mapping begins at IO page `hint`.
        """
        n_io_pages = min(where.n_bytes >> IO_PAGE_SHIFT, MAX_IO_PAGES)
        if n_io_pages < 2:
            raise Panic(f"the DMA window of liobn {where.liobn:#x} has no room")
        state = self._state
        state.liobn, state.base, state.n_io_pages, state.hint = where.liobn, where.base, n_io_pages, hint
        state.table = pages.must_alloc(pages_for(n_io_pages))
        self._cpu.fill(state.table, n_io_pages)
        self._cpu.fill(state.table, 1, 1)

    def clear_all(self) -> Step[None]:
        """Forget whatever an earlier stage left mapped; at most 32 hypercalls."""
        for first in range(0, self._state.n_io_pages, MAX_STUFFED_TCES):
            count = min(MAX_STUFFED_TCES, self._state.n_io_pages - first)
            yield from self._clear(self._state.base + (first << IO_PAGE_SHIFT), count)

    @staticmethod
    def n_io_pages(gpa: int, n_bytes: int) -> int:
        """IO pages that a range touches."""
        return ((gpa + n_bytes - 1) >> IO_PAGE_SHIFT) - (gpa >> IO_PAGE_SHIFT) + 1

    def map(self, gpa: int, n_bytes: int, direction: Direction) -> Step[int | None]:
        """The bus address of `n_bytes` at `gpa`; None when the window is full. Raises Busy, with nothing mapped."""
        count = self.n_io_pages(gpa, n_bytes)
        first = self._alloc(count)
        if first is None:
            return None
        yield from self._map_at(first, count, gpa, direction)
        return self._state.base + (first << IO_PAGE_SHIFT) | gpa & IO_PAGE_BYTES - 1

    def map_to_itself(self, gpa: int, n_bytes: int, direction: Direction) -> Step[bool]:
        """Map `n_bytes` at `gpa` so that their bus address is `gpa`; False when that is taken or outside the window.

        Raises Busy, with nothing mapped.
        """
        count = self.n_io_pages(gpa, n_bytes)
        first = gpa - self._state.base >> IO_PAGE_SHIFT
        if not self._take(first, count):
            return False
        yield from self._map_at(first, count, gpa, direction)
        return True

    def _map_at(self, first: int, count: int, gpa: int, direction: Direction) -> Step[None]:
        """Store the entries of IO pages that were taken; raises Busy, with nothing mapped and nothing taken."""
        ioba = self._state.base + (first << IO_PAGE_SHIFT)
        tce = gpa & -IO_PAGE_BYTES | _PERMISSION[direction]
        for n_mapped in range(count):
            step = n_mapped << IO_PAGE_SHIFT
            try:
                code, *_ = yield from self._cpu.hcall(H_PUT_TCE, self._state.liobn, ioba + step, tce + step)
            except Busy:
                yield from self._clear(ioba, n_mapped)
                self._free(first, count)
                raise
            if code != HCode.H_SUCCESS:
                raise Panic(f"H_PUT_TCE of {ioba + step:#x} gave {code}")

    def unmap(self, addr: int, count: int) -> Step[None]:
        """Take `count` IO pages of a mapping from the device."""
        ioba = addr & -IO_PAGE_BYTES
        yield from self._clear(ioba, count)
        self._free((ioba - self._state.base) >> IO_PAGE_SHIFT, count)

    def _clear(self, ioba: int, count: int) -> Step[None]:
        if not count:
            return
        liobn = self._state.liobn
        try:
            code, *_ = yield from self._cpu.hcall(H_STUFF_TCE, liobn, ioba, 0, count)
        except Busy:
            # A half-finished unmap cannot be repeated as a step, and a mapping that stays must not be reused.
            raise Panic("H_STUFF_TCE stays busy") from None
        if code != HCode.H_FUNCTION:
            if code != HCode.H_SUCCESS:
                raise Panic(f"H_STUFF_TCE of {ioba:#x} gave {code}")
            return
        for n in range(count):
            code, *_ = yield from self._cpu.hcall(H_PUT_TCE, liobn, ioba + (n << IO_PAGE_SHIFT), 0)
            if code != HCode.H_SUCCESS:
                raise Panic(f"H_PUT_TCE 0 of {ioba:#x} gave {code}")

    def _alloc(self, count: int) -> int | None:
        state = self._state
        table = self._cpu.load(state.table, state.n_io_pages)
        found = table.find(bytes(count), state.hint)
        if found < 0:
            found = table.find(bytes(count))
        if found < 0:
            return None
        self._cpu.fill(state.table + found, count, 1)
        state.hint = found + count
        return found

    def _take(self, first: int, count: int) -> bool:
        state = self._state
        if first < 1 or first + count > state.n_io_pages or any(self._cpu.load(state.table + first, count)):
            return False
        self._cpu.fill(state.table + first, count, 1)
        return True

    def _free(self, first: int, count: int) -> None:
        self._cpu.fill(self._state.table + first, count)

    def n_used(self) -> int:
        """IO pages mapped now."""
        return self._cpu.load(self._state.table, self._state.n_io_pages).count(1) - 1
