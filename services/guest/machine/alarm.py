"""Stops a running engine after a time, by a signal to the thread that it runs in.

The signal's handler is machine code and asks the engine to stop as `uc_emu_stop` does: the engine runs without the
interpreter's lock and would have to wait for it, and Python's own handlers come only once the engine has returned.
Written for x86-64, which `doctor` asks for anyway.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import weakref
from functools import cache
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

from protocol.errors import HostFault
from services.guest.machine.hooks import executable

_SIGNAL = signal.SIGVTALRM
_HANDLER = bytes.fromhex(
    "488b4618"  #     mov rax, [rsi+24]       si_value: the alarm's state
    "c70001000000"  # mov dword [rax], 1      fired
    "488b7808"  #     mov rdi, [rax+8]        the engine
    "ff6010"  #       jmp [rax+16]            uc_emu_stop
)
_SA_SIGINFO, _SA_RESTART = 4, 0x10000000
_SIGEV_THREAD_ID = 4
_SIGNAL_SET_BYTES = 128
_SIGEVENT_BYTES = 64
_NS_PER_S = 1_000_000_000

_libc = ctypes.PyDLL(None, use_errno=True)
"""Its functions are called with the interpreter's lock: they return at once."""


class _State(ctypes.Structure):
    """What the handler works on, in its order."""

    _fields_ = (("fired", ctypes.c_uint64), ("engine", ctypes.c_void_p), ("stop", ctypes.c_void_p))


class _SignalAction(ctypes.Structure):
    """`struct sigaction` of glibc."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * _SIGNAL_SET_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of glibc."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_char * (_SIGEVENT_BYTES - 20)),
    )


class _Interval(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns"))


class Alarm:
    """Of one engine: it ticks every `every_ns` from `go_on` on until `rest`, and each tick stops the engine.

    To set a timer costs microseconds, so it goes on ticking while the engine is left for a call. A tick that comes
    before the engine runs is lost to it; the next one is not. All but the constructor belongs to the thread that runs
    the engine, which is the one that first has it tick.
    """

    def __init__(self, engine: Any, every_ns: int) -> None:  # noqa: ANN401
        stop = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value
        self._state = _State(engine=ctypes.cast(engine._uch, ctypes.c_void_p).value, stop=stop)
        self._timer: ctypes.c_void_p | None = None
        self._spec = _Interval()
        self._never = _Interval()
        self.every_ns = every_ns
        self.ticks = False

    def tick_every(self, every_ns: int) -> None:
        """As often as this from now on; the next tick comes after as long."""
        self.every_ns = every_ns
        if self.ticks:
            self.ring(every_ns)

    def ring(self, in_ns: int) -> None:
        """The next tick comes in `in_ns`, and others follow."""
        if self._timer is None:
            self._timer = self._make_timer()
        spec = self._spec
        spec.every_s, spec.every_ns = divmod(self.every_ns, _NS_PER_S)
        spec.first_s, spec.first_ns = divmod(in_ns, _NS_PER_S)
        _libc.timer_settime(self._timer, 0, ctypes.byref(spec), None)
        self.ticks = True

    def go_on(self) -> None:
        """Tick, as until now or anew."""
        if not self.ticks:
            self.ring(self.every_ns)

    def rest(self) -> None:
        """No tick comes any more."""
        if self.ticks:
            _libc.timer_settime(self._timer, 0, ctypes.byref(self._never), None)
            self.ticks = False

    def begin(self) -> None:
        """Forget the ticks until now."""
        self._state.fired = 0

    @property
    def fired(self) -> bool:
        """Whether a tick came since `begin`."""
        return bool(self._state.fired)

    def _make_timer(self) -> ctypes.c_void_p:
        """Raises HostFault."""
        _install_handler()
        event = _SignalEvent(ctypes.addressof(self._state), _SIGNAL, _SIGEV_THREAD_ID, threading.get_native_id())
        timer = ctypes.c_void_p()
        if _libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            raise HostFault(f"no timer for the processor: {os.strerror(ctypes.get_errno())}")
        weakref.finalize(self, _libc.timer_delete, timer)
        return timer


@cache
def _install_handler() -> ctypes.c_char:
    """The handler's code, which stays for as long as the process. Raises HostFault."""
    code = executable(_HANDLER)
    action = _SignalAction(handler=ctypes.addressof(code), flags=_SA_SIGINFO | _SA_RESTART)
    if _libc.sigaction(_SIGNAL, ctypes.byref(action), None):
        raise HostFault(f"no handler for {_SIGNAL.name}: {os.strerror(ctypes.get_errno())}")
    return code
