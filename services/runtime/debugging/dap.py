"""debugpy in this process, for editors that speak the Debug Adapter Protocol.

debugpy listens once in the life of a process, and its adapter would be a process of its own: here it is in-process, and
what it takes for its listening socket hands out connections that the launcher has accepted. So the process needs no
right to the network, and the launcher sees a client that vanishes.
"""

from __future__ import annotations

import importlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from protocol import debugging as said
from services.runtime.debugging.evaluation import Evaluation
from services.runtime.debugging.session import Debuggee

_NAME = ("127.0.0.1", 1)
"""What debugpy is told that it listens on; the launcher knows the real port."""
_NEEDED = ("debugpy.server.api", "_pydev_bundle.pydev_localhost")
"""The second is its own, and found on the path that the first one sets."""
_BREAK_OFF_SECONDS = 0.05
_RESUMING = frozenset({"continue", "next", "stepIn", "stepOut"})


def import_debugpy() -> None:
    """Import debugpy and what it would import later; nothing when it is not installed."""
    # It would say on standard error that modules of the standard library are frozen.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    try:
        for name in _NEEDED:
            importlib.import_module(name)
    except ImportError:
        return


class DapServer:
    """debugpy, listening; made once, in the main thread. Raises ImportError, AttributeError."""

    def __init__(self, debuggee: Debuggee, end: socket.socket) -> None:
        self._debuggee = debuggee
        self._end = end
        self._clients = _Clients()
        self._commands = ThreadCommands()
        self._is_held = False
        self._awaited: dict[int, str] = {}
        """Commands of the client that are not answered yet, by their sequence number."""
        debugpy: Any = importlib.import_module("debugpy")
        pydevd: Any = importlib.import_module("pydevd")
        if not hasattr(pydevd, "create_server_socket"):
            raise AttributeError("this version of it makes its socket in another way")
        self._commands.take_over(importlib.import_module("_pydevd_bundle.pydevd_comm").InternalThreadCommand)
        pydevd.create_server_socket = lambda host, port: self._clients
        debugpy.listen(_NAME, in_process_debug_adapter=True)
        pydevd.add_dap_messages_listener(self)
        debuggee.thread.interrupt(lambda _frame: debugpy.debug_this_thread())
        self._say(said.Listening())

    def serve(self, client: socket.socket) -> None:
        """A client has come."""
        self._clients.put(client)

    # -- what debugpy tells of, in its own threads ------------------------------------------------------------

    def before_send(self, message: dict[str, Any]) -> None:
        """As debugpy's IDAPMessagesListener: a message for the client."""
        if message["type"] == "event":
            if message["event"] == "stopped":
                self._hold()
            elif message["event"] == "continued":
                self._go_on()
        elif message["type"] == "response":
            command = self._awaited.pop(message["request_seq"], "")
            if command in _RESUMING and message["success"]:
                self._go_on()
            elif command == "disconnect":
                self._go_on()
                self._say(said.Detached())

    def after_receive(self, message: dict[str, Any]) -> None:
        """As debugpy's IDAPMessagesListener: a message of the client."""
        command = message.get("command", "")
        if command == "initialize":
            self._commands.allow()
        elif command == "disconnect":
            # Before it is served: what is evaluated would keep its thread from going on.
            self._commands.end(self._debuggee.thread.interrupt)
        if command in _RESUMING or command == "disconnect":
            self._awaited[message["seq"]] = command

    def _hold(self) -> None:
        if not self._is_held:
            self._is_held = True
            self._debuggee.on_held(True)
            self._say(said.Held("a breakpoint or pause of the editor"))

    def _go_on(self) -> None:
        if self._is_held:
            self._is_held = False
            self._debuggee.on_held(False)
            self._say(said.GoesOn())

    def _say(self, message: said.FromProcess) -> None:
        try:
            self._end.sendall(said.frame(message))
        except OSError:
            return


class ThreadCommands:
    """What debugpy has threads do for its client, evaluate above all: ended for one who leaves, or has vanished."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[Evaluation] = set()
        self._is_allowed = True

    def take_over(self, command: Any) -> None:  # noqa: ANN401
        """`command` is debugpy's class of them."""
        do_it = command.do_it
        command.do_it = lambda one, py_db: self.run(lambda: do_it(one, py_db))

    def run(self, action: Callable[[], None]) -> None:
        """In a thread that stands still: nothing is done for a client who has left; raises KeyboardInterrupt."""
        evaluation = Evaluation()
        with self._lock:
            if not self._is_allowed:
                return
            self._under_way.add(evaluation)
        try:
            evaluation.begin()
            action()
        finally:
            evaluation.under_way = False
            while evaluation in self._under_way:
                try:
                    evaluation.settle()
                    self._under_way.discard(evaluation)
                except KeyboardInterrupt:
                    continue

    def allow(self) -> None:
        """A client has come."""
        with self._lock:
            self._is_allowed = True

    def end(self, interrupt: Callable[[Callable[[Any], None]], None]) -> None:
        """Break off what is under way, and returns when it is over; `interrupt` wakes the debugged thread."""
        with self._lock:
            self._is_allowed = False
        while under_way := list(self._under_way):
            for evaluation in under_way:
                evaluation.break_off()
            interrupt(lambda _frame: None)
            time.sleep(_BREAK_OFF_SECONDS)


class _Clients:
    """What debugpy takes for its listening socket."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def put(self, client: socket.socket) -> None:
        """`accept` returns it."""
        self._waiting.put(client)

    def getsockname(self) -> tuple[str, int]:
        """As a socket."""
        return _NAME

    def listen(self, _backlog: int) -> None:
        """As a socket."""

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """As a socket."""
        return self._waiting.get(), _NAME

    def close(self) -> None:
        """As a socket."""
