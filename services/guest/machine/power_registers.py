"""The registers of a POWER processor by their place in `shared.gdb_registers.POWER`, and its SPRs by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from services.guest.machine.interrupts import Interrupts
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import Msr, Spr
from services.guest.machine.state import N_SPRS
from services.guest.machine.time_base import TimeBase
from services.runtime.gdb.target import Refused
from shared.gdb_registers import POWER, Values

_VRSAVE = 256
_LOW = (1 << 64) - 1
_N = 32
_VMX_FIRST = 32
"""VSR 32 is the first vector register."""
_HELD = int(Msr.S | Msr.HV)
"""Bits of the MSR that no program changes, and a debugger neither."""
_STORAGE = frozenset(
    {Spr.DSISR, Spr.DAR, Spr.SRR0, Spr.SRR1, Spr.FSCR, *range(Spr.SPRG0, Spr.SPRG3 + 1), 3, 17, _VRSAVE, 815}
)
"""SPRs that only hold what a program stored: DSCR under both numbers and TAR are among them."""


class PowerRegisters:
    """Of one processor."""

    def __init__(self, registers: RegisterFile, interrupts: Interrupts, time: TimeBase) -> None:
        self._registers = registers
        self._interrupts = interrupts
        self._time = time
        self._setters = self._all_setters()

    @property
    def msr(self) -> int:
        """With S, which the engine does not hold."""
        return self._registers.msr | (Msr.S if self._interrupts.mode.secure else 0)

    def values(self) -> Values:
        """All of them. Nobody knows where the engine keeps VSCR."""
        # With each stop: so no more than it must be.
        r = self._registers
        low, high = r.vsr_halves()
        core = (*r.gpr, r.pc, self.msr, r.cr, r.lr, r.ctr, r.xer & 0xFFFF_FFFF)
        vmx = [above << 64 | below for above, below in zip(high[_VMX_FIRST:], low[_VMX_FIRST:], strict=True)]
        rest = (r.fpscr & 0xFFFF_FFFF, *vmx, None, r.spr[_VRSAVE] & 0xFFFF_FFFF)
        return Values(bool(r.msr & Msr.LE), (*core, *high[:_VMX_FIRST], *rest, *low[:_VMX_FIRST]))

    def set(self, number: int, value: int) -> None:
        """Change one; raises Refused."""
        register = POWER.registers[number]
        setter = self._setters.get(register.name)
        if setter is None:
            raise Refused(f"{register.name} cannot be changed")
        setter(value)

    def _all_setters(self) -> dict[str, Callable[[int], None]]:
        r = self._registers
        setters: dict[str, Callable[[int], None]] = {"msr": self._set_msr, "vrsave": partial(self._set_spr, _VRSAVE)}
        setters |= {name: partial(setattr, r, name) for name in ("pc", "cr", "lr", "ctr", "xer", "fpscr")}
        for n in range(_N):
            setters[f"r{n}"] = partial(self._set_gpr, n)
            setters[f"f{n}"] = partial(self._set_high, n)
            setters[f"vs{n}h"] = partial(self._set_low, n)
            setters[f"vr{n}"] = partial(r.set_vsr, _VMX_FIRST + n)
        return setters

    def _set_gpr(self, number: int, value: int) -> None:
        self._registers.gpr[number] = value

    def _set_high(self, number: int, value: int) -> None:
        self._registers.set_vsr(number, value << 64 | self._registers.vsr(number) & _LOW)

    def _set_low(self, number: int, value: int) -> None:
        self._registers.set_vsr(number, self._registers.vsr(number) & ~_LOW | value)

    def _set_msr(self, value: int) -> None:
        if (value ^ self.msr) & _HELD:
            raise Refused("MSR.S and MSR.HV are the processor's own")
        self._registers.msr = value & ~Msr.S

    # -- special purpose registers ----------------------------------------------------------------------------

    def spr_command(self, words: list[str]) -> str:
        """`spr`, `spr NAME|NUMBER`, `spr NAME|NUMBER VALUE`; raises Refused."""
        match words:
            case []:
                shown = ((number, self._spr(number)) for number in range(N_SPRS))
                return "".join(_line(number, value) for number, value in shown if value)
            case [name]:
                number = _spr_number(name)
                return _line(number, self._spr(number))
            case [name, value]:
                number = _spr_number(name)
                self._set_spr(number, _value(value))
                return _line(number, self._spr(number))
            case _:
                raise Refused("spr takes a name or number, and a value to change it")

    def _spr(self, number: int) -> int:
        """As an instruction would read it now; time stands still, so it is shown here."""
        ticks = self._time.ticks()
        live = {
            Spr.XER: self._registers.xer,
            Spr.LR: self._registers.lr,
            Spr.CTR: self._registers.ctr,
            Spr.TBL: ticks,
            Spr.TBU: ticks >> 32,
            Spr.DEC: self._time.deadline - ticks & 0xFFFF_FFFF,
        }
        return live[Spr(number)] if number in live else int(self._registers.spr[number])

    def _set_spr(self, number: int, value: int) -> None:
        if number not in _STORAGE:
            raise Refused(f"{_spr_name(number)} cannot be changed: the processor acts on it")
        self._registers.spr[number] = value


def _spr_name(number: int) -> str:
    return Spr(number).name if number in list(Spr) else f"SPR{number}"


def _line(number: int, value: int) -> str:
    return f"{_spr_name(number):<8} {number:>4}  {value:#018x}\n"


def _spr_number(text: str) -> int:
    by_name = {spr.name: int(spr) for spr in Spr}
    name = text.upper()
    digits = name.removeprefix("SPR")
    number = by_name.get(name, int(digits) if digits.isascii() and digits.isdigit() else N_SPRS)
    if not 0 <= number < N_SPRS:
        raise Refused(f"{text!r} is no special purpose register: a number below {N_SPRS}, or {', '.join(by_name)}")
    return number


def _value(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise Refused(f"{text!r} is no value of 64 bits")
    return value
