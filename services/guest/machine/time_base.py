"""Time base and decrementer over either clock of the VM.

The engine reads both as plain storage: `begin` writes them before it runs, `end` looks afterwards whether the guest
wrote the decrementer. Within one run of the engine the time base stands still.
"""

from __future__ import annotations

from services.guest.clock import GuestClock
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import Spr

TICKS_PER_US = 512
"""A POWER9's time base runs at 512 MHz."""
NS_PER_US = 1000
_WORD_MASK = (1 << 32) - 1
_SIGN = 1 << 31
_FARTHEST = _SIGN - 1


class TimeBase:
    """The time of one processor. `deadline` is the time base at which the decrementer passes zero."""

    def __init__(self, clock: GuestClock, registers: RegisterFile) -> None:
        self._clock = clock
        self._registers = registers
        self._offset = 0
        self.deadline = _FARTHEST
        self._shown = 0
        self._decrementer = 0

    def reset(self) -> None:
        """As at power on: the time base goes on, the decrementer is as far away as it can be."""
        self.deadline = self.ticks() + _FARTHEST

    def ticks(self) -> int:
        """The time base now."""
        return self._clock.now_ns() * TICKS_PER_US // NS_PER_US + self._offset

    def set_ticks(self, ticks: int) -> None:
        """Go on from `ticks`."""
        self._offset += ticks - self.ticks()

    def begin(self) -> int:
        """Show the guest the present; returns the ticks until the decrementer passes zero."""
        now = self.ticks()
        left = self.deadline - now
        self._decrementer = max(left, -_SIGN) & _WORD_MASK
        self._shown = now
        spr = self._registers.spr
        spr[Spr.TBL] = now
        spr[Spr.TBU] = now >> 32 & _WORD_MASK
        spr[Spr.DEC] = self._decrementer
        return left

    def end(self) -> None:
        """Take what the guest wrote to the decrementer: it counts from the time base that the guest saw."""
        value = self._registers.spr[Spr.DEC]
        if value != self._decrementer:
            value &= _WORD_MASK
            self.deadline = self._shown + (value - 2 * _SIGN if value & _SIGN else value)
            self._decrementer = self._registers.spr[Spr.DEC]

    @property
    def expired(self) -> bool:
        """Whether a decrementer interrupt is due, which lasts until the guest writes the decrementer."""
        return self.deadline <= self.ticks()

    def deadline_ns(self) -> int:
        """When the decrementer passes zero, in nanoseconds of the clock."""
        return -((self._offset - self.deadline) * NS_PER_US // TICKS_PER_US)
