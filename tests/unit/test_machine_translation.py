"""Programs of the machine engine that run translated: storage interrupts with exact addresses, pages that appear."""

from __future__ import annotations

import pytest

from protocol.geometry import PAGE_SHIFT
from protocol.hcalls import H_REGISTER_PROC_TBL
from protocol.messages import Access
from services.guest.machine import mmu
from services.guest.machine.interrupts import RELOCATED_BASE, InterruptMode, Vector
from services.guest.machine.registers import Dsisr, Spr, Srr1
from tests.unit import power_asm as asm
from tests.unit.power_asm import R3, R4, R5, R6, R7, R8, R9, R10
from tests.unit.radix_tree import RadixTree
from tests.unit.translated_rig import (
    ALL,
    CODE,
    CODE_AT,
    DATA,
    DATA_AT,
    HOLE,
    KERNEL_AT,
    KERNEL_MSR,
    PID,
    PROCESS_TABLE,
    TREES,
    USER_MSR,
    Translated,
)


@pytest.fixture
def world() -> Translated:
    return Translated()


def test_a_user_program_reads_and_writes_its_pages(world: Translated) -> None:
    world.rig.ram[DATA_AT + 8 : DATA_AT + 12] = b"\x11\x22\x33\x44"
    world.run(asm.lis(R4, DATA >> 16), asm.lwz(R5, 8, R4), asm.stw(R5, 12, R4), asm.SC0)

    assert world.rig.ram[DATA_AT + 12 : DATA_AT + 16] == b"\x11\x22\x33\x44"
    assert world.vector == Vector.SYSTEM_CALL
    assert world.pte(DATA) & (mmu.REFERENCED | mmu.CHANGED) == mmu.REFERENCED | mmu.CHANGED
    assert world.pte(CODE) & (mmu.REFERENCED | mmu.CHANGED) == mmu.REFERENCED


def test_a_missing_data_page_interrupts_with_the_exact_address(world: Translated) -> None:
    world.run(asm.lis(R4, HOLE >> 16), asm.NOP, asm.lwz(R5, 0x124, R4))

    assert world.vector == Vector.DATA_STORAGE
    assert world.rig.spr(Spr.DAR) == HOLE + 0x124
    assert world.rig.spr(Spr.DSISR) == Dsisr.NO_PTE
    assert world.rig.spr(Spr.SRR0) == CODE + 8
    assert world.rig.spr(Spr.SRR1) == USER_MSR


@pytest.mark.parametrize(("address", "vector"), [(HOLE + 0x124, Vector.DATA_STORAGE), (1 << 53, Vector.DATA_SEGMENT)])
def test_l1_a_fault_whose_own_instruction_left_the_map_is_as_exact(
    world: Translated, address: int, vector: Vector
) -> None:
    """The hypervisor clears its map before the processor hears of it: until then that still fetches from the page."""
    world.run(asm.SC1, *asm.load64(R4, address), asm.lwz(R5, 0, R4), msr=KERNEL_MSR)
    world.rig.map.clear(CODE_AT >> PAGE_SHIFT)
    world.rig.engine.resume([0])
    world.rig.until_exit()

    assert world.vector == vector
    assert world.rig.spr(Spr.DAR) == address
    assert (CODE_AT >> PAGE_SHIFT, Access.READ) in world.rig.faults


def test_a_store_that_is_not_permitted_says_so(world: Translated) -> None:
    world.run(asm.lis(R4, CODE >> 16), asm.stw(R5, 0x40, R4))

    assert world.rig.spr(Spr.DAR) == CODE + 0x40
    assert world.rig.spr(Spr.DSISR) == Dsisr.PROTECTION | Dsisr.STORE


def test_a_store_across_pages_names_the_page_that_lacks(world: Translated) -> None:
    world.run(asm.lis(R4, DATA >> 16), asm.std(R5, 0xFFC, R4))

    assert world.rig.spr(Spr.DAR) == DATA + 0x1000
    assert world.rig.spr(Spr.DSISR) == Dsisr.NO_PTE | Dsisr.STORE
    assert world.rig.ram[DATA_AT + 0xFFC : DATA_AT + 0x1000] == bytes(4)


def test_a_jump_to_a_missing_page_interrupts_where_it_jumped(world: Translated) -> None:
    world.run(*asm.load64(R4, HOLE + 0x44), asm.mtspr(Spr.LR, R4), asm.BLR)

    assert world.vector == Vector.INSTRUCTION_STORAGE
    assert world.rig.spr(Spr.SRR0) == HOLE + 0x44
    assert world.rig.spr(Spr.SRR1) == USER_MSR | Dsisr.NO_PTE


def test_code_that_runs_off_its_page_interrupts_at_the_next(world: Translated) -> None:
    world.run(asm.NOP, asm.NOP, at=CODE + 0xFF8)

    assert world.vector == Vector.INSTRUCTION_STORAGE
    assert world.rig.spr(Spr.SRR0) == CODE + 0x1000


def test_data_is_not_executed(world: Translated) -> None:
    world.run(*asm.load64(R4, DATA + 0x10), asm.mtspr(Spr.LR, R4), asm.BLR)

    assert world.vector == Vector.INSTRUCTION_STORAGE
    assert world.rig.spr(Spr.SRR1) == USER_MSR | Dsisr.NO_EXECUTE


def test_a_user_may_not_read_a_page_of_the_kernel(world: Translated) -> None:
    world.run(*asm.load64(R4, RELOCATED_BASE), asm.ld(R5, 0x10, R4))

    assert world.rig.spr(Spr.DAR) == RELOCATED_BASE + 0x10
    assert world.rig.spr(Spr.DSISR) == Dsisr.PROTECTION


@pytest.mark.parametrize("address", [1 << 62, 1 << 53])
def test_an_address_of_no_quadrant_is_a_segment_interrupt(world: Translated, address: int) -> None:
    world.run(*asm.load64(R4, address), asm.lbz(R5, 5, R4))
    assert world.vector == Vector.DATA_SEGMENT
    assert world.rig.spr(Spr.DAR) == address + 5

    again = Translated()
    again.run(*asm.load64(R4, address + 4), asm.mtspr(Spr.LR, R4), asm.BLR)
    assert again.vector == Vector.INSTRUCTION_SEGMENT
    assert again.rig.spr(Spr.SRR0) == address + 4


def test_with_ail_3_the_kernel_gets_its_interrupts_translated(world: Translated) -> None:
    world.rig.put(KERNEL_AT + Vector.SYSTEM_CALL, asm.li(R9, 7), asm.SC1)
    world.run(asm.SC0)
    world.rig.engine._interrupts.mode = InterruptMode(ail=3)
    world.rig.engine.resume([0])
    registers = world.rig.engine._registers
    world.rig.put(CODE_AT + 0x100, asm.SC0)
    registers.pc, registers.msr = CODE + 0x100, USER_MSR
    world.rig.until_exit()

    assert world.rig.gpr[R9] == 7
    assert registers.pc == RELOCATED_BASE + Vector.SYSTEM_CALL + 8
    assert world.rig.msr == KERNEL_MSR


@pytest.mark.parametrize("call", [asm.SC1, asm.SC2])
def test_a_process_of_the_guest_reaches_neither_hypervisor_nor_ultravisor(world: Translated, call: int) -> None:
    world.run(asm.NOP, call)

    assert world.vector == Vector.PROGRAM
    assert world.rig.spr(Spr.SRR0) == CODE + 4
    assert world.rig.spr(Spr.SRR1) == USER_MSR | Srr1.PRIVILEGED


def test_a_page_that_the_handler_maps_is_there_when_the_program_goes_on(world: Translated) -> None:
    world.rig.put(Vector.DATA_STORAGE, asm.SC1, asm.RFID)
    world.rig.ram[DATA_AT + 0x1004 : DATA_AT + 0x1008] = b"\0\0\0\x2a"
    world.run(asm.lis(R4, HOLE >> 16), asm.lwz(R5, 4, R4), asm.SC0)
    world.user.map(HOLE, DATA_AT + 0x1000, mmu.READ)
    world.rig.engine.resume([0])
    world.rig.until_exit()

    assert world.vector == Vector.SYSTEM_CALL
    assert world.rig.gpr[R5] == 42


def test_a_change_of_process_and_back_asks_for_no_page_again(world: Translated) -> None:
    """The engine forgets its TLB at each store to PIDR, the second level does not."""
    world.run(asm.lis(R4, DATA >> 16), asm.lbz(R5, 0, R4), asm.SC1, msr=KERNEL_MSR)
    translator = world.rig.engine._translator
    before = translator.n_fills
    world.rig.engine.resume([0])
    world.rig.put(
        CODE_AT + 0x100, asm.li(R6, 100), asm.mtspr(Spr.CTR, R6),
        asm.mtspr(Spr.PIDR, R8), asm.lbz(R5, 0, R4), asm.bdnz(-2), asm.SC1,
    )  # fmt: skip
    world.rig.engine._registers.pc = CODE + 0x100
    world.rig.until_exit()

    assert translator.n_fills - before < 10


def test_an_invalidated_translation_is_looked_up_anew(world: Translated) -> None:
    world.rig.ram[DATA_AT], world.rig.ram[DATA_AT + 0x1000] = 1, 2
    world.run(asm.lis(R4, DATA >> 16), asm.lbz(R5, 0, R4), asm.SC1, msr=KERNEL_MSR)
    assert world.rig.gpr[R5] == 1

    world.user.map(DATA, DATA_AT + 0x1000, mmu.READ | mmu.WRITE)
    world.rig.engine.resume([0])
    world.rig.put(
        CODE_AT + 0x100, asm.sldi32(R7, R8), asm.tlbie(R4, R7), asm.PTESYNC,
        # A flush that is expected must not cover up the one before it.
        asm.mtspr(Spr.PIDR, R8), asm.lbz(R5, 0, R4), asm.SC1,
    )  # fmt: skip
    world.rig.engine._registers.pc = CODE + 0x100
    world.rig.until_exit()

    assert world.rig.gpr[R5] == 2


def fills_of(world: Translated, *words: int) -> int:
    """Misses that reach Python in `words`, which the kernel runs after a first look at the data page."""
    world.run(asm.lis(R4, DATA >> 16), asm.sldi32(R7, R8), asm.lbz(R5, 0, R4), asm.SC1, msr=KERNEL_MSR)
    translator = world.rig.engine._translator
    before = translator.n_fills
    world.rig.engine.resume([0])
    world.rig.put(CODE_AT + 0x100, *words, asm.SC1)
    world.rig.engine._registers.pc = CODE + 0x100
    world.rig.until_exit()
    return translator.n_fills - before


INVALIDATE_ANOTHER_PAGE = [asm.li(R5, 0x7000), asm.tlbie(R5, R7), asm.PTESYNC]
INVALIDATE_ANOTHER_PROCESS = [
    asm.li(R5, 1 << 10), asm.li(R6, PID + 1), asm.sldi32(R6, R6), asm.tlbiel(R5, R6), asm.PTESYNC,
]  # fmt: skip
INVALIDATE_OTHER_SETS = [asm.li(R5, 1 << 10 | 1 << 12), asm.tlbiel(R5, R7), asm.SLBIA, asm.PTESYNC]


@pytest.mark.parametrize("invalidation", [INVALIDATE_ANOTHER_PAGE, INVALIDATE_ANOTHER_PROCESS, INVALIDATE_OTHER_SETS])
def test_what_is_not_invalidated_is_not_asked_for_again(world: Translated, invalidation: list[int]) -> None:
    # The code page changes once, as the words are put there; then nothing is new but the first invalidation's trap.
    once = fills_of(Translated(), *invalidation, asm.lbz(R5, 0, R4))
    often = fills_of(
        world,
        asm.li(R9, 100),
        asm.mtspr(Spr.CTR, R9),
        *invalidation,
        asm.lbz(R5, 0, R4),
        asm.bdnz(-len(invalidation) - 1),
    )

    assert often <= once + 1


def test_the_pages_of_a_process_that_is_invalidated_are_looked_up_anew(world: Translated) -> None:
    world.rig.ram[DATA_AT], world.rig.ram[DATA_AT + 0x1000] = 1, 2
    world.run(asm.lis(R4, DATA >> 16), asm.lbz(R5, 0, R4), asm.SC1, msr=KERNEL_MSR)

    world.user.map(DATA, DATA_AT + 0x1000, mmu.READ | mmu.WRITE)
    world.rig.engine.resume([0])
    world.rig.put(
        CODE_AT + 0x100, asm.sldi32(R7, R8), asm.li(R5, 1 << 10), asm.tlbiel(R5, R7), asm.PTESYNC,
        asm.lbz(R5, 0, R4), asm.SC1,
    )  # fmt: skip
    world.rig.engine._registers.pc = CODE + 0x100
    world.rig.until_exit()

    assert world.rig.gpr[R5] == 2


@pytest.mark.parametrize("instruction", [asm.tlbie(R4, R7), asm.tlbiel(R4, R7), asm.SLBIA])
def test_a_process_may_invalidate_nothing(world: Translated, instruction: int) -> None:
    world.run(asm.NOP, instruction)

    assert world.vector == Vector.PROGRAM
    assert world.rig.spr(Spr.SRR0) == CODE + 4


def test_code_that_was_changed_through_another_address_runs_after_any_invalidation(world: Translated) -> None:
    """As Linux patches itself: the address that it stores through is not the one that it runs at."""
    alias, other = HOLE, 0x4_0000
    world.user.map(alias, CODE_AT + 0x1000, mmu.READ | mmu.WRITE)
    world.user.map(other, CODE_AT + 0x1000, mmu.READ | mmu.EXECUTE)
    world.rig.put(CODE_AT + 0x1000, asm.li(R3, 1), asm.BLR)
    new = asm.li(R3, 2)
    call = [*asm.load64(R9, other), asm.mtspr(Spr.LR, R9), asm.BLRL]
    world.run(
        asm.lis(R4, alias >> 16), asm.sldi32(R7, R8),
        # The alias is stored to before the code is translated, so that the engine no longer watches it.
        *asm.load64(R5, asm.li(R3, 1)), asm.stw(R5, 0, R4), *call, asm.mr(R10, R3),
        *asm.load64(R5, new), asm.stw(R5, 0, R4), asm.tlbie(R4, R7), asm.PTESYNC, *call, asm.SC1, msr=KERNEL_MSR,
    )  # fmt: skip

    assert (world.rig.gpr[R10], world.rig.gpr[R3]) == (1, 2)


def test_a_hint_does_not_leave_the_engine(world: Translated, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, n_executions = world.rig.engine, 0
    execute = engine._execute

    def counted() -> int:
        nonlocal n_executions
        n_executions += 1
        return execute()

    monkeypatch.setattr(engine, "_execute", counted)
    loop = [asm.mr(2, 2), asm.mr(1, 1), asm.bdnz(-2)]
    world.run(asm.li(R9, 1000), asm.mtspr(Spr.CTR, R9), *loop, asm.SC1, msr=KERNEL_MSR)

    assert n_executions < 10


def test_another_process_table_holds_at_once(world: Translated) -> None:
    other, table = RadixTree(world.store, TREES + (4 << 20)), PROCESS_TABLE + 0x1000
    world.store(table + PID * mmu.ROW_BYTES, other.row())
    other.map(CODE, CODE_AT, ALL)
    other.map(DATA, DATA_AT + 0x1000, ALL)
    world.rig.ram[DATA_AT], world.rig.ram[DATA_AT + 0x1000] = 1, 2
    world.run(
        asm.lis(R4, DATA >> 16), asm.lbz(R8, 0, R4), *asm.load64(R3, H_REGISTER_PROC_TBL.number), asm.li(R4, 0x1C),
        *asm.load64(R5, table), asm.SC1, asm.lis(R4, DATA >> 16), asm.lbz(R9, 0, R4), asm.SC1, msr=KERNEL_MSR,
    )  # fmt: skip
    world.rig.engine.resume([0])
    world.rig.until_exit()

    assert (world.rig.gpr[R8], world.rig.gpr[R9]) == (1, 2)


def test_what_the_kernel_may_reach_a_process_does_not_get_from_the_second_level(world: Translated) -> None:
    world.user.map(DATA, DATA_AT, mmu.READ | mmu.WRITE | mmu.PRIVILEGED)
    world.run(
        asm.lis(R4, DATA >> 16), asm.lbz(R5, 0, R4), *asm.load64(R9, USER_MSR), asm.mtspr(Spr.SRR1, R9),
        *asm.load64(R9, CODE), asm.mtspr(Spr.SRR0, R9), asm.RFID, msr=KERNEL_MSR,
    )  # fmt: skip

    assert world.vector == Vector.DATA_STORAGE
    assert world.rig.spr(Spr.DSISR) == Dsisr.PROTECTION
    assert world.rig.spr(Spr.DAR) == DATA


def test_another_pid_sees_another_page_at_once(world: Translated) -> None:
    other = RadixTree(world.store, TREES + (4 << 20))
    world.store(PROCESS_TABLE + (PID + 1) * mmu.ROW_BYTES, other.row())
    other.map(CODE, CODE_AT, ALL)
    other.map(DATA, DATA_AT + 0x1000, ALL)
    world.rig.ram[DATA_AT], world.rig.ram[DATA_AT + 0x1000] = 1, 2
    world.run(
        asm.lis(R4, DATA >> 16), asm.lbz(R5, 0, R4), asm.li(R6, PID + 1), asm.mtspr(Spr.PIDR, R6), asm.lbz(R7, 0, R4),
        asm.SC1, msr=KERNEL_MSR,
    )  # fmt: skip

    assert (world.rig.gpr[R5], world.rig.gpr[R7]) == (1, 2)


def test_code_that_reads_constants_of_its_own_page_does_not_miss_again_and_again(world: Translated) -> None:
    translator = world.rig.engine._translator
    before = translator.n_fills

    world.run(
        *asm.load64(R3, 1000), asm.mtspr(Spr.CTR, R3), *asm.load64(R4, CODE), asm.ld(R5, 0, R4), asm.bdnz(-1), asm.SC1
    )

    assert world.rig.gpr[R5]
    assert translator.n_fills - before < 20


def test_code_that_may_only_be_executed_is_not_read(world: Translated) -> None:
    world.user.map(CODE, CODE_AT, mmu.EXECUTE)

    world.run(*asm.load64(R4, CODE), asm.ld(R5, 0, R4), asm.SC1)

    assert world.rig.spr(Spr.DSISR) == Dsisr.PROTECTION
    assert world.rig.spr(Spr.DAR) == CODE
