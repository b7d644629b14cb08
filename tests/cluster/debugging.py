"""An operator at the prompt of `pefbox debug`, for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from deploy.api import RunningCluster
from deploy.client import LauncherClient
from protocol.errors import UserError
from tests.cluster.two_hosts import process_state, until

SECONDS = 15.0
PEFBOX = [sys.executable, "-m", "deploy.cli"]


class Operator:
    """`pefbox debug TARGET` on pipes; what it shows up to the next prompt is the answer to a command."""

    def __init__(self, process: trio.Process, target: str) -> None:
        self.process = process
        self.prompt = f"({target}) "
        self.shown = ""

    async def held(self) -> str:
        """Returns when the process is held at the prompt: what was shown since the last one."""
        return await self._shown_until(self.prompt)

    async def type(self, line: str) -> None:
        """Type one line, which the process has when this returns; it may run then."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(f"{line}\n".encode())
        await self._shown_until(f"{line}\n")

    async def command(self, line: str) -> str:
        """What a command shows, after which the process is held again."""
        await self.type(line)
        return await self.held()

    async def _shown_until(self, mark: str) -> str:
        assert self.process.stdout is not None
        with trio.move_on_after(SECONDS):
            while True:
                text, found, rest = self.shown.partition(mark)
                if found:
                    self.shown = rest
                    return text
                data = await self.process.stdout.receive_some(65536)
                if not data:
                    raise UserError(f"pefbox debug ended: {self.shown!r}")
                self.shown += data.decode()
        raise UserError(f"no {mark!r} within {SECONDS:g} s: {self.shown!r}")

    async def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    async def leave(self) -> None:
        """`detach`, which ends the command."""
        await self.type("detach")
        with trio.fail_after(SECONDS):
            assert await self.process.wait() == 0


async def interrupt(process: trio.Process) -> None:
    """SIGINT to a command at its terminal: readline sees one that comes just before it waits only with the next key."""
    await until(lambda: process_state(process.pid) == "S", "the command waits")
    process.send_signal(signal.SIGINT)


@asynccontextmanager
async def at_prompt(running: RunningCluster, target: str) -> AsyncIterator[Operator]:
    """An operator at the prompt of `target`; what is left of it afterwards is killed."""
    process = await trio.lowlevel.open_process(
        [*PEFBOX, "debug", target, "--cluster", running.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield Operator(process, target)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def refusal_of(running: RunningCluster, what: str, arguments: dict[str, object]) -> str:
    """The one line with which the launcher refuses an order."""
    with LauncherClient(running.paths.run_dir) as client:
        try:
            client.call(what, dict(arguments))
        except UserError as error:
            return str(error)
    raise AssertionError(f"{what} was not refused")
