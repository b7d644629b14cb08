"""The operator's side of a session at the prompt of a process (protocol.debugging)."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading

from deploy.cli_support import printable
from deploy.client import LauncherClient
from deploy.operator_protocol import DEBUG
from protocol import debugging as said
from protocol.errors import MalformedMessage

_READ_BYTES = 64 * 1024


def attach(client: LauncherClient, target: str) -> None:
    """Serve the operator until the session ends; raises UserError when there is none."""
    place = client.call(DEBUG, {"target": target})["target"]
    if sys.stdin.isatty():
        # Editing of the line, for terminals of any size.
        import readline  # noqa: F401
    _Operator(client.take_over(), place).run()


class _Operator:
    """The main thread types and shows; another one reads the stream, whose end must be seen at the prompt too."""

    def __init__(self, stream: socket.socket, target: str) -> None:
        self._stream = stream
        self._target = target
        self._said: queue.SimpleQueue[said.FromProcess | None] = queue.SimpleQueue()
        self._is_typing = False
        self._is_over = False
        self._left = False

    def run(self) -> None:
        """Until the process goes on without debugger, or is gone."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            try:
                message = self._said.get()
                if message is None:
                    break
                self._take(message)
            except KeyboardInterrupt:
                if not self._is_over:
                    self._send(said.Interrupt())
        sys.stderr.write(f"{self._target}: the session is over\n")

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
        if self._is_typing:
            os.kill(os.getpid(), signal.SIGINT)

    def _take(self, message: said.FromProcess) -> None:
        if isinstance(message, said.Output):
            sys.stdout.write(printable(message.text))
            sys.stdout.flush()
        elif isinstance(message, said.Prompt) and not self._left:
            self._ask(message.text)

    def _ask(self, prompt: str) -> None:
        while not self._is_over:
            try:
                self._is_typing = True
                line = input(printable(prompt)) if sys.stdin.isatty() else _next_line(prompt)
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                continue
            except EOFError:
                self._leave()
                return
            finally:
                self._is_typing = False
            self._send(said.Line(line[: said.MAX_TEXT_CHARS]))
            if not sys.stdin.isatty():
                # What came from a file is shown as if it had been typed.
                sys.stdout.write(f"{printable(line)}\n")
                sys.stdout.flush()
            return

    def _leave(self) -> None:
        """The process hears the end of the stream, and closes it when it goes on."""
        self._left = True
        sys.stdout.write("\n")
        try:
            self._stream.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _send(self, message: said.ToProcess) -> None:
        try:
            self._stream.sendall(said.frame(message))
        except OSError:
            # What ended the session is told by the stream's end.
            return


def _next_line(prompt: str) -> str:
    sys.stdout.write(printable(prompt))
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
