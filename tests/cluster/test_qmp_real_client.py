"""The monitor in a process of its own, driven by the public qemu.qmp client.

Run as a program, this file is that process: a machine that is only its run state, with both monitors. It prints a
line when it is ready, and ends on quit.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio
from qemu.qmp import EventListener, ExecuteError, QMPClient

from deploy.qmp_client import execute
from services.qemu.qmp import (
    Monitored,
    MonitorEvents,
    Reset,
    Resumed,
    RunState,
    Shutdown,
    ShutdownCause,
    Stopped,
    serve_monitors,
)

TIME_LIMIT_SECONDS = 20


class Machine:
    """A machine without processor or devices: a run state and the events that go with it."""

    def __init__(self, events: MonitorEvents) -> None:
        self._events = events
        self._state = RunState.PRELAUNCH
        self.ended = trio.Event()

    async def stop(self) -> None:
        if self._state is RunState.RUNNING:
            self._state = RunState.PAUSED
            self._events.emit(Stopped())

    async def cont(self) -> None:
        if self._state is not RunState.RUNNING:
            self._state = RunState.RUNNING
            self._events.emit(Resumed())

    async def reset(self) -> None:
        self._events.emit(Reset.by(ShutdownCause.HOST_RESET))

    async def quit(self) -> None:
        self._state = RunState.SHUTDOWN
        self._events.emit(Shutdown.by(ShutdownCause.HOST_QUIT))
        self.ended.set()

    async def status(self) -> RunState:
        return self._state

    async def balloon(self) -> int:
        return 0

    async def set_balloon(self, target_bytes: int) -> None:
        """Nobody asks for it."""


async def run_process(user: str, own: str) -> None:
    events = MonitorEvents()
    machine = Machine(events)
    log = structlog.wrap_logger(structlog.WriteLogger(sys.stderr))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_monitors, Monitored("vm1", machine, events, log), user, own)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await machine.ended.wait()
        nursery.cancel_scope.cancel()


class Monitors:
    """The process under test and where its monitors listen."""

    def __init__(self, directory: Path) -> None:
        self.user, self.own = str(directory / "user.sock"), str(directory / "own.sock")
        command = [sys.executable, "-W", "error", __file__, self.user, self.own]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"


@pytest.fixture
def monitors(tmp_path: Path) -> Iterator[Monitors]:
    started = Monitors(tmp_path)
    with started.process:
        yield started
        started.process.kill()


async def connected(path: str) -> QMPClient:
    client = QMPClient("test")
    await client.connect(path)
    return client


async def use_every_command(path: str) -> tuple[dict[str, object], list[str]]:
    """Returns what the queries returned by name, and the names of the events in order."""
    client = await connected(path)
    answers: dict[str, object] = {}
    with client.listener() as listener:
        for name in ("query-version", "query-commands", "query-name", "query-status"):
            answers[name] = await client.execute(name)
        for name in ("cont", "cont", "stop", "system_reset", "quit"):
            assert await client.execute(name) == {}
        events = [str((await listener.get())["event"]) for _ in range(4)]
    try:
        await client.disconnect()
    except EOFError:
        pass
    return answers, events


def test_the_public_client_uses_every_command(monitors: Monitors) -> None:
    answers, events = asyncio.run(asyncio.wait_for(use_every_command(monitors.user), TIME_LIMIT_SECONDS))

    assert answers["query-status"] == {"running": False, "status": "prelaunch"}
    assert answers["query-name"] == {"name": "vm1"}
    assert {"name": "query-commands"} in answers["query-commands"]  # type: ignore[operator]
    assert events == ["RESUME", "STOP", "RESET", "SHUTDOWN"]
    assert monitors.process.wait(TIME_LIMIT_SECONDS) == 0
    assert monitors.process.stderr is not None
    assert monitors.process.stderr.read() == ""


async def refusals(path: str) -> list[str]:
    client = await connected(path)
    classes: list[str] = []
    for name, arguments in (("no-such", {}), ("stop", {"force": True}), ("qmp_capabilities", {})):
        with pytest.raises(ExecuteError) as refused:
            await client.execute(name, arguments)
        classes.append(refused.value.error_class)
    assert await client.execute("query-name") == {"name": "vm1"}
    await client.disconnect()
    return classes


def test_the_public_client_sees_error_classes_and_its_session_survives(monitors: Monitors) -> None:
    classes = asyncio.run(asyncio.wait_for(refusals(monitors.user), TIME_LIMIT_SECONDS))

    assert classes == ["CommandNotFound", "GenericError", "CommandNotFound"]


async def watch_own_while_user_is_open(monitors: Monitors) -> list[object]:
    user = await connected(monitors.user)
    with user.listener() as listener:
        for command in ("cont", "stop"):
            await asyncio.to_thread(execute, monitors.own, command)
        seen: list[object] = [await next_event_name(listener) for _ in range(2)]
    await user.disconnect()
    again = await connected(monitors.user)
    seen.append(await again.execute("query-status"))
    await again.disconnect()
    return seen


async def next_event_name(listener: EventListener) -> object:
    event = await listener.get()
    assert isinstance(event["timestamp"], dict)
    return event["event"]


def test_both_sockets_work_at_once_and_sessions_follow_each_other(monitors: Monitors) -> None:
    seen = asyncio.run(asyncio.wait_for(watch_own_while_user_is_open(monitors), TIME_LIMIT_SECONDS))

    assert seen == ["RESUME", "STOP", {"running": False, "status": "paused"}]


if __name__ == "__main__":
    trio.run(run_process, sys.argv[1], sys.argv[2])
