"""swiotlb, page allocator and DMA window of the model kernel over plain memory."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codes import HCode
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from services.guest.exits import Exit, Hypercall, Pause
from services.guest.model.cpu import IMMEDIATE_TRIES, Busy, Cpu, Panic
from services.guest.model.iommu import IO_PAGE_BYTES, IoWindow
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.state import BusWindow, Pages, Pool, Window
from services.guest.model.swiotlb import (
    MIN_SLOTS,
    SEGMENT_BYTES,
    SEGMENT_SLOTS,
    SLOT_BYTES,
    Direction,
    Swiotlb,
)
from tests.unit.model_cpu import RAM_BYTES, make_cpu

T = TypeVar("T")
BUFFER = 6 << 20


def make_pages(cpu: Cpu) -> PageAllocator:
    pages = PageAllocator(cpu, Pages())
    pages.set_up(RAM_BYTES, [(BUFFER, RAM_BYTES - BUFFER)])
    return pages


def make_pool(n_slots: int = MIN_SLOTS, n_areas: int = 1) -> tuple[Cpu, Swiotlb, Pool]:
    cpu = make_cpu()
    state = Pool()
    pool = Swiotlb(cpu, state)
    pool.set_up(make_pages(cpu), n_slots, n_areas)
    return cpu, pool, state


def test_a_from_device_slot_is_zero_and_only_what_the_device_reported_comes_back() -> None:
    cpu, pool, _ = make_pool()
    cpu.store(BUFFER, b"private!" * 512)
    stale = pool.map(BUFFER, 4096, Direction.TO_DEVICE)
    assert stale is not None
    pool.unmap(stale, 4096, Direction.TO_DEVICE, 0)

    slots = [pool.map(BUFFER, 4096, Direction.FROM_DEVICE) for _ in range(3)]
    for slot in slots:
        assert slot is not None
        assert cpu.load(slot, 4096) == bytes(4096)
    slot = slots[0]
    assert slot is not None
    cpu.store(slot, b"D" * 4096)
    pool.unmap(slot, 4096, Direction.FROM_DEVICE, 100)

    assert cpu.load(BUFFER, 104) == b"D" * 100 + b"ate!"


def test_a_to_device_slot_has_the_buffer_and_never_copies_back() -> None:
    cpu, pool, _ = make_pool()
    cpu.store(BUFFER + 5, b"out" * 1000)
    slot = pool.map(BUFFER + 5, 3000, Direction.TO_DEVICE)
    assert slot is not None
    assert cpu.load(slot, 3000) == b"out" * 1000
    cpu.store(slot, b"X" * 3000)
    pool.unmap(slot, 3000, Direction.TO_DEVICE, 3000)
    assert cpu.load(BUFFER + 5, 3000) == b"out" * 1000


def test_sync_goes_both_ways_and_is_clipped_to_the_mapping() -> None:
    cpu, pool, _ = make_pool()
    cpu.store(BUFFER, b"a" * 5000)
    slot = pool.map(BUFFER, 5000, Direction.BIDIRECTIONAL)
    assert slot is not None
    cpu.store(BUFFER, b"b" * 5000)
    pool.sync_for_device(slot + 2100, 100, Direction.BIDIRECTIONAL)
    assert cpu.load(slot + 2099, 102) == b"a" + b"b" * 100 + b"a"
    cpu.store(slot + 4990, b"c" * 100)
    pool.sync_for_cpu(slot + 4990, 100, Direction.BIDIRECTIONAL)
    assert cpu.load(BUFFER + 4980, 30) == b"b" * 10 + b"c" * 10 + bytes(10)


def test_a_full_pool_gives_no_slot_and_works_again_after_an_unmap() -> None:
    _, pool, state = make_pool()
    slots = [pool.map(BUFFER, SEGMENT_BYTES, Direction.TO_DEVICE) for _ in range(MIN_SLOTS // SEGMENT_SLOTS)]
    assert None not in slots
    assert pool.map(BUFFER, 1, Direction.TO_DEVICE) is None
    assert state.n_full == 1
    assert slots[2] is not None
    pool.unmap(slots[2], SEGMENT_BYTES, Direction.TO_DEVICE, 0)
    assert pool.map(BUFFER, SEGMENT_BYTES, Direction.TO_DEVICE) == slots[2]


def test_an_area_that_is_full_is_left_for_the_next() -> None:
    _, pool, state = make_pool(n_areas=4)
    found = [pool.map(BUFFER, SEGMENT_BYTES, Direction.TO_DEVICE, cpu_number=3) for _ in range(4)]
    segments = [(slot - state.base) // SEGMENT_BYTES for slot in found if slot is not None]
    assert segments == [3, 0, 1, 2]


def test_what_is_no_mapping_is_a_panic() -> None:
    _, pool, state = make_pool()
    slot = pool.map(BUFFER, 100, Direction.TO_DEVICE)
    assert slot is not None
    for addr, n_bytes in ((slot, 99), (slot + SLOT_BYTES, 100), (BUFFER, 100), (slot + 200, 100)):
        with pytest.raises(Panic):
            pool.unmap(addr, n_bytes, Direction.TO_DEVICE, 0)
    for n_bytes in (0, SEGMENT_BYTES + 1):
        with pytest.raises(Panic):
            pool.map(BUFFER, n_bytes, Direction.TO_DEVICE)
    assert state.n_slots == MIN_SLOTS


def test_the_pool_halves_until_it_fits() -> None:
    _, _, state = make_pool(n_slots=1 << 14)
    assert state.n_slots == 1 << 11


Operations = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.integers(1, SEGMENT_BYTES), st.integers(0, 7)),
        st.tuples(st.just("unmap"), st.integers(0, 1000), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(Operations, st.sampled_from([1, 2, 4]))
def test_slots_never_overlap_cross_a_segment_or_get_lost(operations: list[tuple[str, int, int]], n_areas: int) -> None:
    cpu, pool, state = make_pool(n_areas=n_areas)
    live: dict[int, int] = {}
    for kind, value, cpu_number in operations:
        if kind == "map":
            slot = pool.map(BUFFER, value, Direction.FROM_DEVICE, cpu_number=cpu_number)
            if slot is None:
                continue
            assert pool.owns(slot, value)
            assert (slot - state.base) // SEGMENT_BYTES == (slot + value - 1 - state.base) // SEGMENT_BYTES
            assert value < PAGE_BYTES or slot % PAGE_BYTES == 0
            for other, n_bytes in live.items():
                assert slot + value <= other or other + n_bytes <= slot
            live[slot] = value
        elif live:
            slot = sorted(live)[value % len(live)]
            pool.unmap(slot, live.pop(slot), Direction.FROM_DEVICE, 0)
    assert pool.n_used() == sum(-(-n_bytes // SLOT_BYTES) for n_bytes in live.values())
    for slot, n_bytes in live.items():
        pool.unmap(slot, n_bytes, Direction.FROM_DEVICE, 0)
    lengths = memoryview(cpu.load(state.list_table, 2 * state.n_slots)).cast("H")
    assert lengths.tolist() == list(range(SEGMENT_SLOTS, 0, -1)) * (state.n_slots // SEGMENT_SLOTS)


# -- pages ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=50))
def test_pages_are_handed_out_once_and_come_back(operations: list[tuple[bool, int]]) -> None:
    cpu = make_cpu()
    state = Pages()
    pages = PageAllocator(cpu, state)
    pages.set_up(RAM_BYTES, [(BUFFER, RAM_BYTES - BUFFER), (0x30000, 1)])
    n_free = state.n_free
    live: dict[int, int] = {}
    for is_alloc, value in operations:
        if is_alloc and (gpa := pages.alloc(value)) is not None:
            taken = {page for start, count in live.items() for page in range(start, start + count)}
            assert taken.isdisjoint(range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + value))
            assert gpa and gpa + value * PAGE_BYTES <= BUFFER
            assert not gpa <= 0x30000 < gpa + value * PAGE_BYTES
            live[gpa >> PAGE_SHIFT] = value
        elif not is_alloc and live:
            first = sorted(live)[value % len(live)]
            pages.free(first << PAGE_SHIFT, live.pop(first))
    assert state.n_free == n_free - sum(live.values()) == pages.statistics()["free"]


def test_a_double_free_and_an_empty_memory_are_panics() -> None:
    pages = make_pages(make_cpu())
    gpa = pages.must_alloc(2)
    pages.free(gpa, 2)
    with pytest.raises(Panic):
        pages.free(gpa, 2)
    with pytest.raises(Panic):
        pages.must_alloc(1000)


def test_reservations_beyond_memory_are_clipped_to_it() -> None:
    state = Pages()
    PageAllocator(make_cpu(), state).set_up(RAM_BYTES, [(RAM_BYTES - PAGE_BYTES, 1 << 62), (1 << 62, 5)])
    assert state.n_free == (RAM_BYTES >> PAGE_SHIFT) - 3


def test_pages_change_their_use_only_from_what_was_said() -> None:
    pages = make_pages(make_cpu())
    gpa = pages.must_alloc(1)
    gfn = gpa >> PAGE_SHIFT
    pages.change(gfn, 2, PageUse.FREE, PageUse.LENT)
    assert [pages.use_of(gfn), pages.use_of(gfn + 1)] == [PageUse.KERNEL, PageUse.LENT]
    pages.change(gfn, 10_000, PageUse.LENT, PageUse.FREE)
    assert pages.use_of(gfn + 1) is PageUse.FREE


# -- DMA window -------------------------------------------------------------------------------------------------------


def drive(step: Generator[Exit, list[int], T], answers: dict[int, int], log: list[tuple[int, tuple[int, ...]]]) -> T:
    """Run a step; each hypercall number gets its code."""
    result: list[int] | None = None
    while True:
        try:
            exit_ = next(step) if result is None else step.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        result = None
        if isinstance(exit_, Hypercall):
            log.append((exit_.number, exit_.args))
            result = [answers.get(exit_.number, 0)]
        else:
            assert exit_ is Pause.SLICE_END


def make_window() -> tuple[IoWindow, Window]:
    cpu = make_cpu()
    state = Window()
    window = IoWindow(cpu, state)
    window.set_up(make_pages(cpu), BusWindow(liobn=0x80000000, n_bytes=1 << 30))
    return window, state


def test_a_mapping_sets_one_tce_for_each_io_page_and_keeps_the_offset() -> None:
    window, _ = make_window()
    log: list[tuple[int, tuple[int, ...]]] = []
    ioba = drive(window.map(BUFFER + 0x345, 2 * IO_PAGE_BYTES, Direction.TO_DEVICE), {}, log)
    assert ioba == IO_PAGE_BYTES + 0x345
    assert log == [(0x20, (0x80000000, (1 + n) << 12, BUFFER + (n << 12) | 1)) for n in range(3)]
    log.clear()
    drive(window.unmap(ioba, 3), {}, log)
    assert log == [(0x138, (0x80000000, IO_PAGE_BYTES, 0, 3))]
    assert window.n_used() == 0


def test_a_page_is_mapped_to_itself_where_nothing_else_is_and_the_window_reaches() -> None:
    window, state = make_window()
    log: list[tuple[int, tuple[int, ...]]] = []
    gpa = 5 * IO_PAGE_BYTES

    assert drive(window.map_to_itself(gpa, 2 * IO_PAGE_BYTES, Direction.BIDIRECTIONAL), {}, log) is True
    assert log == [(0x20, (0x80000000, at, at | 3)) for at in (gpa, gpa + IO_PAGE_BYTES)]
    log.clear()
    for taken in (gpa - IO_PAGE_BYTES, gpa + IO_PAGE_BYTES, 0, (state.n_io_pages - 1) * IO_PAGE_BYTES):
        assert drive(window.map_to_itself(taken, 2 * IO_PAGE_BYTES, Direction.BIDIRECTIONAL), {}, log) is False
    assert (log, window.n_used()) == ([], 2)
    drive(window.unmap(gpa, 2), {}, log)
    assert window.n_used() == 0


def test_without_stuff_tce_each_entry_is_cleared_alone() -> None:
    window, _ = make_window()
    log: list[tuple[int, tuple[int, ...]]] = []
    ioba = drive(window.map(BUFFER, 1, Direction.FROM_DEVICE), {}, log)
    assert ioba is not None
    drive(window.unmap(ioba, 1), {0x138: HCode.H_FUNCTION}, log)
    assert log[-1] == (0x20, (0x80000000, ioba, 0))


def test_a_hypercall_that_stays_busy_leaves_nothing_mapped() -> None:
    window, _ = make_window()
    log: list[tuple[int, tuple[int, ...]]] = []
    with pytest.raises(Busy):
        drive(window.map(BUFFER, 1, Direction.FROM_DEVICE), {0x20: HCode.H_BUSY}, log)
    assert len(log) == IMMEDIATE_TRIES
    assert window.n_used() == 0


def test_a_full_window_gives_none() -> None:
    window, state = make_window()
    assert drive(window.map(BUFFER, IO_PAGE_BYTES * state.n_io_pages, Direction.TO_DEVICE), {}, []) is None
