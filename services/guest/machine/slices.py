"""How many instructions the processor runs before it looks at its messages.

An invalidation waits for the end of a slice, and a busy loop on the time base sees it move once a slice, so slices are
short; each costs some 20 us of our own, so they are not shorter than they must be.
"""

from __future__ import annotations

import time

FIXED_INSTRUCTIONS = 100_000
"""0.2 ms of the clock `instructions`: so late the processor may see that its guest set the decrementer."""
MIN_INSTRUCTIONS = 10_000
MAX_INSTRUCTIONS = 1_000_000
TARGET_NS = 400_000


class FixedSlices:
    """Of a clock that counts instructions: every run has the same."""

    n_instructions = FIXED_INSTRUCTIONS

    def begin(self) -> None:
        """A run of the engine begins."""

    def end(self, n_retired: int) -> None:
        """It ended."""


class TimedSlices:
    """Of a clock that shows real time: code that the host runs slowly, or meets for the first time, gets fewer."""

    def __init__(self) -> None:
        self.n_instructions = FIXED_INSTRUCTIONS
        self._began_ns = 0

    def begin(self) -> None:
        """As FixedSlices."""
        self._began_ns = time.thread_time_ns()

    def end(self, n_retired: int) -> None:
        """As FixedSlices. Longer slices come by and by, shorter ones at once; a run that a call cut short says nothing.

        The time is the thread's own: that the host did something else meanwhile makes the code no slower.
        """
        if 2 * n_retired < self.n_instructions:
            return
        took_ns = max(1, time.thread_time_ns() - self._began_ns)
        fitting = min(n_retired * TARGET_NS // took_ns, 2 * self.n_instructions)
        self.n_instructions = max(MIN_INSTRUCTIONS, min(fitting, MAX_INSTRUCTIONS))
