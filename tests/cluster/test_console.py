"""`pefbox console`: a person's terminal both ways over a pty, and lines from a pipe."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from deploy.api import RunningCluster, cluster
from tests.cluster.vm_files import PROMPT, console_until, make_vm_files

SECONDS = 10.0
LEAVE = b"\x1d"


class PtyConsole:
    """`pefbox console vm1` on a pseudo terminal of its own."""

    def __init__(self, cluster_name: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "deploy.cli", "console", "vm1", "--cluster", cluster_name]
        self.settings = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        self.shown = b""

    def read_until(self, mark: bytes, start: int = 0) -> bytes:
        """What the terminal shows from `start` on, as soon as it has `mark`."""
        deadline = time.monotonic() + SECONDS
        while mark not in self.shown[start:]:
            readable, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"no {mark!r} in {self.shown[start:]!r}"
            self.shown += os.read(self.master, 4096)
        return self.shown[start:]

    def type_in(self, keys: bytes) -> int:
        """Press keys; where the output after them begins."""
        start = len(self.shown)
        os.write(self.master, keys)
        return start


@contextmanager
def pty_console(cluster_name: str) -> Iterator[PtyConsole]:
    console = PtyConsole(cluster_name)
    try:
        yield console
    finally:
        console.process.kill()
        console.process.wait()
        os.close(console.master)
        os.close(console.slave)


def talk(cluster_name: str) -> None:
    """One session: old output, an answer, editing, leaving; then another."""
    with pty_console(cluster_name) as console:
        console.read_until(b"Ctrl-] leaves")
        console.read_until(b"pefbox: ready\r\n> ")
        start = console.type_in(b"pages\r")
        answer = console.read_until(b"\n> ", start)
        assert answer.startswith(b"pages\r\nok free=")
        start = console.type_in(b"idx\x7f\r")
        assert b"ok root\r\n" in console.read_until(b"\n> ", start)

        console.type_in(LEAVE)

        assert console.process.wait(SECONDS) == 0
        assert termios.tcgetattr(console.slave) == console.settings
    with pty_console(cluster_name) as console:
        console.read_until(b"ok root")


async def test_a_terminal_talks_both_ways_and_ctrl_bracket_leaves(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        await trio.to_thread.run_sync(talk, running.name)


async def test_lines_from_a_pipe_are_sent_one_by_one_and_answered(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        command = [sys.executable, "-m", "deploy.cli", "console", "vm1", "--cluster", running.name]
        result = await trio.run_process(command, stdin=b"id\nfrob\nsum 0x10\n", capture_stdout=True)

    lines = result.stdout.decode().splitlines()
    answers = [line for line in lines if line.startswith(("ok", "error"))]
    assert answers[:2] == ["ok root", "error unknown command; try help"]
    assert len(answers) == 3 and len(answers[2]) == len("ok ") + 64


async def test_the_console_of_an_unknown_vm_is_one_line(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        command = [sys.executable, "-m", "deploy.cli", "console", "vm9", "--cluster", running.name]
        result = await trio.run_process(command, stdin=b"", capture_stdout=True, capture_stderr=True, check=False)

    assert result.returncode != 0
    assert result.stderr.decode().splitlines() == ['pefbox: no VM "vm9"; there are: vm1']


@asynccontextmanager
async def prompt_vm(directory: Path) -> AsyncIterator[RunningCluster]:
    """A cluster whose VM is at its prompt."""
    files = make_vm_files(directory)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        await console_until(running.vm("vm1"), PROMPT)
        yield running
