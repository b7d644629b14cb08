"""What the engine of real POWER code costs by itself, in this process: no links, no hypervisor.

`mips_loop` is a loop of loads, adds and stores in real mode, in slices as the processor runs it with `time = "wall"`.
Its floor is the same loop in a bare engine that nobody stops: it leaves by a system call at its end. Times are those of
the thread, which waits for nobody, so that what else the machine does is not in them.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import time
from typing import Any

import unicorn as uc
from unicorn import ppc_const

from services.guest.clock import WallClock
from services.guest.exits import Hypercall
from services.guest.machine.mmu import CHANGED, EXECUTE, READ, REFERENCED, WRITE, ProcessTable
from services.guest.machine.registers import Msr, Spr
from tests.bench import qemu_loop
from tests.bench.boot import QEMU
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig
from tests.unit.power_asm import R3, R4, R5, R6, R8
from tests.unit.radix_tree import RadixTree

LOOP = (asm.ld(R6, 0, R4), asm.addi(R6, R6, 1), asm.std(R6, 8, R4), asm.bdnz(-3))
N_TIMES = 4_000_000
N_CALLS = 10_000
N_TURNS = 20_000
DATA = 0x30000
_US = 1e6


async def measure(rounds: int) -> list[Figure]:
    """All figures of this group."""
    loops = [Round(_mips(_machine_seconds()), _mips(_bare_seconds())) for _ in range(rounds)]
    beside = []
    if shutil.which(QEMU) is not None:
        runs = [Round(_mips(_machine_seconds()), qemu_loop.mips(LOOP, DATA)) for _ in range(rounds)]
        beside = [Figure("mips_loop_qemu", "MIPS", runs)]
    return [
        Figure("mips_loop", "MIPS", loops, Budget(Kind.RATIO_AT_LEAST, 0.5)),
        *beside,
        Figure("engine_hypercall", "us", [Round(_hypercall_us()) for _ in range(rounds)]),
        Figure("engine_syscall", "us", [Round(_syscall_us()) for _ in range(rounds)]),
        Figure("engine_tlb_miss", "us", [Round(_miss_us()) for _ in range(rounds)]),
        Figure("engine_switch", "us", [Round(_switch_us()) for _ in range(rounds)]),
    ]


def _mips(seconds: float) -> float:
    return N_TIMES * len(LOOP) / seconds / 1e6


def _machine_seconds() -> float:
    rig = MachineRig(WallClock())
    rig.begin(*asm.load64(R3, N_TIMES), asm.mtspr(Spr.CTR, R3), *asm.load64(R4, DATA), *LOOP, asm.SC1)
    before = time.thread_time()
    rig.until_exit()
    return time.thread_time() - before


def _bare_seconds() -> float:
    engine = uc.Uc(uc.UC_ARCH_PPC, uc.UC_MODE_PPC64 | uc.UC_MODE_BIG_ENDIAN)
    ram = mmap.mmap(-1, 1 << 20)
    pin = ctypes.c_char.from_buffer(ram)
    code = asm.program(*LOOP, asm.SC1)
    ram[ENTRY : ENTRY + len(code)] = code
    engine.mem_map_ptr(0, len(ram), uc.UC_PROT_ALL, ctypes.addressof(pin))
    engine.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
    engine.ctl_exits_enabled(True)

    def fill(_engine: object, address: int, access: int, entry: Any, _: object) -> bool:  # noqa: ANN401
        # A data page that may also be executed has every store look for translations of it.
        permissions = uc.UC_PROT_EXEC if access == uc.UC_MEM_FETCH else uc.UC_PROT_READ | uc.UC_PROT_WRITE
        entry.paddr, entry.perms = address & ~0xFFF, permissions
        return True

    engine.hook_add(uc.UC_HOOK_TLB_FILL, fill)
    engine.hook_add(uc.UC_HOOK_INTR, lambda stopped, _number, _: stopped.emu_stop())
    engine.reg_write(ppc_const.UC_PPC_REG_MSR, Msr.SF | Msr.ME)
    engine.reg_write(ppc_const.UC_PPC_REG_CTR, N_TIMES)
    engine.reg_write(ppc_const.UC_PPC_REG_4, DATA)
    before = time.thread_time()
    engine.emu_start(ENTRY, 0)
    return time.thread_time() - before


def _hypercall_us() -> float:
    """From one exit to the next, answered at once."""
    rig = MachineRig(WallClock())
    rig.begin(asm.SC1, asm.b(-1))
    n_calls = 0
    before = time.thread_time()
    while n_calls < N_CALLS:
        if isinstance(rig.engine.run(SLICE_NS), Hypercall):
            rig.engine.resume([0])
            n_calls += 1
    return (time.thread_time() - before) / N_CALLS * _US


def _syscall_us() -> float:
    """To the kernel's handler and back by rfid."""
    rig = MachineRig(WallClock())
    rig.put(0xC00, asm.RFID)
    rig.begin(*asm.load64(R3, N_CALLS), asm.mtspr(Spr.CTR, R3), asm.SC0, asm.bdnz(-1), asm.SC1)
    before = time.thread_time()
    rig.until_exit()
    return (time.thread_time() - before) / N_CALLS * _US


def _miss_us() -> float:
    """A page of a radix tree of four levels that neither TLB holds: the guest invalidates before each load."""
    rig, seconds = _run_translated(asm.tlbie(R4, R8), asm.PTESYNC)
    return seconds / rig.engine._translator.n_fills * _US


def _switch_us() -> float:
    """A store to PIDR, and what the TLB asks for again after it: a page of code and one of data."""
    return _run_translated(asm.mtspr(Spr.PIDR, R8))[1] / N_TURNS * _US


def _run_translated(*words: int) -> tuple[MachineRig, float]:
    """A load and `words` before it, many times, under a radix tree of four levels; the seconds that it took."""
    rig = MachineRig(WallClock())

    def store(gpa: int, value: int) -> None:
        rig.ram[gpa : gpa + 8] = value.to_bytes(8, "big")

    tree = RadixTree(store, 5 << 20)
    table = 4 << 20
    store(table, tree.row())
    flags = READ | WRITE | EXECUTE | REFERENCED | CHANGED
    tree.map(ENTRY, ENTRY, flags)
    tree.map(DATA, DATA, flags)
    loop = (*words, asm.ld(R5, 0, R4))
    start = (*asm.load64(R3, N_TURNS), asm.mtspr(Spr.CTR, R3), *asm.load64(R4, DATA))
    rig.begin(*start, *loop, asm.bdnz(-len(loop)), asm.SC1)
    rig.engine._mmu.table = ProcessTable(table, 1 << 12)
    rig.engine._registers.msr = Msr.SF | Msr.ME | Msr.IR | Msr.DR
    before = time.thread_time()
    rig.until_exit()
    return rig, time.thread_time() - before
