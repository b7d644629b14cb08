"""The prompt of a debugged thread: Python's own pdb on the operator's stream, with commands for what pefbox adds.

Nothing that is typed ends the process: what would, in pdb, leaves it alone instead.
"""

from __future__ import annotations

import bdb
import io
import pdb
import sys
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from protocol import debugging as said
from protocol.wire import Envelope
from services.runtime.debugging.sources import short_name
from services.runtime.debugging.tasks import task_lines
from services.runtime.watch import WatchedEnd, describe

if TYPE_CHECKING:
    from services.runtime.debugging.session import PromptSession

_OWN = "services.runtime.debugging."
_NOT_THE_SERVICE = (_OWN, "services.runtime.watch")
_OUTPUT_CHARS = 16 * 1024
_REFUSED = "not here: the process is a service, and goes on with `continue` or `detach`"


class _Lines(io.TextIOBase):
    """What pdb reads: each line is asked of the operator."""

    def __init__(self, ask: Callable[[str], str], prompt: str) -> None:
        self._ask, self._prompt = ask, prompt

    def readline(self, _size: int = -1, /) -> str:  # type: ignore[override]
        """As a file."""
        return self._ask(self._prompt)


class _Screen(io.TextIOBase):
    """Where pdb writes."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def write(self, text: str, /) -> int:
        """As a file."""
        for at in range(0, len(text), _OUTPUT_CHARS):
            self._show(text[at : at + _OUTPUT_CHARS])
        return len(text)


class PdbPrompt(pdb.Pdb):
    """pdb in a service. Its methods run in the debugged thread."""

    def __init__(self, session: PromptSession) -> None:
        screen = _Screen(lambda text: session.say(said.Output(said.sendable(text))))
        lines = _Lines(session.ask, f"({session.debuggee.target}) ")
        super().__init__(stdin=cast(Any, lines), stdout=cast(Any, screen), nosigint=True, readrc=False, skip=[_OWN])
        self.prompt = ""
        self.use_rawinput = False
        self._session = session
        self._steps = False
        """Whether the operator steps, and wants to see pefbox rather than trio."""
        self._serving: tuple[WatchedEnd, Envelope] | None = None
        """The message that the thread was stopped for."""

    # -- stopping ---------------------------------------------------------------------------------------------

    def stop_at(self, frame: FrameType) -> None:
        """Stop at the next line of `frame`, or of whoever it returns to."""
        self._steps = False
        bdb.Bdb.set_trace(self, _outside_debugger(frame))

    def is_skipped_module(self, module_name: str | None) -> bool:
        """As bdb: where nobody wants to stop."""
        name = module_name or ""
        return name.startswith(_NOT_THE_SERVICE) or (self._steps and name.startswith("trio."))

    def stop_tracing(self) -> None:
        """The thread runs without this debugger."""
        if getattr(sys.gettrace(), "__self__", None) is self:
            sys.settrace(None)
        self.clear_all_breaks()

    def at_message(self, end: WatchedEnd, envelope: Envelope) -> bool:
        """A watcher: stops before the next message is served."""
        self._session.debuggee.watch.remove(self.at_message)
        self._serving = (end, envelope)
        self.stop_at(sys._getframe())
        return True

    def trace_dispatch(self, frame: FrameType, event: str, arg: Any) -> Any:  # noqa: ANN401
        """As bdb, and whatever goes wrong in the debugger is not the service's."""
        if self._session.ended:
            sys.settrace(None)
            return None
        try:
            return super().trace_dispatch(frame, event, arg)
        except (KeyboardInterrupt, bdb.BdbQuit):
            return self.trace_dispatch
        except Exception as error:
            self.error(f"of the debugger: {''.join(traceback.format_exception_only(error)).strip()}")
            self.set_continue()
            return self.trace_dispatch

    def interaction(self, frame: FrameType | None, tb_or_exc: TracebackType | BaseException | None) -> None:
        """The prompt, while the process is held."""
        self._while_held(frame, lambda: pdb.Pdb.interaction(self, frame, cast(Any, tb_or_exc)))

    def user_line(self, frame: FrameType) -> None:
        """As bdb; commands of a breakpoint run while the process is held too, and may ask without `interaction`."""
        self._while_held(frame, lambda: pdb.Pdb.user_line(self, frame))

    def bp_commands(self, frame: FrameType) -> bool:
        """As pdb; they are the operator's as a line is, and broken off as one."""
        if self.commands.get(getattr(self, "currentbp", 0)):
            self._session.evaluation.begin()
        return super().bp_commands(frame)

    def _while_held(self, frame: FrameType | None, stop: Callable[[], None]) -> None:
        if self._session.is_held:
            stop()
            return
        try:
            self._session.hold(_place(frame))
            if self._serving is not None:
                self.message(f"message {describe(*self._serving)}")
            stop()
        finally:
            self._serving = None
            self._steps = True
            self._session.evaluation.under_way = False
            while self._session.is_held:
                try:
                    self._session.go_on()
                except KeyboardInterrupt:
                    continue

    # -- commands of pefbox -----------------------------------------------------------------------------------

    def do_tasks(self, arg: str) -> None:
        """tasks

        Where every trio task of the process stands, outermost frame first.
        """
        try:
            for line in task_lines(self._session.debuggee.root_task):
                self.message(line)
        except RuntimeError:
            # They are another thread's, which goes on.
            self.error("the tasks changed meanwhile: once more")

    def do_message(self, arg: str) -> None:
        """message

        The message that is being served at the frame shown or further out, decoded.
        """
        found = self._serving or _message_in(self.curframe)
        if found is None:
            self.error("no message is being served here: `nextmessage` goes on to the next one")
        else:
            self.message(describe(*found))

    def do_nextmessage(self, arg: str) -> bool | None:
        """nextmessage

        Go on, and stop when the next message from another process is about to be served.
        """
        self._session.debuggee.watch.add(self.at_message)
        self.set_continue()
        return True

    do_nm = do_nextmessage

    def do_detach(self, arg: str) -> bool | None:
        """detach

        Leave the process, which goes on; so does the end of input (Ctrl-D).
        """
        self.clear_all_breaks()
        self.set_continue()
        self._session.ended = True
        return True

    do_quit = do_q = do_exit = do_EOF = do_detach

    # -- commands of pdb that are other here ------------------------------------------------------------------

    def do_clear(self, arg: str) -> None:
        """cl(ear) [filename:lineno | bpnumber ...]

        Clear these breakpoints; without argument all of them.
        """
        if arg:
            super().do_clear(arg)
        else:
            self.clear_all_breaks()

    do_cl = do_clear

    def handle_command_def(self, line: str) -> bool:
        """As pdb, and the end of input is that of the list: pdb would take it for one more command, for ever."""
        if self._session.ended or line == "EOF":
            return True
        return bool(super().handle_command_def(line))

    def _do_not(self, arg: str) -> bool | None:
        self.error(_REFUSED)
        return None

    do_run = do_restart = do_interact = do_debug = _do_not

    def help_pefbox(self) -> None:
        """`help pefbox`."""
        for name in ("nextmessage", "message", "tasks", "detach"):
            self.message(" ".join((getattr(self, f"do_{name}").__doc__ or name).split()))


def _outside_debugger(frame: FrameType) -> FrameType:
    """The nearest frame that is the service's."""
    found = frame
    while found.f_back is not None and found.f_globals["__name__"].startswith(_NOT_THE_SERVICE):
        found = found.f_back
    return found


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown place"
    return f"{short_name(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _message_in(frame: FrameType | None) -> tuple[WatchedEnd, Envelope] | None:
    """The message that `frame`, or the nearest one further out that serves one, works on."""
    while frame is not None:
        envelope = frame.f_locals.get("envelope")
        for name in ("self", "end"):
            end = frame.f_locals.get(name)
            if isinstance(envelope, Envelope) and hasattr(end, "watch"):
                return cast(WatchedEnd, end), envelope
        frame = frame.f_back
    return None
