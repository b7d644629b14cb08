"""The second-level TLB against a model of it: what it answers by itself is what was answered before and still holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import unicorn as uc
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.guest.machine.hooks import FILL_CALLBACK, TlbEntry
from services.guest.machine.registers import Msr
from services.guest.machine.second_level_tlb import N_BLOCK_SETS, N_SETS, SecondLevelTlb, Watched

KERNEL = 0xC000_0000_0000_0000
# Pages that share a set, of both quadrants, and a few that do not.
# Those that MSR.PR takes to the place of another one, too, of pages and of blocks.
SHARING = (0, 1, N_SETS // 2, N_SETS + 1, 8, 16, N_SETS // 4, N_BLOCK_SETS * 4, N_BLOCK_SETS * 8)
PAGES = [base + page * 4096 for base in (0, KERNEL) for page in SHARING]
PLACES = [0x10000, 0x11000, 0x20000]
SHIFTS = [12, 16, 21, 30]
KINDS = [uc.UC_MEM_READ, uc.UC_MEM_WRITE, uc.UC_MEM_FETCH]
MSRS = [0, *(int(bit) for bit in (Msr.IR | Msr.DR, Msr.IR | Msr.DR | Msr.PR, Msr.LE, Msr.EE | Msr.FP))]
PIDS = [0, 1, 2, 1 << 20, 1 << 32]
Key = tuple[int, int, int, int]
"""Page or block, kind of access, MSR and process."""
PAGES_IN_BLOCK = 16
ANY_MSR = int(Msr.IR | Msr.DR | Msr.PR | Msr.LE)


def block_of(page: Key) -> Key:
    """The key of the block around a page."""
    number, kind, msr, pid = page
    return number // PAGES_IN_BLOCK, kind, msr, pid


class Misses(RuleBasedStateMachine):
    """An engine that misses, flushes and changes its registers."""

    @initialize()
    def begin(self) -> None:
        self.flushes = (ctypes.c_uint64 * 3)()
        self.msr, self.pidr = ctypes.c_uint64(0), ctypes.c_uint64(0)
        self.answer: tuple[int, int] | None = (0, 0)
        self.asked = 0
        self.miss = FILL_CALLBACK(self.on_miss)
        watched = Watched(*(ctypes.addressof(each) for each in (self.flushes, self.msr, self.pidr)))
        self.tlb = SecondLevelTlb(watched, self.miss)
        self.fill = FILL_CALLBACK(self.tlb.native.address)
        self.known: dict[Key, tuple[int, int]] = {}
        self.n_answers = 0
        self.place = PLACES[0]
        self.places: dict[Key, int] = {}
        self.blocks: dict[Key, tuple[int, int]] = {}
        """The place of a block and its permissions."""
        self.holds_for_block = False

    def on_miss(self, _engine: int, address: int, kind: int, entry: Any, _data: int) -> bool:  # noqa: ANN401
        self.asked += 1
        self.tlb.notice_flushes()
        if self.answer is None:
            return False
        entry[0].paddr, entry[0].perms = self.answer
        self.tlb.note(address, kind, self.place)
        if self.holds_for_block:
            self.tlb.note_block(address, kind, self.place, self.answer[1])
        return True

    def key(self, address: int, kind: int) -> Key:
        pid = 0 if address >> 63 else self.pidr.value & 0xFFFF_FFFF
        return address >> 12, kind, self.msr.value & ANY_MSR, pid

    def answers(self, key: Key) -> list[tuple[int, int]]:
        """What may be answered without Python: of the page as long as that is kept, else of its block."""
        found = [self.known[key]] if key in self.known else []
        block = self.blocks.get(block_of(key))
        if block is not None:
            place, permissions = block
            found.append(((place << 16) + (key[0] % PAGES_IN_BLOCK << 12), permissions))
        return found

    @rule(place=st.sampled_from(PLACES))
    def what_follows_leads_to(self, place: int) -> None:
        self.place = place

    @rule(page=st.sampled_from(PAGES), offset=st.integers(0, 4095), kind=st.sampled_from(KINDS), refused=st.booleans())
    def miss_of_the_engine(self, page: int, offset: int, kind: int, *, refused: bool) -> None:
        self.n_answers += 1
        self.answer = None if refused else (self.n_answers << 12, uc.UC_PROT_READ)
        self.asked = 0
        entry = TlbEntry()
        given = self.fill(None, page + offset, kind, ctypes.pointer(entry), self.tlb.native.data)
        key = self.key(page, kind)
        if not self.asked:
            assert given
            assert (entry.paddr, entry.perms) in self.answers(key)
        elif self.answer is None:
            assert not given
        else:
            assert (entry.paddr, entry.perms) == self.answer
            self.known[key] = self.answer
            self.places[key] = self.place
            if self.holds_for_block:
                self.blocks[block_of(key)] = self.place >> 16, self.answer[1]

    @rule(page=st.sampled_from(PAGES), kind=st.sampled_from(KINDS), neighbour=st.integers(0, PAGES_IN_BLOCK - 1))
    def miss_whose_answer_holds_for_its_block(self, page: int, kind: int, neighbour: int) -> None:
        self.holds_for_block = True
        self.miss_of_the_engine(page, 0, kind, refused=False)
        self.holds_for_block = False
        if self.asked:
            self.miss_of_the_engine((page >> 16 << 16) + (neighbour << 12), 0, kind, refused=False)
            assert not self.asked

    @rule(page=st.sampled_from(PAGES), kind=st.sampled_from(KINDS))
    def the_same_miss_twice_asks_once(self, page: int, kind: int) -> None:
        self.miss_of_the_engine(page, 0, kind, refused=False)
        self.asked = 0
        entry = TlbEntry()
        assert self.fill(None, page, kind, ctypes.pointer(entry), self.tlb.native.data)
        assert not self.asked
        assert (entry.paddr, entry.perms) in self.answers(self.key(page, kind))

    @rule(which=st.integers(0, 2), by=st.integers(1, 10))
    def the_guest_invalidates(self, which: int, by: int) -> None:
        self.flushes[which] += by
        self.known.clear()
        self.blocks.clear()

    def only_those_hold(self, holds: Callable[[Key], bool], block_holds: Callable[[Key], bool]) -> None:
        for block in [block for block in self.blocks if not block_holds(block)]:
            del self.blocks[block]
            number, kind, msr, pid = block
            page = number * PAGES_IN_BLOCK, kind, msr, pid
            assert page in self.known or self.asks(page)
        for key in [key for key in self.known if not holds(key)]:
            del self.known[key]
            assert block_of(key) in self.blocks or self.asks(key)

    def asks(self, key: Key) -> bool:
        """Whether a miss of this kind comes to Python."""
        page, kind, msr, pid = key
        before = self.msr.value, self.pidr.value, self.answer
        self.msr.value, self.pidr.value, self.answer, self.asked = msr, pid, None, 0
        assert not self.fill(None, page << 12, kind, ctypes.pointer(TlbEntry()), self.tlb.native.data) or not self.asked
        self.msr.value, self.pidr.value, self.answer = before
        return self.asked == 1

    @rule(page=st.sampled_from(PAGES), shift=st.sampled_from(SHIFTS), pid=st.sampled_from(PIDS))
    def the_guest_invalidates_a_page(self, page: int, shift: int, pid: int) -> None:
        start, pid = page >> shift << shift, 0 if page >> 63 else pid & 0xFFFF_FFFF
        self.tlb.forget_page(start, shift, pid)
        ends = start + (1 << shift) - 1
        self.only_those_hold(
            lambda key: key[0] << 12 >> shift != page >> shift or key[3] != pid,
            lambda key: not start >> 16 <= key[0] <= ends >> 16 or key[3] != pid,
        )

    @rule(pid=st.sampled_from(PIDS[1:-1]))
    def the_guest_invalidates_a_process(self, pid: int) -> None:
        self.tlb.forget_process(pid)
        self.only_those_hold(lambda key: key[3] != pid, lambda key: key[3] != pid)

    @rule(page=st.sampled_from(PAGES), kind=st.sampled_from(KINDS), pid=st.sampled_from(PIDS[1:-1]))
    def a_page_goes_with_its_process(self, page: int, kind: int, pid: int) -> None:
        self.another_process(pid)
        self.miss_of_the_engine(page, 0, kind, refused=False)
        self.the_guest_invalidates_a_process(pid)

    @rule(
        page=st.sampled_from(PAGES),
        kind=st.sampled_from(KINDS),
        pid=st.sampled_from(PIDS),
        shift=st.sampled_from(SHIFTS),
    )
    def a_block_goes_with_any_page_of_it(self, page: int, kind: int, pid: int, shift: int) -> None:
        self.another_process(pid)
        self.miss_whose_answer_holds_for_its_block(page, kind, 3)
        self.the_guest_invalidates_a_page(page, shift, pid)

    @rule(place=st.sampled_from(PLACES))
    def memory_changes(self, place: int) -> None:
        self.tlb.forget_place(place)
        self.only_those_hold(lambda key: self.places[key] != place, lambda key: self.blocks[key][0] != place >> 16)

    @rule(page=st.sampled_from(PAGES), other=st.sampled_from(PAGES), kind=st.sampled_from(KINDS))
    def a_page_survives_when_another_is_invalidated(self, page: int, other: int, kind: int) -> None:
        self.miss_of_the_engine(page, 0, kind, refused=False)
        pid = self.key(other, kind)[3]
        self.the_guest_invalidates_a_page(other, 12, pid)
        if page == other:
            return
        assert not self.asks(self.key(page, kind))

    @rule(page=st.sampled_from(PAGES), kind=st.sampled_from(KINDS), pid=st.sampled_from(PIDS))
    def kernel_and_process_take_turns_on_a_page(self, page: int, kind: int, pid: int) -> None:
        """What a process wrote the kernel copies, and the other way round, without a miss each time."""
        self.another_process(pid)
        keys = []
        for msr in (Msr.IR | Msr.DR, Msr.IR | Msr.DR | Msr.PR):
            self.another_msr(int(msr))
            self.miss_of_the_engine(page, 0, kind, refused=False)
            keys.append(self.key(page, kind))
        for key in keys:
            assert not self.asks(key)

    @rule()
    def the_map_changes(self) -> None:
        self.flushes[2] += 10
        self.tlb.forget()
        self.known.clear()
        self.blocks.clear()

    @rule(pid=st.sampled_from(PIDS))
    def another_process(self, pid: int) -> None:
        self.tlb.notice_flushes()
        self.pidr.value = pid
        self.flushes[1] += 1
        self.tlb.expect_flush()

    @rule(msr=st.sampled_from(MSRS))
    def another_msr(self, msr: int) -> None:
        self.msr.value = msr

    @rule()
    def generations_begin_anew(self) -> None:
        self.tlb._generation = ((1 << 16) - 1) << 48
        self.tlb.forget()
        self.known.clear()
        self.blocks.clear()

    @invariant()
    def remembers_no_more_than_there_are_entries(self) -> None:
        for table in (self.tlb._pages, self.tlb._blocks):
            for sets, index in ((table._of_place, 0), (table._of_process, 1)):
                assert all(sets.values())
                assert {(key, at) for key, members in sets.items() for at in members} == {
                    (owner[index], at) for at, owner in table._kept.items()
                }


TestMisses = Misses.TestCase
