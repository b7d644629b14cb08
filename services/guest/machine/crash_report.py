"""A last word when the engine itself crashes: which guest code it ran.

The engine is C and translates whatever a guest executes. When it faults, the process ends as it would (the launcher
tells that a signal ended it, the VM fails, the host goes on), but first it logs where the guest was. The handler is
Python: the engine runs without the interpreter's lock, so the faulting thread can take it.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_DEFAULT = 0
_FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p


class CrashReport:
    """Calls `report(name of the signal)` once when a fault is about to end this process; keep it while it should."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._handler = _HANDLER(self._on_fault)
        for number in _FATAL:
            _libc.signal(number, ctypes.cast(self._handler, ctypes.c_void_p))

    def _on_fault(self, number: int) -> None:
        for fatal in _FATAL:
            _libc.signal(fatal, _DEFAULT)
        self._report(signal.Signals(number).name)
        # A fault would come again by itself, a signal that somebody sent would not.
        os.kill(os.getpid(), number)
