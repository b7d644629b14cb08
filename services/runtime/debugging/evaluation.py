"""What a debugged thread computes for its operator, and how that is broken off."""

from __future__ import annotations

import ctypes
import threading


class Evaluation:
    """Between `begin` and its end, and then only, KeyboardInterrupt can be raised in the thread.

    It ends with `under_way = False`, an assignment since a call could be interrupted before it has any effect, and then
    `settle`.
    """

    def __init__(self) -> None:
        self.under_way = False
        self._thread = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """In the thread: from here on it can be broken off."""
        self._thread = threading.get_ident()
        self.under_way = True

    def settle(self) -> None:
        """In the thread, once it has ended: no interrupt is left behind.

        Raises KeyboardInterrupt, once, for one that had begun: then it is called again.
        """
        with self._lock:
            # It is not taken back instead: Python 3.11 would have a traced thread look for it for ever.
            _be_interrupted()

    def break_off(self) -> bool:
        """In another thread: end it as Ctrl-C does; False when nothing is under way."""
        with self._lock:
            if not self.under_way:
                return False
            interrupt = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), interrupt)
            return True


def _be_interrupted() -> None:
    """A function of Python's, at whose start an interrupt that waits is raised."""
