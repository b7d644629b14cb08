"""How many lines of a log somebody may cause: a peer that repeats a call must not fill the host's disk (S5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BURST_LINES = 256
LINES_PER_SECOND = 10.0


@dataclass(slots=True)
class _Allowance:
    lines: float
    at: float
    left_out: int = 0


class LineLimit:
    """Allowance of each subject (a VM, a link) and event: `BURST_LINES` at once, `LINES_PER_SECOND` in the long run.

    `now` gives seconds on a clock that never goes back. What is left out is counted, so that the log can say so.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._allowances: dict[str, dict[str, _Allowance]] = {}

    def admit(self, subject: str, event: str) -> int | None:
        """How many such lines were left out before this one; None when this one is left out too."""
        now = self._now()
        events = self._allowances.setdefault(subject, {})
        it = events.setdefault(event, _Allowance(BURST_LINES, now))
        it.lines = min(BURST_LINES, it.lines + (now - it.at) * LINES_PER_SECOND)
        it.at = now
        if it.lines < 1:
            it.left_out += 1
            return None
        it.lines -= 1
        left_out, it.left_out = it.left_out, 0
        return left_out

    def take_left_out(self, subject: str) -> dict[str, int]:
        """Lines left out that no later line told of, by event; told now."""
        told = {event: it.left_out for event, it in self._allowances.get(subject, {}).items() if it.left_out}
        for event in told:
            self._allowances[subject][event].left_out = 0
        return told
