"""A debugger session at the prompt: between the operator's stream, which a thread reads, and the debugged thread.

The session ends when the operator says so or the stream closes, whatever the process does then: the debugged thread
goes on, untraced.
"""

from __future__ import annotations

import ctypes
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import trio

from protocol import debugging as said
from protocol.errors import MalformedMessage
from services.runtime.debugging.prompt import PdbPrompt
from services.runtime.debugging.threads import DebuggedThread
from services.runtime.watch import Watch

_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Debuggee:
    """What is debugged. `on_held` hears, in whichever thread, that the process stands still or goes on."""

    target: str
    thread: DebuggedThread
    watch: Watch
    root_task: trio.lowlevel.Task
    on_held: Callable[[bool], None]


class PromptSession:
    """One operator at the prompt of this process."""

    def __init__(self, debuggee: Debuggee, end: socket.socket) -> None:
        self.debuggee = debuggee
        self.ended = False
        self._end = end
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._held_thread: int | None = None
        """The debugged thread while it stands still."""
        self._asking = False
        """Whether it stands still at the prompt, and evaluates nothing."""
        self._goes_on = threading.Event()
        """Set when nothing of this session can hold the process any more."""
        self._prompt = PdbPrompt(self)
        self._reader = threading.Thread(target=self._read, name="debugger", daemon=True)

    def start(self) -> None:
        """Hold the debugged thread, and serve the operator."""
        self.say(said.Attached())
        self._reader.start()
        self.debuggee.thread.interrupt(self._hold)

    # -- in the debugged thread -------------------------------------------------------------------------------

    def say(self, message: said.FromProcess) -> None:
        """To the operator, who may be gone."""
        try:
            self._end.sendall(said.frame(message))
        except OSError:
            return

    def hold(self, where: str) -> None:
        """The thread stands still from here on, until `go_on`."""
        with self._lock:
            self._held_thread = threading.get_ident()
        self.debuggee.on_held(True)
        self.say(said.Held(where))

    def go_on(self) -> None:
        """It runs again."""
        with self._lock:
            self._held_thread = None
        self.debuggee.on_held(False)
        self.say(said.GoesOn())

    def ask(self, prompt: str) -> str:
        """What the operator types, with its line end; empty when nobody is there any more."""
        with self._lock:
            self._asking = True
        self.say(said.Prompt(prompt))
        line = self._lines.get()
        if line is None:
            self._lines.put(None)
            return ""
        return f"{line}\n"

    def leave(self) -> None:
        """The operator leaves; nothing is traced any more."""
        self.ended = True
        self.debuggee.watch.remove(self._prompt.at_message)
        self._goes_on.set()
        try:
            self._end.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _hold(self, frame: FrameType) -> None:
        if not self.ended and self._held_thread is None:
            self._prompt.stop_at(frame)

    # -- in the thread of the session -------------------------------------------------------------------------

    def _read(self) -> None:
        frames = said.Frames()
        try:
            while data := self._end.recv(_READ_BYTES):
                for body in frames.feed(data):
                    self._take(said.decode_to_process(body))
        except (OSError, MalformedMessage):
            pass
        self.ended = True
        self._break_off()
        self._lines.put(None)
        # Whatever it waited for or was traced for is over with its next step: have it make one.
        self.debuggee.thread.interrupt(self._forget)
        # Its end tells the launcher that the process goes on.
        self._goes_on.wait()
        self._end.close()

    def _take(self, message: said.ToProcess) -> None:
        if isinstance(message, said.Line):
            with self._lock:
                # From here on Ctrl-C is for what this line does.
                self._asking = False
            self._lines.put(message.text)
        elif self._held_thread is None:
            self.debuggee.thread.interrupt(self._hold)
        else:
            self._break_off()

    def _forget(self, _frame: FrameType) -> None:
        if self._held_thread is None:
            self.debuggee.watch.remove(self._prompt.at_message)
            self._prompt.stop_tracing()
            self._goes_on.set()

    def _break_off(self) -> None:
        """End what the thread evaluates for the operator, as Ctrl-C does."""
        with self._lock:
            if self._held_thread is not None and not self._asking:
                thread = ctypes.c_ulong(self._held_thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(KeyboardInterrupt))
