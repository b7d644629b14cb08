"""A machine rig that runs translated: a process table, a user's code and data page, and the kernel's first pages."""

from __future__ import annotations

from protocol.hcalls import H_REGISTER_PROC_TBL
from services.guest.clock import GuestClock
from services.guest.exits import Exit, Hypercall
from services.guest.machine import mmu
from services.guest.machine.interrupts import RELOCATED_BASE, SCV_RELOCATED_BASE, Vector
from services.guest.machine.registers import Msr, Spr
from tests.unit import power_asm as asm
from tests.unit.machine_rig import MachineRig
from tests.unit.power_asm import R3, R4, R5, R6, R7, R8
from tests.unit.radix_tree import RadixTree

PROCESS_TABLE = 0x40_0000
TREES = 0x50_0000
CODE, DATA, HOLE = 0x10000, 0x20000, 0x30000
CODE_AT, DATA_AT, KERNEL_AT, SCV_AT = 0x8_0000, 0x9_0000, 0xA_0000, 0xB_0000
KERNEL = 0xC000_0000_0000_0000
PID = 3
ALL = mmu.READ | mmu.WRITE | mmu.EXECUTE
USER_MSR = Msr.SF | Msr.ME | Msr.EE | Msr.PR | Msr.IR | Msr.DR
KERNEL_MSR = Msr.SF | Msr.ME | Msr.IR | Msr.DR


class Translated:
    """A rig whose process table is registered, with a user's code and data page, and one of the kernel's code."""

    def __init__(self, clock: GuestClock | None = None) -> None:
        self.rig = MachineRig(clock)
        self.user = RadixTree(self.store, TREES)
        self.kernel = RadixTree(self.store, TREES + (8 << 20))
        self.store(PROCESS_TABLE, self.kernel.row())
        self.store(PROCESS_TABLE + PID * mmu.ROW_BYTES, self.user.row())
        self.user.map(CODE, CODE_AT, mmu.READ | mmu.EXECUTE)
        self.user.map(DATA, DATA_AT, mmu.READ | mmu.WRITE)
        self.kernel.map(RELOCATED_BASE & -4096, KERNEL_AT, ALL | mmu.PRIVILEGED)
        self.kernel.map(SCV_RELOCATED_BASE & -4096, SCV_AT, ALL | mmu.PRIVILEGED)
        for vector in Vector:
            self.rig.put(vector, asm.SC1)

    def store(self, gpa: int, value: int) -> None:
        self.rig.ram[gpa : gpa + 8] = value.to_bytes(8, "big")

    def pte(self, ea: int) -> int:
        at = self.user.leaves[ea]
        return int.from_bytes(self.rig.ram[at : at + 8], "big")

    def register_table(self) -> None:
        """As process PID, in real mode."""
        exit_ = self.rig.run(
            *asm.load64(R3, H_REGISTER_PROC_TBL.number), asm.li(R4, 0x1C), *asm.load64(R5, PROCESS_TABLE),
            asm.li(R6, 0), asm.li(R7, 0), asm.SC1, asm.li(R8, PID), asm.mtspr(Spr.PIDR, R8), asm.SC1,
        )  # fmt: skip
        assert exit_ == Hypercall(H_REGISTER_PROC_TBL.number, (0x1C, PROCESS_TABLE, 0, 0))
        self.rig.engine.resume([0])
        self.rig.until_exit()
        self.rig.engine.resume([0])

    def run(self, *words: int, msr: int = USER_MSR, at: int = CODE) -> Exit:
        """Register the table, then jump to `words`, which lie in the user's code page, with `msr`."""
        self.rig.put(CODE_AT + (at & 0xFFF), *words)
        self.register_table()
        registers = self.rig.engine._registers
        registers.msr, registers.pc = msr, at
        return self.rig.until_exit()

    @property
    def vector(self) -> int:
        """Where the processor stands, when it stopped in the first instruction of a handler."""
        return self.rig.engine._registers.pc - 4
