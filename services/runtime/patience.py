"""How long a peer is waited for. The time stands still while a debugger holds the peer, or whom the peer waits for.

For some calls it does so for a peer that is held up otherwise, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio

DEBUGGER_STATES = frozenset({"debugged", "waiting"})


class Patience:
    """Bounds of the calls that are open to one peer."""

    def __init__(self, endless_for: frozenset[str] = DEBUGGER_STATES) -> None:
        """`endless_for` are the states of the peer in which it is waited for without bound."""
        self._endless_for = endless_for
        self._held = False
        self._open: dict[trio.CancelScope, float] = {}
        """Seconds that each call is given."""

    @contextmanager
    def bound(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Cancels the block, and says so in `cancelled_caught`, when it takes longer."""
        scope = trio.CancelScope()
        self._open[scope] = seconds
        self._set(scope, seconds)
        try:
            with scope:
                yield scope
        finally:
            del self._open[scope]

    @contextmanager
    def fail_after(self, seconds: float) -> Iterator[None]:
        """As `bound`, but raises trio.TooSlowError."""
        with self.bound(seconds) as scope:
            yield
        if scope.cancelled_caught:
            raise trio.TooSlowError

    def peer_is(self, state: str) -> None:
        """What became of the peer; whoever waits for one that was held is given the whole time again."""
        held = state in self._endless_for
        if held is self._held:
            return
        self._held = held
        for scope, seconds in self._open.items():
            self._set(scope, seconds)

    def _set(self, scope: trio.CancelScope, seconds: float) -> None:
        scope.deadline = math.inf if self._held else trio.current_time() + seconds
