"""A debugger session at the prompt: between the operator's stream, which a thread reads, and the debugged thread.

The session ends when the operator says so or the stream closes, whatever the process does then: the debugged thread
goes on, untraced.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import trio

from protocol import debugging as said
from protocol.errors import MalformedMessage
from services.runtime.debugging.evaluation import Evaluation
from services.runtime.debugging.prompt import PdbPrompt
from services.runtime.debugging.threads import DebuggedThread
from services.runtime.watch import Watch

_READ_BYTES = 64 * 1024
_BREAK_OFF_SECONDS = 0.1
"""After which what goes on evaluating for an operator who has gone is broken off once more."""


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
        self.is_held = False
        """Whether the debugged thread stands still. Changed by it alone."""
        self.evaluation = Evaluation()
        """What a line that the operator typed does: what Ctrl-C at the prompt breaks off."""
        self._end = end
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._typed: deque[str | None] = deque()
        """Lines that have not begun; None for one that Ctrl-C has cleared."""
        self._goes_on = threading.Event()
        """Set when nothing of this session can hold the process any more."""
        self._prompt = PdbPrompt(self)
        self._reader = threading.Thread(target=self._read, name="debugger", daemon=True)

    def start(self) -> None:
        """Hold the debugged thread, and serve the operator."""
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
        self.is_held = True
        self.debuggee.on_held(True)
        self.say(said.Held(said.sendable(where)))

    def go_on(self) -> None:
        """It runs again, as soon as it is not held; raises KeyboardInterrupt as Evaluation.settle, before that."""
        self.evaluation.settle()
        self.is_held = False
        self.debuggee.on_held(False)
        self.say(said.GoesOn())
        if self.ended:
            self.leave()

    def ask(self, prompt: str) -> str:
        """What the operator types, with its line end; empty when nobody is there any more.

        Raises KeyboardInterrupt for a line that Ctrl-C has cleared, and as Evaluation.settle.
        """
        self.evaluation.under_way = False
        self.evaluation.settle()
        self.say(said.Prompt(prompt))
        with self._lock:
            while not self._typed and not self.ended:
                self._changed.wait()
            is_gone = self.ended
            line = None if is_gone else self._typed.popleft()
            self.evaluation.begin()
        if is_gone:
            return ""
        if line is None:
            raise KeyboardInterrupt
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
        if not self.ended and not self.is_held:
            self._prompt.stop_at(frame)

    def _forget(self, _frame: FrameType) -> None:
        if not self.is_held:
            self.debuggee.watch.remove(self._prompt.at_message)
            self._prompt.stop_tracing()
            self._goes_on.set()

    # -- in the thread of the session -------------------------------------------------------------------------

    def _read(self) -> None:
        frames = said.Frames()
        try:
            while data := self._end.recv(_READ_BYTES):
                for body in frames.feed(data):
                    self._take(said.decode_to_process(body))
        except (OSError, MalformedMessage):
            pass
        with self._lock:
            self.ended = True
            self._changed.notify()
        self.evaluation.break_off()
        # Whatever it waited for or was traced for is over with its next step: have it make one.
        self.debuggee.thread.interrupt(self._forget)
        # Its end tells the launcher that the process goes on.
        while not self._goes_on.wait(_BREAK_OFF_SECONDS):
            self.evaluation.break_off()
        self._end.close()

    def _take(self, message: said.ToProcess) -> None:
        if isinstance(message, said.Line):
            with self._lock:
                self._typed.append(message.text)
                self._changed.notify()
        elif self._interrupt_line():
            # A call that waits is not broken off before it is woken.
            self.debuggee.thread.interrupt(lambda _frame: None)
        else:
            self.debuggee.thread.interrupt(self._hold)

    def _interrupt_line(self) -> bool:
        """Ctrl-C at the prompt: end what a line does, or have it not begin; False when the process runs."""
        with self._lock:
            if self.evaluation.break_off():
                return True
            if self.is_held and self._typed:
                self._typed = deque([None])
                self._changed.notify()
            return self.is_held
