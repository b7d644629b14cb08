"""When each played call was open: how long the longest was, which were open at once, and which was never answered."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from protocol.errors import CallTimeout

ANSWER_SECONDS = 20.0
"""A played call that is open for longer ends with CallTimeout: the test says which, and does not hang."""


@dataclass(frozen=True, slots=True)
class Span:
    """One call, from its first byte out to its answer in; times in seconds of one monotonic clock."""

    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it was open."""
        return self.end_s - self.start_s

    def overlaps(self, other: Span) -> bool:
        """Whether both were open at some moment."""
        return max(self.start_s, other.start_s) < min(self.end_s, other.end_s)


@dataclass(slots=True)
class CallLog:
    """Every played call by name: how many, the longest, and those open now."""

    counts: Counter[str] = field(default_factory=Counter)
    longest_s: dict[str, float] = field(default_factory=dict)
    open_now: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def open(self, peer: str, name: str, seconds: float | None = ANSWER_SECONDS) -> Iterator[None]:
        """A call to `peer` is open for as long as the block runs; raises CallTimeout after `seconds`, if any."""
        start = time.monotonic()
        self.open_now[name] += 1
        try:
            with bounded(peer, name, seconds):
                yield
        finally:
            self.open_now[name] -= 1
            self.counts[name] += 1
            self.longest_s[name] = max(self.longest_s.get(name, 0.0), time.monotonic() - start)

    def still_open(self) -> list[str]:
        """Names of calls that nobody has answered."""
        return sorted(name for name, count in self.open_now.items() if count)


@contextmanager
def bounded(peer: str, name: str, seconds: float | None) -> Iterator[None]:
    """Raises CallTimeout when the block takes longer than `seconds` (None: as long as it likes)."""
    with trio.CancelScope(deadline=math.inf if seconds is None else trio.current_time() + seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise CallTimeout(peer, name, seconds or 0.0)
