"""Interrupts as the architecture delivers them to a guest: vectors, SRR0, SRR1, the new MSR.

Source: Power ISA 3.0B, book III, chapter 6; PAPR 14.5.4.3.6 for what H_SET_MODE changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import SRR1_FROM_MSR, Dsisr, Msr, Spr


class Vector(IntEnum):
    """Where an interrupt goes in real mode."""

    SYSTEM_RESET = 0x100
    MACHINE_CHECK = 0x200
    DATA_STORAGE = 0x300
    DATA_SEGMENT = 0x380
    INSTRUCTION_STORAGE = 0x400
    INSTRUCTION_SEGMENT = 0x480
    EXTERNAL = 0x500
    ALIGNMENT = 0x600
    PROGRAM = 0x700
    FP_UNAVAILABLE = 0x800
    DECREMENTER = 0x900
    SYSTEM_CALL = 0xC00
    TRACE = 0xD00
    VMX_UNAVAILABLE = 0xF20
    VSX_UNAVAILABLE = 0xF40
    FACILITY_UNAVAILABLE = 0xF60


_NEVER_RELOCATED = frozenset({Vector.SYSTEM_RESET, Vector.MACHINE_CHECK})
AIL_RELOCATED = 3
RELOCATED_BASE = 0xC000_0000_0000_4000
SCV_BASE = 0x17000
SCV_RELOCATED_BASE = 0xC000_0000_0000_3000
SCV_STEP = 0x20

_RELOCATION = Msr.IR | Msr.DR
_ALWAYS = int(Msr.SF)
KEPT = int(Msr.ME | Msr.HV)
"""The MSR bits that stay as they are."""
KEPT_BY_SCV = KEPT | Msr.EE | Msr.RI
_LE = int(Msr.LE)
_S = int(Msr.S)
_SE = int(Msr.SE)


@dataclass(frozen=True, slots=True)
class InterruptMode:
    """`ail` and `little_endian` are what H_SET_MODE last said; `secure` is MSR.S, which nothing changes."""

    ail: int = 0
    little_endian: bool = False
    secure: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an interrupt goes: the MSR beside what is kept of the old one, and the program counter."""

    msr: int
    pc: int


class Interrupts:
    """Delivers to `registers`. `on_mode` is called after each change of `mode`."""

    def __init__(self, registers: RegisterFile) -> None:
        self._registers = registers
        self._mode = InterruptMode()
        self.on_mode: Callable[[], None] = _nothing

    @property
    def mode(self) -> InterruptMode:
        """How interrupts are delivered."""
        return self._mode

    @mode.setter
    def mode(self, mode: InterruptMode) -> None:
        self._mode = mode
        self.on_mode()

    def entry(self, vector: Vector, *, translated: bool) -> Entry:
        """Of an interrupt, which comes while addresses are `translated` or not."""
        relocated = self._relocates(translated) and vector not in _NEVER_RELOCATED
        return Entry(self._new_msr(relocated), RELOCATED_BASE + vector if relocated else vector)

    def scv_entry(self, level: int, *, translated: bool) -> Entry:
        """The same of scv."""
        relocated = self._relocates(translated)
        return Entry(self._new_msr(relocated), (SCV_RELOCATED_BASE if relocated else SCV_BASE) + level * SCV_STEP)

    def _relocates(self, translated: bool) -> bool:
        return translated and self._mode.ail == AIL_RELOCATED

    def _new_msr(self, relocated: bool) -> int:
        return _ALWAYS | (_RELOCATION if relocated else 0) | (_LE if self._mode.little_endian else 0)

    def deliver(self, vector: Vector, srr0: int, cause: int = 0) -> None:
        """Go to `vector`; `srr0` is where the handler returns to, `cause` the bits that SRR1 has beside the MSR's."""
        registers = self._registers
        msr = registers.msr
        registers.spr[Spr.SRR0] = srr0
        registers.spr[Spr.SRR1] = msr & SRR1_FROM_MSR | cause | (_S if self._mode.secure else 0)
        self._enter(self.entry(vector, translated=msr & _RELOCATION == _RELOCATION), msr & KEPT)

    def _enter(self, entry: Entry, kept: int) -> None:
        self._registers.msr = kept | entry.msr
        self._registers.pc = entry.pc

    def done_outside(self) -> None:
        """An instruction was done by us, behind which the engine would have a trace interrupt."""
        registers = self._registers
        if registers.msr & _SE:
            self.deliver(Vector.TRACE, registers.pc)

    def data_storage(self, pc: int, address: int, dsisr: int) -> None:
        """A load or store that the guest's own translation refuses."""
        self._registers.spr[Spr.DAR] = address
        self._registers.spr[Spr.DSISR] = dsisr
        self.deliver(Vector.DATA_STORAGE, pc)

    def data_segment(self, pc: int, address: int) -> None:
        """A load or store outside every quadrant."""
        self._registers.spr[Spr.DAR] = address
        self.deliver(Vector.DATA_SEGMENT, pc)

    def alignment(self, pc: int, address: int) -> None:
        """An access that the machine does not do."""
        self._registers.spr[Spr.DAR] = address
        self._registers.spr[Spr.DSISR] = 0
        self.deliver(Vector.ALIGNMENT, pc)

    def instruction_storage(self, pc: int, cause: int) -> None:
        """A fetch that the guest's own translation refuses."""
        self.deliver(Vector.INSTRUCTION_STORAGE, pc, cause & ~Dsisr.BAD_CONFIGURATION)

    def system_call_vectored(self, level: int, after: int) -> None:
        """scv: returns by rfscv to `after`."""
        registers = self._registers
        msr = registers.msr
        registers.lr = after
        registers.ctr = msr & SRR1_FROM_MSR | (_S if self._mode.secure else 0)
        self._enter(self.scv_entry(level, translated=msr & _RELOCATION == _RELOCATION), msr & KEPT_BY_SCV)


def _nothing() -> None:
    """Nobody follows the mode."""
