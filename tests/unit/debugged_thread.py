"""A thread that works in beats, as a service's does, and an operator at the prompt of a debugger in it."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

from protocol import debugging as said
from services.runtime.debugging.session import Debuggee, PromptSession
from services.runtime.debugging.threads import PostedThread
from services.runtime.watch import Watch

SECONDS = 5.0


def meet() -> None:
    """Where a breakpoint is set, met with every beat."""
    time.sleep(0.002)


class DebuggedThread(threading.Thread):
    """Beats until `end`; `died` is what ended it before."""

    def __init__(self, on_held: Callable[[bool], None] = lambda held: None) -> None:
        super().__init__(daemon=True)
        self.n_beats = 0
        self.holds: list[bool] = []
        """What the service heard of being held."""
        self.died: BaseException | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._is_over = False
        self._on_held = on_held

    def __enter__(self) -> DebuggedThread:
        self._said_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over = True
        self.join(SECONDS)
        sys.unraisablehook = self._said_before

    def _unraisable(self, what: sys.UnraisableHookArgs) -> None:
        """Ctrl-C may come while a finalizer runs, where Python drops it: it is lost, as the operator sees."""
        if what.exc_type is not KeyboardInterrupt:
            self._said_before(what)

    def run(self) -> None:
        """As Thread."""
        try:
            while not self._is_over:
                self._beat()
        except BaseException as error:
            self.died = error

    def _beat(self) -> None:
        while self._posted:
            self._posted.popleft()()
        meet()
        self.n_beats += 1

    def debugged(self) -> Operator:
        """An operator who comes to its prompt."""
        ours, theirs = socket.socketpair()
        thread = PostedThread(self._posted.append)
        session = PromptSession(Debuggee("vm1/guest", thread, Watch(list), cast(Any, None), self._held), theirs)
        session.start()
        return Operator(ours, session)

    def _held(self, held: bool) -> None:
        self.holds.append(held)
        self._on_held(held)

    def check_works(self) -> None:
        """It lives, is not held, and beats."""
        since, until = self.n_beats, time.monotonic() + SECONDS
        while self.n_beats < since + 3 and self.died is None and time.monotonic() < until:
            time.sleep(0.005)
        assert self.died is None, repr(self.died)
        assert self.n_beats >= since + 3, "it stands still"
        assert self.holds == [True, False] * (len(self.holds) // 2), self.holds


class Operator:
    """The other end of a session."""

    def __init__(self, stream: socket.socket, session: PromptSession) -> None:
        self.session = session
        self.shown = ""
        self._stream = stream
        self._stream.settimeout(SECONDS)
        self._frames = said.Frames()
        self._heard: deque[said.FromProcess] = deque()

    def prompt(self) -> str:
        """Returns at the next prompt: what was shown before it."""
        self.shown = ""
        while not isinstance(message := self._next(), said.Prompt):
            assert message is not None, "the session has ended"
            self._show(message)
        return self.shown

    def type(self, line: str) -> None:
        """Send a line; one that the session does not hear any more is lost."""
        self._send(said.Line(line))

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._send(said.Interrupt())

    def vanish(self) -> int:
        """The end of what is typed; what is said is heard for longer, and the session must end: its last prompts."""
        n_prompts = 0
        self._stream.shutdown(socket.SHUT_WR)
        try:
            while (message := self._next()) is not None:
                n_prompts += isinstance(message, said.Prompt)
                self._show(message)
            return n_prompts
        except TimeoutError:
            raise AssertionError("the session does not end") from None
        finally:
            self._stream.close()

    def _show(self, message: said.FromProcess) -> None:
        if isinstance(message, said.Output):
            self.shown += message.text

    def _send(self, message: said.ToProcess) -> None:
        try:
            self._stream.sendall(said.frame(message))
        except OSError:
            return

    def _next(self) -> said.FromProcess | None:
        while not self._heard:
            try:
                data = self._stream.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._heard.extend(map(said.decode_from_process, self._frames.feed(data)))
        return self._heard.popleft()
