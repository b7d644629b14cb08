"""The page allocator: 64 KiB pages, a byte a page in guest RAM saying what the page is used for."""

from __future__ import annotations

from collections import Counter
from enum import IntEnum

from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, pages_spanned
from services.guest.model.cpu import Cpu, OutOfMemory, Panic
from services.guest.model.state import Pages


class PageUse(IntEnum):
    """The byte of one page."""

    FREE = 0
    RESERVED = 1
    """Device tree, kernel, initramfs, RTAS, the ultravisor's reservations."""
    KERNEL = 2
    SHARED = 3
    """Given to the host by UV_SHARE_PAGE, or in a normal VM meant for it."""
    BUFFER = 4
    SECRET = 5
    LENT = 6
    """Shared from the prompt."""
    BALLOON = 7
    """In the balloon, or on its way in or out: not the kernel's to touch."""


class PageAllocator:
    """Contiguous runs of pages over the table that `state` names."""

    def __init__(self, cpu: Cpu, state: Pages) -> None:
        self._cpu = cpu
        self._state = state

    def set_up(self, memory_bytes: int, reserved: list[tuple[int, int]]) -> None:
        """Make the table, with page 0, the `reserved` (gpa, bytes) ranges and itself taken; raises Panic."""
        n_pages = memory_bytes >> PAGE_SHIFT
        uses = bytearray(n_pages)
        uses[0] = PageUse.RESERVED
        for gpa, n_bytes in reserved:
            taken = pages_spanned(gpa, n_bytes)
            first, end = min(taken.start, n_pages), min(taken.stop, n_pages)
            uses[first:end] = bytes([PageUse.RESERVED]) * (end - first)
        table_pages = pages_for(n_pages)
        table = bytes(uses).find(bytes(table_pages))
        if table < 0:
            raise Panic("no memory for the page table")
        uses[table : table + table_pages] = bytes([PageUse.KERNEL]) * table_pages
        state = self._state
        state.table, state.n_pages, state.hint, state.n_free = table << PAGE_SHIFT, n_pages, 1, uses.count(0)
        self._cpu.store(state.table, bytes(uses))

    def alloc(self, n_pages: int, use: PageUse = PageUse.KERNEL) -> int | None:
        """The gpa of `n_pages` contiguous pages, contents undefined; None when there is no such run."""
        state = self._state
        uses = self._cpu.load(state.table, state.n_pages)
        found = uses.find(bytes(n_pages), state.hint)
        if found < 0:
            found = uses.find(bytes(n_pages))
        if found < 0:
            return None
        self._cpu.fill(state.table + found, n_pages, use)
        state.hint = found + n_pages
        state.n_free -= n_pages
        return found << PAGE_SHIFT

    def alloc_top(self, n_pages: int, use: PageUse) -> int | None:
        """As `alloc`, of the highest run there is."""
        return self._alloc_below(self._state.n_pages, n_pages, use)

    def _alloc_below(self, end: int, n_pages: int, use: PageUse) -> int | None:
        state = self._state
        found = self._cpu.load(state.table, end).rfind(bytes(n_pages))
        if found < 0:
            return None
        self.mark(found, n_pages, use)
        state.n_free -= n_pages
        return found << PAGE_SHIFT

    def must_alloc(self, n_pages: int, use: PageUse = PageUse.KERNEL) -> int:
        """As `alloc`; raises OutOfMemory."""
        gpa = self.alloc(n_pages, use)
        if gpa is None:
            raise OutOfMemory(f"out of memory: {n_pages} pages wanted, {self._state.n_free} free")
        return gpa

    def must_alloc_apart(self, n_pages: int, use: PageUse) -> int:
        """As `must_alloc`, at the end of the first three quarters of memory: apart from what is taken at either end."""
        gpa = self._alloc_below(self._state.n_pages * 3 // 4, n_pages, use)
        if gpa is None:
            raise OutOfMemory(f"out of memory: {n_pages} pages wanted, {self._state.n_free} free")
        return gpa

    def free(self, gpa: int, n_pages: int) -> None:
        """Give a run back."""
        first = gpa >> PAGE_SHIFT
        uses = self._cpu.load(self._state.table + first, n_pages)
        if PageUse.FREE in uses:
            raise Panic(f"a page of {gpa:#x} is freed twice")
        self._cpu.fill(self._state.table + first, n_pages, PageUse.FREE)
        self._state.hint = min(self._state.hint, first)
        self._state.n_free += n_pages

    def mark(self, gfn: int, n_pages: int, use: PageUse) -> None:
        """Change what pages are used for."""
        self._cpu.fill(self._state.table + gfn, n_pages, use)

    def change(self, gfn: int, n_pages: int, old: PageUse, new: PageUse) -> None:
        """Of these pages turn those of use `old` into `new`; pages outside the table are passed over."""
        n_pages = max(0, min(n_pages, self._state.n_pages - gfn))
        uses = self._cpu.load(self._state.table + gfn, n_pages) if n_pages else b""
        self._state.n_free += uses.count(old) * ((new is PageUse.FREE) - (old is PageUse.FREE))
        if uses:
            self._cpu.store(self._state.table + gfn, uses.replace(bytes([old]), bytes([new])))

    @property
    def n_pages(self) -> int:
        """Pages of RAM."""
        return self._state.n_pages

    @property
    def n_free(self) -> int:
        """Pages that nobody uses."""
        return self._state.n_free

    def find(self, use: PageUse, n_pages: int) -> list[int]:
        """The gpas of the first `n_pages` pages of this use, or of fewer when there are no more."""
        uses = self._cpu.load(self._state.table, self._state.n_pages)
        found: list[int] = []
        gfn = uses.find(use)
        while gfn >= 0 and len(found) < n_pages:
            found.append(gfn << PAGE_SHIFT)
            gfn = uses.find(use, gfn + 1)
        return found

    def use_of(self, gfn: int) -> PageUse:
        """What a page is used for."""
        return PageUse(self._cpu.load(self._state.table + gfn, 1)[0])

    def statistics(self) -> dict[str, int]:
        """Pages by use."""
        counts = Counter(self._cpu.load(self._state.table, self._state.n_pages))
        return {use.name.lower(): counts.get(use, 0) for use in PageUse}


def pages_for(n_bytes: int) -> int:
    """How many pages hold `n_bytes`."""
    return (n_bytes + PAGE_BYTES - 1) >> PAGE_SHIFT
