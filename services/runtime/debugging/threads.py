"""The thread that a debugger is about, and how it is reached while it does something else."""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Protocol

Action = Callable[[FrameType], None]
"""Run between two lines of the thread, with the frame that it is in."""

_SIGNAL = signal.SIGUSR1


class DebuggedThread(Protocol):
    """What a session needs of the thread."""

    def interrupt(self, action: Action) -> None:
        """Have `action` run in the thread, soon; from any thread."""


class MainThread:
    """The thread of the service loop. A signal reaches it also where it computes and serves nobody."""

    def __init__(self) -> None:
        """To be called in the main thread."""
        self._actions: deque[Action] = deque()
        signal.signal(_SIGNAL, self._take)

    def interrupt(self, action: Action) -> None:
        """As DebuggedThread."""
        self._actions.append(action)
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, _SIGNAL)

    def _take(self, _number: int, frame: FrameType | None) -> None:
        # A signal that comes while one is pending is lost: the first has all run that was asked for.
        while self._actions and frame is not None:
            self._actions.popleft()(frame)


class PostedThread:
    """A thread that runs what is posted to it, as a processor does at the end of each slice."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post

    def interrupt(self, action: Action) -> None:
        """As DebuggedThread."""
        self._post(lambda: action(sys._getframe(1)))
