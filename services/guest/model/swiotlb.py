"""swiotlb: bounce slots of 2 KiB in a pool that the device may read and write.

Slots are in segments of 128; a mapping never crosses a segment. The slot tables lie in (private) guest RAM:

| table | entry | holds                                                                              |
|-------|-------|------------------------------------------------------------------------------------|
| list  | u16   | contiguous free slots from here to the segment's end; 0 when the slot is taken      |
| orig  | u64   | what the slot stands for                                                            |
| size  | u32   | bytes of the mapping from this slot on                                              |
| area  | u32x2 | next slot to look at (relative to the area), slots used                              |

Copy rules: Linux copies the original into the slot whatever the direction. This pool departs from it in one point: a
FROM_DEVICE slot is filled with zeros when it is mapped, and only what the device reported is copied back, so bytes
that were private before never become visible. Source: Linux kernel/dma/swiotlb.c.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from services.guest.model.cpu import Cpu, Panic
from services.guest.model.pages import PageAllocator, PageUse, pages_for
from services.guest.model.state import Pool

SLOT_SHIFT = 11
SLOT_BYTES = 1 << SLOT_SHIFT
SEGMENT_SLOTS = 128
SEGMENT_BYTES = SEGMENT_SLOTS * SLOT_BYTES
"""The largest mapping."""
DEFAULT_SLOTS = 4096
MIN_SLOTS = 512
"""1 MiB: the pool is never smaller."""

_AREA = struct.Struct("<II")
_FREE_RUN = struct.pack(f"<{SEGMENT_SLOTS}H", *range(SEGMENT_SLOTS, 0, -1))


class Direction(IntEnum):
    """Which way a streaming mapping goes."""

    BIDIRECTIONAL = 0
    TO_DEVICE = 1
    FROM_DEVICE = 2


class Swiotlb:
    """The pool over the tables that `state` names."""

    def __init__(self, cpu: Cpu, state: Pool) -> None:
        self._cpu = cpu
        self._state = state

    def set_up(self, pages: PageAllocator, n_slots: int, n_areas: int, *, at_top: bool = False) -> None:
        """Take memory for the pool (`at_top`: the highest there is) and its tables; raises Panic.

        `n_slots` is rounded up to whole segments and 1 MiB, and halved until there is enough memory; `n_areas` is
        rounded to a power of two that leaves a segment each.
        """
        n_slots = max(MIN_SLOTS, 1 << max(0, n_slots - 1).bit_length())
        alloc = pages.alloc_top if at_top else pages.alloc
        while (base := alloc(pages_for(n_slots * SLOT_BYTES), PageUse.SHARED)) is None:
            n_slots //= 2
            if n_slots < MIN_SLOTS:
                raise Panic("no memory for the swiotlb pool")
        state = self._state
        state.base, state.n_slots, state.shared_pages = base, n_slots, 0
        state.n_areas = min(1 << max(0, n_areas - 1).bit_length(), n_slots // SEGMENT_SLOTS)
        tables = pages.must_alloc(pages_for(14 * n_slots + _AREA.size * state.n_areas))
        state.orig_table = tables
        state.size_table = state.orig_table + 8 * n_slots
        state.list_table = state.size_table + 4 * n_slots
        state.area_table = state.list_table + 2 * n_slots
        self._cpu.fill(tables, 12 * n_slots)
        self._cpu.store(state.list_table, _FREE_RUN * (n_slots // SEGMENT_SLOTS))
        self._cpu.fill(state.area_table, _AREA.size * state.n_areas)

    @property
    def n_pages(self) -> int:
        """Pages of the pool."""
        return self._state.n_slots * SLOT_BYTES >> PAGE_SHIFT

    def owns(self, gpa: int, n_bytes: int) -> bool:
        """Whether the range lies in the pool."""
        state = self._state
        return state.base <= gpa and gpa + n_bytes <= state.base + state.n_slots * SLOT_BYTES

    # -- mappings -----------------------------------------------------------------------------------------------

    def map(self, orig: int, n_bytes: int, direction: Direction, *, cpu_number: int = 0) -> int | None:
        """A slot that stands for `n_bytes` at `orig`; None when the pool is full."""
        if not 0 < n_bytes <= SEGMENT_BYTES:
            raise Panic(f"a swiotlb mapping of {n_bytes} bytes")
        n_slots = (n_bytes + SLOT_BYTES - 1) >> SLOT_SHIFT
        state = self._state
        for turn in range(state.n_areas):
            area = (cpu_number + turn) % state.n_areas
            index = self._find(area, n_slots, n_bytes)
            if index is not None:
                break
        else:
            state.n_full += 1
            return None
        self._take(index, n_slots)
        self._remember(index, n_slots, orig, n_bytes)
        slot = state.base + (index << SLOT_SHIFT)
        if direction is Direction.FROM_DEVICE:
            self._cpu.fill(slot, n_bytes)
        else:
            self._cpu.copy(slot, orig, n_bytes)
            state.bytes_bounced += n_bytes
        return slot

    def unmap(self, slot: int, n_bytes: int, direction: Direction, written_bytes: int) -> None:
        """Copy back what the device wrote (at most the mapping) and free the slot; raises Panic for no mapping."""
        index, orig, mapped_bytes = self._recall(slot)
        if mapped_bytes != n_bytes:
            raise Panic(f"swiotlb unmaps {n_bytes} of {mapped_bytes} bytes at {slot:#x}")
        if direction is not Direction.TO_DEVICE:
            self._copy_back(orig, slot, min(written_bytes, n_bytes))
        self._release(index, (n_bytes + SLOT_BYTES - 1) >> SLOT_SHIFT)

    def sync_for_cpu(self, gpa: int, n_bytes: int, direction: Direction) -> None:
        """Copy a part of a mapping out, whatever the device wrote so far; clipped to the mapping."""
        if direction is not Direction.TO_DEVICE:
            _, orig, left_bytes = self._recall(gpa)
            self._copy_back(orig, gpa, min(n_bytes, left_bytes))

    def sync_for_device(self, gpa: int, n_bytes: int, direction: Direction) -> None:
        """Copy a part of a mapping in; clipped to the mapping."""
        if direction is Direction.FROM_DEVICE:
            return
        _, orig, left_bytes = self._recall(gpa)
        self._cpu.copy(gpa, orig, min(n_bytes, left_bytes))
        self._state.bytes_bounced += min(n_bytes, left_bytes)

    def _copy_back(self, orig: int, slot: int, n_bytes: int) -> None:
        if n_bytes:
            self._cpu.copy(orig, slot, n_bytes)
            self._state.bytes_bounced += n_bytes

    # -- slot tables --------------------------------------------------------------------------------------------

    def _find(self, area: int, n_slots: int, n_bytes: int) -> int | None:
        """The first fitting slot of an area, from where its last search ended; requests of a page and more begin on
        a page boundary."""
        state = self._state
        area_slots = state.n_slots // state.n_areas
        first = area * area_slots
        start, used = _AREA.unpack(self._cpu.load(state.area_table + _AREA.size * area, _AREA.size))
        if used + n_slots > area_slots:
            return None
        stride = PAGE_BYTES >> SLOT_SHIFT if n_bytes >= PAGE_BYTES else 1
        lengths = memoryview(self._cpu.load(state.list_table + 2 * first, 2 * area_slots)).cast("H")
        found = self._search(lengths, start, area_slots, n_slots, stride)
        if found is None:
            found = self._search(lengths, 0, start, n_slots, stride)
        if found is None:
            return None
        after = (found + n_slots) % area_slots
        self._cpu.store(state.area_table + _AREA.size * area, _AREA.pack(after, used + n_slots))
        return first + found

    @staticmethod
    def _search(lengths: memoryview, start: int, end: int, n_slots: int, stride: int) -> int | None:
        index = -(-start // stride) * stride
        while index < end:
            if lengths[index] >= n_slots:
                return index
            index += stride
        return None

    def _segment(self, index: int) -> tuple[int, memoryview]:
        first = index - index % SEGMENT_SLOTS
        data = self._cpu.load(self._state.list_table + 2 * first, 2 * SEGMENT_SLOTS)
        return first, memoryview(data).cast("H")

    def _take(self, index: int, n_slots: int) -> None:
        first, lengths = self._segment(index)
        begin = _run_begin(lengths, index - first)
        n_before = index - first - begin
        self._store_lengths(first + begin, _free_run(n_before) + bytes(2 * n_slots))

    def _release(self, index: int, n_slots: int) -> None:
        first, lengths = self._segment(index)
        begin = _run_begin(lengths, index - first)
        end = index - first + n_slots
        n_after = lengths[end] if end < SEGMENT_SLOTS else 0
        self._store_lengths(first + begin, _free_run(end + n_after - begin)[: 2 * (end - begin)])
        state = self._state
        self._cpu.fill(state.size_table + 4 * index, 4 * n_slots)
        area = index // (state.n_slots // state.n_areas)
        start, used = _AREA.unpack(self._cpu.load(state.area_table + _AREA.size * area, _AREA.size))
        self._cpu.store(state.area_table + _AREA.size * area, _AREA.pack(start, used - n_slots))

    def _store_lengths(self, index: int, data: bytes) -> None:
        self._cpu.store(self._state.list_table + 2 * index, data)

    def _remember(self, index: int, n_slots: int, orig: int, n_bytes: int) -> None:
        origins = range(orig, orig + n_slots * SLOT_BYTES, SLOT_BYTES)
        sizes = range(n_bytes, n_bytes - n_slots * SLOT_BYTES, -SLOT_BYTES)
        self._cpu.store(self._state.orig_table + 8 * index, struct.pack(f"<{n_slots}Q", *origins))
        self._cpu.store(self._state.size_table + 4 * index, struct.pack(f"<{n_slots}I", *sizes))

    def _recall(self, gpa: int) -> tuple[int, int, int]:
        """(slot index, original address, bytes left in the mapping) of a pool address; raises Panic."""
        if not self.owns(gpa, 1):
            raise Panic(f"{gpa:#x} is not in the swiotlb pool")
        index, offset = divmod(gpa - self._state.base, SLOT_BYTES)
        n_bytes = int.from_bytes(self._cpu.load(self._state.size_table + 4 * index, 4), "little")
        if n_bytes <= offset:
            raise Panic(f"swiotlb slot {index} is not mapped")
        orig = int.from_bytes(self._cpu.load(self._state.orig_table + 8 * index, 8), "little")
        return index, orig + offset, n_bytes - offset

    def n_used(self) -> int:
        """Slots taken now."""
        state = self._state
        table = self._cpu.load(state.area_table, _AREA.size * state.n_areas)
        return sum(used for _, used in _AREA.iter_unpack(table))


def _run_begin(lengths: memoryview, index: int) -> int:
    """Where the run of free slots that ends just before `index` begins."""
    while index and lengths[index - 1]:
        index -= 1
    return index


def _free_run(n_slots: int) -> bytes:
    """The list entries of `n_slots` free slots in a row."""
    return _FREE_RUN[2 * (SEGMENT_SLOTS - n_slots) :]
