"""How far the engine runs before the processor looks at its messages: a slice, which may be several runs of the engine.

An invalidation waits for the end of a slice, and a busy loop on the time base sees it move once a slice, so slices are
short; each costs some 20 us of our own, so they are not shorter than they must be, and longer while nothing happens:
a guest that only computes would pay a good part of its time for them.

The engine is stopped either at a count of instructions, so that the same start always stops at the same instruction,
or by time, which costs the guest nothing: a count costs each block of code more than many blocks take.
"""

from __future__ import annotations

from typing import Any, Protocol

from services.guest.clock import GuestClock, InstructionClock
from services.guest.machine.alarm import Alarm
from services.guest.machine.block_counter import MAX_BLOCK_INSTRUCTIONS, BlockCounter

SLICE_INSTRUCTIONS = 100_000
"""0.2 ms of the clock `instructions`: so late the processor may see that its guest set the decrementer."""
NS_PER_INSTRUCTION = 2
"""Of the clock `instructions`: about what an instruction takes, so that firmware's delays last as long as they say."""
SLICE_NS = 400_000
"""From tick to tick, while the engine is left only for calls."""
QUIET_SLICES = 8
"""So many of them without a call or anything from outside, and the next ones are as long as they may be."""
MIN_NS = 10_000
"""So that each slice comes to run the engine, which takes some microseconds to start."""


class Slices(Protocol):
    """The slices of one engine."""

    def begin(self, limit_ns: int, left_ns: int) -> None:
        """A slice begins, of at most `limit_ns`; the decrementer expires in `left_ns`, when that is above 0."""

    def begin_masked(self, limit_ns: int) -> None:
        """As `begin`, while an interrupt waits for MSR.EE: short at first, and longer each time in a row, since
        firmware may never enable it."""

    def stir(self) -> None:
        """The engine was left for a call, or something came from outside: more may be about to."""

    def begin_run(self) -> None:
        """The engine is about to run."""

    def end_run(self, pc: int, *, fetch: bool) -> None:
        """It stopped at `pc`, with `fetch` since it could not go there."""

    @property
    def ticks(self) -> bool:
        """Whether a timer goes on until `rest`."""

    def rest(self) -> None:
        """The processor is going to sleep."""

    @property
    def used_up(self) -> bool:
        """Whether this slice leaves no room for another run."""

    @property
    def n_instructions(self) -> int | None:
        """Retired since the processor's start; None where nobody counts."""

    def reset(self, n_instructions: int = 0) -> None:
        """Count from `n_instructions`."""

    @property
    def last_block(self) -> int | None:
        """Effective address of the straight piece of code that was begun last; None where nobody counts."""


class CountedSlices:
    """Of a clock that counts instructions: every slice has the same number of them."""

    def __init__(self, engine: Any, clock: InstructionClock) -> None:  # noqa: ANN401
        self._clock = clock
        self._counter = BlockCounter(engine)
        self.n_instructions = 0
        self._left = 0
        self._stopped = False
        self._masked = MAX_BLOCK_INSTRUCTIONS

    def begin(self, limit_ns: int, left_ns: int) -> None:
        """As Slices."""
        self._masked = MAX_BLOCK_INSTRUCTIONS
        limit = _instructions(limit_ns)
        self._open(limit if left_ns <= 0 else min(limit, left_ns // NS_PER_INSTRUCTION + 1))

    def begin_masked(self, limit_ns: int) -> None:
        """As Slices."""
        self._masked = min(_instructions(limit_ns), self._masked * 2)
        self._open(self._masked)

    def _open(self, n: int) -> None:
        self._left = max(MAX_BLOCK_INSTRUCTIONS, n)
        self._stopped = False

    def stir(self) -> None:
        """As Slices."""

    def begin_run(self) -> None:
        """As Slices."""
        self._counter.begin(self._left)

    def end_run(self, pc: int, *, fetch: bool) -> None:
        """As Slices."""
        retired = self._counter.retired(pc, fetch=fetch)
        self.n_instructions += retired
        self._clock.charge(retired * NS_PER_INSTRUCTION)
        # A handler that cannot even be fetched retires nothing, and must not hold the slice for ever.
        self._left -= max(retired, 1)
        self._stopped = self._counter.stopped

    ticks = False

    def rest(self) -> None:
        """As Slices."""

    @property
    def used_up(self) -> bool:
        """As Slices."""
        return self._stopped or self._left < MAX_BLOCK_INSTRUCTIONS

    def reset(self, n_instructions: int = 0) -> None:
        """As Slices."""
        self.n_instructions = n_instructions
        self._masked = MAX_BLOCK_INSTRUCTIONS

    @property
    def last_block(self) -> int:
        """As Slices."""
        return self._counter.address


class TimedSlices:
    """Of a clock that shows real time."""

    n_instructions = None

    def __init__(self, engine: Any) -> None:  # noqa: ANN401
        self._alarm = Alarm(engine, SLICE_NS)
        self._masked_ns = MIN_NS
        self._n_quiet = 0

    def begin(self, limit_ns: int, left_ns: int) -> None:
        """As Slices."""
        self._masked_ns = MIN_NS
        self._n_quiet += 1
        if self._n_quiet == QUIET_SLICES and limit_ns > SLICE_NS:
            self._alarm.tick_every(limit_ns)
        self._begin(limit_ns if left_ns <= 0 else min(limit_ns, left_ns))

    def stir(self) -> None:
        """As Slices."""
        self._n_quiet = 0
        if self._alarm.every_ns > SLICE_NS:
            self._alarm.tick_every(SLICE_NS)

    def begin_masked(self, limit_ns: int) -> None:
        """As Slices."""
        self._masked_ns = min(SLICE_NS, self._masked_ns * 2)
        self._begin(min(limit_ns, self._masked_ns))

    def _begin(self, ns: int) -> None:
        self._alarm.begin()
        if ns < self._alarm.every_ns:
            self._alarm.ring(max(MIN_NS, ns))

    def begin_run(self) -> None:
        """As Slices."""
        self._alarm.go_on()

    def end_run(self, pc: int, *, fetch: bool) -> None:
        """As Slices."""

    @property
    def ticks(self) -> bool:
        """As Slices."""
        return self._alarm.ticks

    def rest(self) -> None:
        """As Slices."""
        self._alarm.rest()

    @property
    def used_up(self) -> bool:
        """As Slices."""
        return self._alarm.fired

    def reset(self, n_instructions: int = 0) -> None:
        """As Slices."""
        self._masked_ns = MIN_NS
        self.stir()

    @property
    def last_block(self) -> None:
        """As Slices."""
        return None


def _instructions(ns: int) -> int:
    return min(SLICE_INSTRUCTIONS, ns // NS_PER_INSTRUCTION)


def make_slices(engine: Any, clock: GuestClock) -> Slices:  # noqa: ANN401
    """For the clock of the VM."""
    return CountedSlices(engine, clock) if isinstance(clock, InstructionClock) else TimedSlices(engine)
