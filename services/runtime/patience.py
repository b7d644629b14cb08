"""How long a peer is waited for. The time stands still while the peer is held up, by a debugger or otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from protocol.refusals import HELD_UP_STATES


class Patience:
    """Bounds of the calls that are open to one peer."""

    def __init__(self) -> None:
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

    def peer_is(self, state: str) -> None:
        """What became of the peer; whoever waits for one that was held is given the whole time again."""
        held = state == "debugged" or state in HELD_UP_STATES
        if held is self._held:
            return
        self._held = held
        for scope, seconds in self._open.items():
            self._set(scope, seconds)

    def _set(self, scope: trio.CancelScope, seconds: float) -> None:
        scope.deadline = math.inf if self._held else trio.current_time() + seconds
