"""What the engine reports as an exception: interrupts of the guest, and instructions that are emulated here.

The engine numbers exceptions in its own way; the program counter is past the instruction for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from services.guest.machine.accesses import effective_address
from services.guest.machine.interrupts import Interrupts, Vector
from services.guest.machine.invalidation import Invalidation, invalidation
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import RS_SHIFT, WORD_BYTES, Dsisr, Fscr, Msr, Spr, Srr1
from services.guest.machine.replaced import MFMSR, MTPIDR, RFSCV, SCV, SLBIA, TLBIE, TLBIEL, is_trap_level, is_trapped
from services.guest.machine.time_base import TimeBase

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_SCV_MASK = 0xFFFFF01F
"""Of any level."""
_MFSPR = 0x7C0002A6
_MTSPR = 0x7C0003A6
_SPR_MASK = 0xFC0007FF
_USER_DSCR = 3
_DSCR = 17
_KIND_MASK = 0xF0


class EngineException(IntEnum):
    """Exceptions by the engine's numbers."""

    DATA_STORAGE = 2
    """Raised by atomic memory operations whose function does not exist; misses of the TLB come another way."""
    ALIGNMENT = 5
    PROGRAM = 6
    FP_UNAVAILABLE = 7
    SYSTEM_CALL = 8
    TRACE = 68
    VMX_UNAVAILABLE = 73
    VSX_UNAVAILABLE = 94
    FACILITY_UNAVAILABLE = 95
    ILLEGAL = 96
    HYPERVISOR_FACILITY = 98


class _Kind(IntEnum):
    """Of a program interrupt, in the high half of the error code's low byte."""

    FP = 0x10
    ILLEGAL = 0x20
    PRIVILEGED = 0x30
    TRAP = 0x40


_CAUSES = {
    _Kind.FP: Srr1.FP_EXCEPTION,
    _Kind.ILLEGAL: Srr1.ILLEGAL,
    _Kind.PRIVILEGED: Srr1.PRIVILEGED,
    _Kind.TRAP: Srr1.TRAP,
}
_UNAVAILABLE = {
    EngineException.FP_UNAVAILABLE: Vector.FP_UNAVAILABLE,
    EngineException.VMX_UNAVAILABLE: Vector.VMX_UNAVAILABLE,
    EngineException.VSX_UNAVAILABLE: Vector.VSX_UNAVAILABLE,
    EngineException.FACILITY_UNAVAILABLE: Vector.FACILITY_UNAVAILABLE,
}


class Translations(Protocol):
    """What keeps translations has to hear."""

    def switch_process(self, pid: int) -> None:
        """A store to PIDR."""

    def invalidate(self, what: Invalidation) -> None:
        """A tlbie or tlbiel."""


class Instructions:
    """Serves exceptions. `word_at(address)` reads the true instruction; `lacking(what, address)` tells the operator of
    one that the engine does not have."""

    def __init__(
        self,
        registers: RegisterFile,
        interrupts: Interrupts,
        time_base: TimeBase,
        word_at: Callable[[int], int],
        lacking: Callable[[int, int], None],
        translations: Translations,
    ) -> None:
        self._registers = registers
        self._interrupts = interrupts
        self._time = time_base
        self._word_at = word_at
        self._lacking = lacking
        self._translations = translations

    def serve(self, number: int) -> bool:
        """Serve any exception but `sc` with levels 1 and 2; False when `number` is unknown."""
        at = self._registers.pc - WORD_BYTES
        if number == EngineException.SYSTEM_CALL:
            self._system_call(at)
        elif number in (EngineException.PROGRAM, EngineException.ILLEGAL, EngineException.HYPERVISOR_FACILITY):
            self._program(at, self._registers.error_code)
        elif number in _UNAVAILABLE:
            self._interrupts.deliver(_UNAVAILABLE[EngineException(number)], at)
        elif number == EngineException.TRACE:
            # Of the instruction before, wherever that led.
            self._interrupts.deliver(Vector.TRACE, at)
        elif number in (EngineException.ALIGNMENT, EngineException.DATA_STORAGE):
            address = effective_address(self._word_at(at), self._registers.gpr) or 0
            if number == EngineException.ALIGNMENT:
                self._interrupts.alignment(at, address)
            else:
                self._interrupts.data_storage(at, address, Dsisr.BAD_ATOMIC)
        else:
            return False
        return True

    def serve_trap(self) -> bool:
        """Serve a trap of a shadow page; False when the guest made that system call by itself, as far as machine code
        let it come here. Raises what stands against reading the instruction."""
        at = self._registers.pc - WORD_BYTES
        return self._emulate_trapped(self._word_at(at), at)

    def emulate(self) -> bool:
        """Do an instruction that the engine calls illegal and this class has. Raises as `serve_trap`."""
        at = self._registers.pc - WORD_BYTES
        return self._emulate(self._word_at(at), at)

    def _system_call(self, at: int) -> None:
        if is_trap_level(self._registers.error_code) and self.serve_trap():
            return
        self._interrupts.deliver(Vector.SYSTEM_CALL, at + WORD_BYTES)

    def _emulate_trapped(self, word: int, at: int) -> bool:
        """What a shadow page has a trap for."""
        if not is_trapped(word):
            return False
        if self._emulate(word, at):
            return True
        registers = self._registers
        msr = registers.msr
        if msr & Msr.PR:
            self._interrupts.deliver(Vector.PROGRAM, at, Srr1.PRIVILEGED)
            return True
        if TLBIEL.matches(word) or TLBIE.matches(word):
            self._translations.invalidate(invalidation(word, registers.gpr))
        elif MTPIDR.matches(word):
            self._translations.switch_process(registers.gpr[word >> RS_SHIFT & 31] & _MASK32)
        elif MFMSR.matches(word):
            registers.gpr[word >> RS_SHIFT & 31] = msr | (Msr.S if self._interrupts.mode.secure else 0)
        elif not SLBIA.matches(word):
            registers.gpr[word >> RS_SHIFT & 31] = self._time.ticks() & _MASK64
        self._interrupts.done_outside()
        return True

    def _program(self, at: int, error_code: int) -> None:
        kind = error_code & _KIND_MASK
        if kind in (_Kind.ILLEGAL, _Kind.PRIVILEGED):
            word = self._word_at(at)
            if self._emulate(word, at):
                return
            if kind == _Kind.ILLEGAL:
                self._lacking(word, at)
        cause = _CAUSES.get(_Kind(kind)) if kind in _CAUSES else None
        self._interrupts.deliver(Vector.PROGRAM, at, cause or Srr1.ILLEGAL)

    def _emulate(self, word: int, at: int) -> bool:
        if word & _SCV_MASK == SCV.value:
            self._scv(word >> 5 & 0x7F, at)
        elif RFSCV.matches(word):
            self._rfscv(at)
        elif word & _SPR_MASK in (_MFSPR, _MTSPR) and _spr(word) == _USER_DSCR:
            self._user_dscr(word, at)
        else:
            return False
        return True

    def _scv(self, level: int, at: int) -> None:
        if self._registers.spr[Spr.FSCR] & Fscr.SCV:
            self._interrupts.system_call_vectored(level, at + WORD_BYTES)
        else:
            self._unavailable(Fscr.SCV, at)

    def _unavailable(self, facility: Fscr, at: int) -> None:
        spr = self._registers.spr
        spr[Spr.FSCR] = spr[Spr.FSCR] & (1 << 56) - 1 | facility.cause
        self._interrupts.deliver(Vector.FACILITY_UNAVAILABLE, at)

    def _rfscv(self, at: int) -> None:
        registers = self._registers
        if registers.msr & Msr.PR:
            self._interrupts.deliver(Vector.PROGRAM, at, Srr1.PRIVILEGED)
            return
        registers.pc = registers.lr & ~3
        registers.msr = registers.ctr & ~Msr.S | registers.msr & Msr.ME

    def _user_dscr(self, word: int, at: int) -> None:
        """The engine lets only the kernel at DSCR; the user's name for it is the same register."""
        registers = self._registers
        if registers.msr & Msr.PR and not registers.spr[Spr.FSCR] & Fscr.DSCR:
            self._unavailable(Fscr.DSCR, at)
            return
        if word & _SPR_MASK == _MTSPR:
            registers.spr[_DSCR] = registers.gpr[word >> RS_SHIFT & 31]
        else:
            registers.gpr[word >> RS_SHIFT & 31] = registers.spr[_DSCR]
        self._interrupts.done_outside()


def _spr(word: int) -> int:
    return word >> 16 & 31 | (word >> 11 & 31) << 5
