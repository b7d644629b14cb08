"""The operator's side of a session at the prompt of a process (protocol.debugging)."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from types import FrameType

from deploy.cli_support import printable
from deploy.client import LauncherClient
from deploy.operator_protocol import DEBUG
from protocol import debugging as said
from protocol.errors import MalformedMessage

_READ_BYTES = 64 * 1024
_LOOK_SECONDS = 0.05
"""After which who types is told once more that the stream has ended."""
_SIGNAL_CAME = said.Output("")
"""Nothing to show: it ends the wait of the main thread, so that the handler of the signal runs."""


def attach(client: LauncherClient, target: str) -> None:
    """Serve the operator until the session ends; raises UserError when there is none."""
    place = client.call(DEBUG, {"target": target})["target"]
    if sys.stdin.isatty():
        # Editing of the line, for terminals of any size.
        import readline  # noqa: F401
    Operator(client.take_over(), place).run()


class Operator:
    """The main thread types and shows. One thread reads the stream, whose end must be seen at the prompt too; another
    one sends each Ctrl-C at once, also while the main thread shows what came before.
    """

    def __init__(self, stream: socket.socket, target: str) -> None:
        self._stream = stream
        self._target = target
        self._said: queue.SimpleQueue[said.FromProcess | None] = queue.SimpleQueue()
        self._interrupts: queue.SimpleQueue[said.ToProcess] = queue.SimpleQueue()
        self._rung: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._is_typing = False
        self._is_over = False
        self._left = False

    def run(self) -> None:
        """Until the process goes on without debugger, or is gone."""
        signal.signal(signal.SIGINT, self._ctrl_c)
        threading.Thread(target=self._wake, args=[_signal_bytes()], daemon=True).start()
        for work in (self._send_interrupts, self._read):
            threading.Thread(target=work, daemon=True).start()
        while (message := self._said.get()) is not None:
            self._take(message)
        sys.stderr.write(f"{self._target}: the session is over\n")

    def _ctrl_c(self, _number: int, _frame: FrameType | None) -> None:
        if not self._is_typing:
            self._interrupts.put(said.Interrupt())
            self._rung.put(None)
            return
        # One only: the line is cleared by it, and the process is held whatever comes until the next one is typed.
        self._is_typing = False
        raise KeyboardInterrupt

    def _wake(self, signals: socket.socket) -> None:
        """A signal that comes just before the main thread waits would be heard with what comes next only."""
        while signals.recv(1):
            self._said.put(_SIGNAL_CAME)

    def _send_interrupts(self) -> None:
        while True:
            self._rung.get()
            self._send()

    def _read(self) -> None:
        frames = said.Frames()
        try:
            while data := self._stream.recv(_READ_BYTES):
                for body in frames.feed(data):
                    self._said.put(said.decode_from_process(body))
        except (OSError, MalformedMessage):
            pass
        self._is_over = True
        self._said.put(None)
        while self._is_typing:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(_LOOK_SECONDS)

    def _take(self, message: said.FromProcess) -> None:
        if isinstance(message, said.Output):
            sys.stdout.write(printable(message.text))
            sys.stdout.flush()
        elif isinstance(message, said.Prompt) and not self._left:
            self._ask(message.text)

    def _ask(self, prompt: str) -> None:
        while not self._is_over:
            try:
                line = self._typed(prompt)
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                continue
            except EOFError:
                self._leave()
                return
            self._send(said.Line(line[: said.MAX_TEXT_CHARS]))
            if not sys.stdin.isatty():
                # What came from a file is shown as if it had been typed.
                sys.stdout.write(f"{printable(line)}\n")
                sys.stdout.flush()
            return

    def _typed(self, prompt: str) -> str:
        """One line; raises EOFError at the end of input, KeyboardInterrupt for Ctrl-C and for the end of the stream."""
        self._is_typing = True
        try:
            if self._is_over:
                raise KeyboardInterrupt
            return input(printable(prompt)) if sys.stdin.isatty() else _next_line(prompt)
        finally:
            self._is_typing = False

    def _leave(self) -> None:
        """The process hears the end of the stream, and closes it when it goes on."""
        self._left = True
        sys.stdout.write("\n")
        try:
            self._stream.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _send(self, *messages: said.ToProcess) -> None:
        """Each Ctrl-C of before, then `messages`: it must not break off what was typed after it."""
        try:
            with self._sending:
                while not self._interrupts.empty():
                    self._stream.sendall(said.frame(self._interrupts.get()))
                for message in messages:
                    self._stream.sendall(said.frame(message))
        except OSError:
            # What ended the session is told by the stream's end.
            return


def _signal_bytes() -> socket.socket:
    """Has a byte for each signal that arrives, also while its handler cannot run."""
    ours, of_handler = socket.socketpair()
    of_handler.setblocking(False)
    signal.set_wakeup_fd(of_handler.detach(), warn_on_full_buffer=False)
    return ours


def _next_line(prompt: str) -> str:
    sys.stdout.write(printable(prompt))
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
