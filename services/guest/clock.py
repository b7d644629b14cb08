"""The guest's time base. Two clocks, chosen by VM (`time` in the cluster file).

`wall`: the host's monotonic clock minus the time the processor was stopped; idle waits.
`instructions`: retired instructions (the model charges a declared cost an operation); idle jumps to the next event,
so the same start gives the same run.
"""

from __future__ import annotations

import time
from typing import Protocol

NS_PER_INSTRUCTION = 1


class GuestClock(Protocol):
    """What processor and kernel use."""

    def now_ns(self) -> int:
        """Nanoseconds of guest time since power on."""

    def charge(self, cost: int) -> None:
        """`cost` instructions retired."""

    def hold(self) -> None:
        """The processor stopped: time stands still."""

    def go_on(self) -> None:
        """The processor continues."""

    def skip_to(self, ns: int) -> bool:
        """Idle until `ns`: True when time jumped there, False when the processor must wait for it."""

    def move_to(self, ns: int) -> None:
        """It is `ns` now, whatever it was: a processor of elsewhere goes on here."""


class WallClock:
    """Real time minus pauses."""

    def __init__(self) -> None:
        self._origin_ns = time.monotonic_ns()
        self._held_at_ns: int | None = None

    def now_ns(self) -> int:
        """As GuestClock."""
        at = time.monotonic_ns() if self._held_at_ns is None else self._held_at_ns
        return at - self._origin_ns

    def charge(self, cost: int) -> None:
        """Real time passes by itself."""

    def hold(self) -> None:
        """As GuestClock."""
        if self._held_at_ns is None:
            self._held_at_ns = time.monotonic_ns()

    def go_on(self) -> None:
        """As GuestClock."""
        if self._held_at_ns is not None:
            self._origin_ns += time.monotonic_ns() - self._held_at_ns
            self._held_at_ns = None

    def skip_to(self, ns: int) -> bool:
        """Never: real time does not jump."""
        return ns <= self.now_ns()

    def move_to(self, ns: int) -> None:
        """As GuestClock; a clock that is held stands at `ns`."""
        self._origin_ns += self.now_ns() - ns


class InstructionClock:
    """Retired instructions."""

    def __init__(self) -> None:
        self._ns = 0

    def now_ns(self) -> int:
        """As GuestClock."""
        return self._ns

    def charge(self, cost: int) -> None:
        """As GuestClock."""
        self._ns += cost * NS_PER_INSTRUCTION

    def hold(self) -> None:
        """Nothing retires while stopped."""

    def go_on(self) -> None:
        """Nothing retires while stopped."""

    def skip_to(self, ns: int) -> bool:
        """As GuestClock."""
        self._ns = max(self._ns, ns)
        return True

    def move_to(self, ns: int) -> None:
        """As GuestClock."""
        self._ns = ns


def make_clock(kind: str) -> WallClock | InstructionClock:
    """The clock of a VM by its `time` setting."""
    return InstructionClock() if kind == "instructions" else WallClock()
