"""The operator's side of `pefbox debug` on pipes: no Ctrl-C is lost, whenever it comes, and none ends the command."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from protocol import debugging as said

_COMMAND = """
import socket, sys
from deploy.debug_prompt import Operator
Operator(socket.socket(fileno=int(sys.argv[1])), "alpha/kvm").run()
"""
N_ROUNDS = 300


class Debuggee:
    """The process that is debugged, as the command sees it."""

    def __init__(self, stream: socket.socket, command: subprocess.Popen[bytes]) -> None:
        self.command = command
        self._stream = stream
        self._frames = said.Frames()
        self._heard: list[said.ToProcess] = []
        stream.settimeout(5)

    def say(self, message: said.FromProcess) -> None:
        self._stream.sendall(said.frame(message))

    def hear(self) -> said.ToProcess:
        while not self._heard:
            data = self._stream.recv(65536)
            assert data, "the command ended"
            self._heard += [said.decode_to_process(body) for body in self._frames.feed(data)]
        return self._heard.pop(0)

    def type(self, line: str) -> None:
        assert self.command.stdin is not None
        self.command.stdin.write(f"{line}\n".encode())
        self.command.stdin.flush()

    def ctrl_c(self) -> None:
        self.command.send_signal(signal.SIGINT)


@contextmanager
def debuggee(stdout: int = subprocess.DEVNULL) -> Iterator[Debuggee]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        with command:
            theirs.close()
            try:
                process = Debuggee(ours, command)
                process.say(said.Prompt("(alpha/kvm) "))
                process.type("it runs")
                assert process.hear() == said.Line("it runs")
                yield process
            finally:
                command.kill()


def test_ctrl_c_right_after_a_line_is_heard_though_nothing_else_is_said() -> None:
    choice = random.Random(1)
    with debuggee() as process:
        for number in range(N_ROUNDS):
            process.say(said.Prompt("(alpha/kvm) "))
            process.type(f"line {number}")
            assert process.hear() == said.Line(f"line {number}")
            time.sleep(choice.choice((0, choice.random() * 0.001)))
            process.ctrl_c()
            assert process.hear() == said.Interrupt()


def test_ctrl_c_is_heard_while_nobody_reads_what_is_shown() -> None:
    with debuggee(stdout=subprocess.PIPE) as process:
        for _ in range(64):
            process.say(said.Output("much to show\n" * 1000))
        # Until it waits for a reader: Python lets a signal that comes just before a write wait for the write's end.
        time.sleep(0.5)
        process.ctrl_c()
        assert process.hear() == said.Interrupt()


def test_ctrl_c_comes_before_what_is_typed_after_it() -> None:
    with debuggee() as process:
        for _ in range(64):
            process.say(said.Output("much to show\n" * 1000))
        process.ctrl_c()
        process.say(said.Prompt("(alpha/kvm) "))
        process.type("continue")
        assert process.hear() == said.Interrupt()
        assert process.hear() == said.Line("continue")


def test_a_hail_of_ctrl_c_does_not_end_the_command() -> None:
    with debuggee() as process:
        process.say(said.Prompt("(alpha/kvm) "))
        process.type("first")
        assert process.hear() == said.Line("first")
        for _ in range(N_ROUNDS):
            process.ctrl_c()
        process.say(said.Prompt("(alpha/kvm) "))
        for _ in range(N_ROUNDS):
            process.ctrl_c()
        time.sleep(0.3)
        process.type("last")
        while (message := process.hear()) != said.Line("last"):
            assert message == said.Interrupt()


def test_the_end_of_the_stream_is_seen_at_the_prompt() -> None:
    with debuggee() as process:
        process.say(said.Prompt("(alpha/kvm) "))
        time.sleep(0.3)
        process._stream.shutdown(socket.SHUT_RDWR)
        assert process.command.wait(timeout=5) == 0
        assert process.command.stderr is not None
        assert process.command.stderr.read() == b"alpha/kvm: the session is over\n"
