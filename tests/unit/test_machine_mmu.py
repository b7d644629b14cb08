"""Radix translation of the machine engine: what a tree says is what an access gets, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.guest.machine import mmu
from services.guest.machine.mmu import Mmu, ProcessTable, SegmentFault, StorageFault, Use
from services.guest.machine.registers import Dsisr
from tests.unit.radix_tree import LEVEL_BITS_64K, RadixTree

TABLE = 0x1000
TREES = 0x10_0000
USER = 0x0000_1234_5000_0000
KERNEL = 0xC000_0000_0000_0000
ALL = mmu.READ | mmu.WRITE | mmu.EXECUTE
SEEN = mmu.REFERENCED | mmu.CHANGED
SHIFTS = {12: None, 16: LEVEL_BITS_64K, 21: None, 30: None}


class World:
    """Guest real memory as a dict, with a process table of two rows: 0 for the kernel, 7 for a process."""

    PID = 7

    def __init__(self, shift: int = 12) -> None:
        self.memory: dict[int, int] = {}
        bits = SHIFTS[shift] or (13, 9, 9, 9)
        self.kernel = RadixTree(self.memory.__setitem__, TREES, bits)
        self.user = RadixTree(self.memory.__setitem__, TREES + (64 << 20), bits)
        self.memory[TABLE] = self.kernel.row()
        self.memory[TABLE + self.PID * mmu.ROW_BYTES] = self.user.row()
        self.mmu = Mmu(lambda gpa: self.memory.get(gpa, 0), self.memory.__setitem__)
        self.mmu.table = ProcessTable(TABLE, 1 << 12)

    def gpa(self, ea: int, use: Use = Use.LOAD, *, problem: bool = False, pid: int = PID) -> int:
        return self.mmu.translate(ea, use, pid, problem=problem)[0]

    def cause(self, ea: int, use: Use = Use.LOAD, *, problem: bool = False, pid: int = PID) -> int:
        with pytest.raises(StorageFault) as caught:
            self.mmu.translate(ea, use, pid, problem=problem)
        return caught.value.cause


@pytest.mark.parametrize("shift", sorted(SHIFTS))
@given(offset=st.integers(0, (1 << 30) - 1), page=st.integers(0, 1000))
def test_every_page_size_keeps_the_offset_within_the_page(shift: int, offset: int, page: int) -> None:
    world = World(shift)
    offset &= (1 << shift) - 1
    gpa = page << shift
    ea = USER & -(1 << shift)
    world.user.map(ea, gpa, ALL | SEEN, shift)

    assert world.gpa(ea | offset) == gpa | offset


@pytest.mark.parametrize("problem", [False, True])
@pytest.mark.parametrize("use", list(Use))
@given(flags=st.integers(0, 15))
def test_an_access_is_permitted_exactly_when_the_leaf_says_so(use: Use, problem: bool, flags: int) -> None:
    world = World()
    world.user.map(USER, 0x5000, flags)
    needed = {Use.LOAD: mmu.READ, Use.STORE: mmu.WRITE, Use.FETCH: mmu.EXECUTE}[use]
    permitted = bool(flags & needed) and not (problem and flags & mmu.PRIVILEGED)

    if permitted:
        assert world.gpa(USER, use, problem=problem) == 0x5000
    else:
        no_execute = use is Use.FETCH and not (problem and flags & mmu.PRIVILEGED)
        assert world.cause(USER, use, problem=problem) == (Dsisr.NO_EXECUTE if no_execute else Dsisr.PROTECTION)
        assert world.memory[world.user.leaves[USER]] & SEEN == 0


@pytest.mark.parametrize(("rights", "readable"), [(mmu.EXECUTE, False), (mmu.EXECUTE | mmu.READ, True)])
def test_a_fetch_tells_whether_loads_may_follow(rights: int, readable: bool) -> None:
    world = World()
    world.user.map(USER, 0x5000, rights)

    assert world.mmu.translate(USER, Use.FETCH, World.PID, problem=False)[1] == readable


@given(st.lists(st.sampled_from([Use.LOAD, Use.STORE, Use.FETCH]), max_size=6))
def test_r_is_set_by_any_use_and_c_by_stores_alone(uses: list[Use]) -> None:
    world = World()
    world.user.map(USER, 0x5000, ALL)
    stored = False

    for use in uses:
        _, more, _ = world.mmu.translate(USER, use, World.PID, problem=False)
        stored = stored or use is Use.STORE
        assert more == (stored or use is Use.FETCH)

    bits = world.memory[world.user.leaves[USER]] & SEEN
    assert bits == (mmu.REFERENCED if uses else 0) | (mmu.CHANGED if stored else 0)


def test_a_guarded_page_is_not_executed() -> None:
    world = World()
    world.user.map(USER, 0x5000, ALL | mmu.GUARDED)

    assert world.cause(USER, Use.FETCH) == Dsisr.NO_EXECUTE
    assert world.gpa(USER) == 0x5000


def test_the_lower_quadrant_belongs_to_the_process_and_the_upper_to_the_kernel() -> None:
    world = World()
    world.user.map(USER, 0x5000, ALL)
    world.kernel.map(KERNEL | 0x7000, 0x9000, ALL | mmu.PRIVILEGED)

    assert world.gpa(USER) == 0x5000
    assert world.gpa(KERNEL | 0x7000) == 0x9000
    assert world.cause(KERNEL | USER) == Dsisr.NO_PTE
    assert world.cause(USER, pid=0) == Dsisr.NO_PTE


@pytest.mark.parametrize("ea", [1 << 62, 2 << 62, 1 << 52, KERNEL | 1 << 61, 1 << 55])
def test_an_address_outside_every_quadrant_is_a_segment_fault(ea: int) -> None:
    with pytest.raises(SegmentFault):
        World().gpa(ea)


def test_nothing_is_translated_before_a_process_table_is_registered() -> None:
    world = World()
    world.mmu.table = None

    assert world.cause(USER) == Dsisr.NO_PTE


def test_a_process_beyond_the_table_has_no_tree() -> None:
    assert World().cause(USER, pid=1 << 8) == Dsisr.NO_PTE


def test_a_hole_of_the_tree_is_a_missing_entry() -> None:
    world = World()
    world.user.map(USER, 0x5000, ALL)

    assert world.cause(USER + 0x1000) == Dsisr.NO_PTE


@given(st.dictionaries(st.integers(0, 1 << 14).map(lambda n: n * 8), st.integers(0, (1 << 64) - 1)), st.data())
def test_whatever_the_guest_calls_a_tree_ends_in_an_address_or_a_fault(
    words: dict[int, int], data: st.DataObject
) -> None:
    """S5: entries may point anywhere, at themselves too."""
    walked = Mmu(lambda gpa: words.get(gpa % (1 << 17), 0), lambda _gpa, _value: None)
    walked.table = ProcessTable(0, 1 << 12)
    ea = data.draw(st.integers(0, (1 << 64) - 1))

    try:
        gpa, *_ = walked.translate(ea, data.draw(st.sampled_from(Use)), 0, problem=data.draw(st.booleans()))
    except (StorageFault, SegmentFault):
        return
    assert 0 <= gpa < 1 << 57


def test_a_tree_that_leads_back_to_itself_is_a_bad_configuration() -> None:
    memory = {TABLE: (21 >> 3) << 61 | (21 & 7) << 5 | 0x10000 | 5}
    loop = mmu.VALID | 0x10000 | 5
    walked = Mmu(lambda gpa: memory.get(gpa, loop), memory.__setitem__)
    walked.table = ProcessTable(TABLE, 1 << 12)

    with pytest.raises(StorageFault) as caught:
        walked.translate(0, Use.LOAD, 0, problem=False)
    assert caught.value.cause == Dsisr.BAD_CONFIGURATION
