"""The debuggers of a process that was started debuggable. Used in its main thread."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from protocol import debugging as said
from protocol.control import DebugMode
from services.runtime.debugging.dap import DapServer, import_debugpy
from services.runtime.debugging.session import Debuggee, PromptSession
from services.runtime.debugging.sources import load_sources
from services.runtime.debugging.threads import DebuggedThread, MainThread
from services.runtime.log import Log
from services.runtime.watch import Watch


def prepare() -> None:
    """Load what debuggers need, as long as files can be opened."""
    import_debugpy()
    load_sources()


class Debugger:
    """Lets debuggers in, one at a time. The launcher sends them, and sees to who may."""

    def __init__(self, target: str, watch: Watch, log: Log) -> None:
        self.thread: DebuggedThread = MainThread()
        """Which thread the prompt is about; the service may name another."""
        self.on_held: Callable[[bool], None] = lambda held: None
        self._target = target
        self._watch = watch
        self._log = log
        self._dap: DapServer | None = None

    def enter(self, mode: DebugMode, fd: int) -> None:
        """A session begins on the stream of `fd`, which is owned by it."""
        self._log.warning("debugger", mode=mode.value)
        match mode:
            case DebugMode.PROMPT:
                PromptSession(self._debuggee(), socket.socket(fileno=fd)).start()
            case DebugMode.DAP:
                self._listen(socket.socket(fileno=fd))
            case DebugMode.DAP_CLIENT if self._dap is not None:
                self._dap.serve(socket.socket(fileno=fd))
            case _:
                os.close(fd)

    def _listen(self, end: socket.socket) -> None:
        if self._dap is not None:
            refuse(end, "debugpy listens already")
            return
        try:
            self._dap = DapServer(self._debuggee(), end)
        except ModuleNotFoundError:
            refuse(end, "debugpy is not installed: pip install 'pefbox[debug]'")
        except Exception as error:
            # Whatever a library meets here, the process is a service and goes on.
            self._log.error("debugpy", exc_info=error)
            refuse(end, f"debugpy does not start: {error}")

    def _debuggee(self) -> Debuggee:
        root = trio.lowlevel.current_root_task()
        assert root is not None
        return Debuggee(self._target, self.thread, self._watch, root, self.on_held)


def refuse(end: socket.socket, reason: str) -> None:
    """Say why there is no session, and close its stream."""
    try:
        end.sendall(said.frame(said.Refused(reason)))
    except OSError:
        pass
    end.close()
