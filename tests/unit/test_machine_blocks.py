"""Blocks of 64 KiB of the second-level TLB: one miss in Python for all their pages, and none too few where code is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.guest.exits import Hypercall
from services.guest.machine import mmu
from services.guest.machine.registers import Spr
from tests.unit import power_asm as asm
from tests.unit.machine_rig import MachineRig
from tests.unit.power_asm import R3, R4, R5, R6, R7, R8, R9
from tests.unit.radix_tree import LEVEL_BITS_64K, RadixTree
from tests.unit.translated_rig import CODE, CODE_AT, DATA_AT, KERNEL_MSR, PID, PROCESS_TABLE, TREES, Translated

BLOCK, OTHER = 0x3_0000, 0x4_0000
ALIAS = 1 << 60
"""Real mode ignores the top four bits of an address."""
PAGE = 0x1000
N_PAGES = 16
MOVED_AT = 0xC_0000
AP_64K, AP_4K = 0b101 << 5, 0
"""The actual page size in a tlbie's operand."""


def misses(rig: MachineRig, program: Callable[[], object]) -> int:
    """Misses that reach Python in `program`."""
    translator = rig.engine._translator
    before = translator.n_fills
    program()
    return translator.n_fills - before


def touch_all(instruction: int) -> tuple[int, ...]:
    """`instruction` with R4 at each page of BLOCK in turn."""
    return (*asm.load64(R4, BLOCK), asm.li(R5, N_PAGES), asm.mtspr(Spr.CTR, R5),
            instruction, asm.addi(R4, R4, PAGE), asm.bdnz(-2), asm.SC1)  # fmt: skip


def call(address: int) -> tuple[int, ...]:
    return (*asm.load64(R6, address), asm.mtspr(Spr.LR, R6), asm.BLRL)


CALL_ALL = [word for page in range(N_PAGES) for word in call(BLOCK + page * PAGE)]


def go_on(rig: MachineRig) -> None:
    assert isinstance(rig.until_exit(), Hypercall)


@pytest.mark.parametrize("instruction", [asm.lbz(R3, 0, R4), asm.stw(R3, 0, R4)])
def test_the_pages_of_a_block_cost_one_miss(instruction: int) -> None:
    rig = MachineRig()

    n = misses(rig, lambda: rig.run(*touch_all(instruction)))

    assert n == 2, "one for the code, one for the block"


def test_pages_of_the_guest_that_are_smaller_cost_a_miss_each() -> None:
    world = Translated()
    for page in range(N_PAGES):
        world.user.map(BLOCK + page * PAGE, BLOCK + (N_PAGES - 1 - page) * PAGE, mmu.READ | mmu.WRITE)
        world.rig.ram[BLOCK + page * PAGE] = page

    n = misses(world.rig, lambda: world.run(*touch_all(asm.lbz(R3, 0, R4)), msr=KERNEL_MSR))

    assert n >= N_PAGES
    assert world.rig.gpr[R3] == 0, "the last one leads to the first frame"


@pytest.mark.parametrize("page_size", [AP_64K, AP_4K])
@pytest.mark.parametrize("page", [0, 7])
def test_a_page_that_was_answered_by_its_block_alone_is_asked_for_again_once_it_is_invalidated(
    page: int, page_size: int
) -> None:
    """A page of 64 KiB moves; the guest names it by its own size, or a part of it."""
    world = Translated()
    world.user = RadixTree(world.store, TREES, LEVEL_BITS_64K)
    world.store(PROCESS_TABLE + PID * mmu.ROW_BYTES, world.user.row())
    world.user.map(CODE, CODE_AT, mmu.READ | mmu.EXECUTE, 16)
    world.user.map(BLOCK, DATA_AT, mmu.READ | mmu.WRITE, 16)
    at = page * PAGE
    world.rig.ram[DATA_AT + at], world.rig.ram[MOVED_AT + at] = 1, 2
    look = (*asm.load64(R4, BLOCK), asm.lbz(R9, 3 * PAGE, R4), asm.lbz(R9, at, R4), asm.SC1)
    n = misses(world.rig, lambda: world.run(*look, msr=KERNEL_MSR))
    assert world.rig.gpr[R9] == 1

    world.user.map(BLOCK, MOVED_AT, mmu.READ | mmu.WRITE, 16)
    world.rig.engine.resume([0])
    world.rig.device_writes(
        CODE_AT + 0x100, asm.li(R8, PID), asm.sldi32(R7, R8), *asm.load64(R5, BLOCK + at | page_size),
        asm.tlbie(R5, R7), asm.PTESYNC, *look,
    )  # fmt: skip
    world.rig.engine._registers.pc = CODE + 0x100
    go_on(world.rig)

    assert world.rig.gpr[R9] == 2
    assert n == 5, "four for code until then, one for the block"


def store(address: int, instruction: int) -> tuple[int, ...]:
    return (*asm.load64(R4, ALIAS | address), *asm.load64(R5, instruction), asm.stw(R5, 0, R4))


@pytest.mark.parametrize("runs_first", [False, True])
def test_code_that_is_stored_to_a_block_is_run_each_time(runs_first: bool) -> None:
    """Of stores to a page that it has translated the engine sees only the first one by itself, and none that goes
    through another address."""
    rig = MachineRig()
    code = BLOCK + 5 * PAGE
    rig.put(code, asm.li(R3, 9), asm.BLR)
    words = [*call(code)] if runs_first else []
    # A store to another page: from then on the block may be written, or must not be.
    words += store(BLOCK, asm.NOP)
    for version in (1, 2, 3, 4):
        words += (*store(code, asm.li(R3, version)), *call(code), *asm.load64(R4, OTHER), asm.stw(R3, 4 * version, R4))

    rig.run(*words, asm.SC1)

    assert rig.ram[OTHER + 4 : OTHER + 20] == b"".join(n.to_bytes(4) for n in (1, 2, 3, 4))


def all_code(rig: MachineRig) -> None:
    """Every page of BLOCK was run once, and then the engine forgot what it knew of addresses."""
    for page in range(N_PAGES):
        rig.put(BLOCK + page * PAGE, asm.li(R3, page), asm.BLR)
    rig.run(*CALL_ALL, asm.SC1)
    rig.engine.resume([0])
    rig.engine.flush_translations()


def run_at(rig: MachineRig, *words: int) -> None:
    """Run `words`; what is in R3 behind them is in R9 then, since the call's result comes to R3."""
    rig.device_writes(OTHER, *words, asm.mr(R9, R3), asm.SC1)
    rig.engine._registers.pc = OTHER
    go_on(rig)
    rig.engine.resume([0])


def test_code_that_is_known_costs_one_miss_a_block() -> None:
    rig = MachineRig()
    all_code(rig)

    n = misses(rig, lambda: run_at(rig, *CALL_ALL))

    assert n == 2, "one for the calling code, one for the block"
    assert rig.gpr[R9] == N_PAGES - 1


def test_a_store_to_a_page_that_is_code_by_its_block_alone_is_seen() -> None:
    rig = MachineRig()
    all_code(rig)
    run_at(rig, *call(BLOCK))

    for version in (77, 78, 79):
        run_at(rig, *store(BLOCK + 7 * PAGE, asm.li(R3, version)), *call(BLOCK + 7 * PAGE))

        assert rig.gpr[R9] == version


def test_so_is_what_a_device_writes_there() -> None:
    rig = MachineRig()
    all_code(rig)
    run_at(rig, *call(BLOCK))
    rig.device_writes(BLOCK + 7 * PAGE, asm.li(R3, 78), asm.BLR)

    run_at(rig, *call(BLOCK + 7 * PAGE))

    assert rig.gpr[R9] == 78


def test_code_that_became_another_while_nobody_looked_is_in_no_block() -> None:
    rig = MachineRig()
    all_code(rig)
    rig.put(BLOCK + 7 * PAGE, asm.li(R3, 79), asm.BLR)
    run_at(rig, *call(BLOCK))

    run_at(rig, *call(BLOCK + 7 * PAGE))

    assert rig.gpr[R9] == 79


def test_code_that_was_found_changed_at_one_address_is_asked_for_again_at_the_other() -> None:
    rig = MachineRig()
    rig.put(BLOCK, asm.li(R3, 1), asm.BLR)
    rig.run(*call(BLOCK), asm.SC1, *call(ALIAS | BLOCK), asm.mr(R9, R3), *call(BLOCK), asm.SC1)
    assert rig.gpr[R3] == 1
    rig.put(BLOCK, asm.li(R3, 2), asm.BLR)
    rig.engine.resume([0])
    go_on(rig)

    assert (rig.gpr[R9], rig.gpr[R3]) == (2, 2)


def test_a_block_with_a_shadow_in_it_is_asked_for_page_by_page() -> None:
    rig = MachineRig()
    rig.put(BLOCK + 7 * PAGE, asm.NOP, asm.mr(31, 31), asm.BLR)
    all_code(rig)
    rig.put(BLOCK + 7 * PAGE, asm.mr(31, 31), asm.li(R3, 7), asm.BLR)
    run_at(rig, *call(BLOCK + 7 * PAGE))
    rig.engine.flush_translations()

    n = misses(rig, lambda: run_at(rig, *CALL_ALL))

    assert n >= N_PAGES
