"""The monitors on real sockets inside a trio program: sessions, floods, silent clients, shutdown."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from deploy.qmp_client import QmpRefusal, execute
from protocol.errors import HostFault
from services.qemu.qmp import (
    BalloonChange,
    Monitored,
    MonitorEvents,
    Resumed,
    RunState,
    Shutdown,
    ShutdownCause,
    Stopped,
    open_monitor_socket,
    serve_monitors,
)
from services.qemu.qmp.session import MAX_WAITING_LINES, READ_BYTES

JsonObject = dict[str, Any]


class Machine:
    """A machine that is its run state; `held` keeps a reset waiting, `ended` is set by quit."""

    def __init__(self, events: MonitorEvents) -> None:
        self.state = RunState.RUNNING
        self.events = events
        self.resetting = trio.Event()
        self.held = trio.Event()
        self.resets = 0
        self.status_calls = 0
        self.reset_done = trio.Event()
        self.ended = trio.Event()

    async def stop(self) -> None:
        self.state = RunState.PAUSED
        self.events.emit(Stopped())

    async def cont(self) -> None:
        self.state = RunState.RUNNING
        self.events.emit(Resumed())

    async def reset(self) -> None:
        self.resetting.set()
        await self.held.wait()
        self.resets += 1
        self.reset_done.set()

    async def quit(self) -> None:
        self.events.emit(Shutdown.by(ShutdownCause.HOST_QUIT))
        self.ended.set()
        for _ in range(50):
            await trio.lowlevel.checkpoint()

    async def status(self) -> RunState:
        self.status_calls += 1
        return self.state

    async def balloon(self) -> int:
        return 0

    async def set_balloon(self, target_bytes: int) -> None:
        self.events.emit(BalloonChange(target_bytes))


class Served:
    """A machine with both monitors open below a directory, and the log of what they reported."""

    def __init__(self, directory: Path) -> None:
        self.log_capture = structlog.testing.LogCapture()
        self.events = MonitorEvents()
        self.machine = Machine(self.events)
        log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[self.log_capture])
        self.monitored = Monitored("vm1", self.machine, self.events, log)
        self.user, self.own = str(directory / "user.sock"), str(directory / "own.sock")

    def log_lines(self) -> list[str]:
        return [str(entry["event"]) for entry in self.log_capture.entries]


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Served]:
    served = Served(directory)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_monitors, served.monitored, served.user, served.own)
            yield served
            nursery.cancel_scope.cancel()


def names_in(directory: Path) -> list[str]:
    return os.listdir(directory)


class Client:
    """A raw client: bytes out, lines in."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def line(self) -> JsonObject:
        while b"\n" not in self._buffer:
            piece = await self.stream.receive_some(65536)
            if not piece:
                raise EOFError
            self._buffer += piece
        text, self._buffer = self._buffer.split(b"\n", 1)
        message: JsonObject = json.loads(text)
        return message

    async def ask(self, command: str) -> JsonObject:
        await self.stream.send_all(json.dumps({"execute": command}).encode())
        return await self.line()

    async def negotiate(self) -> None:
        assert "QMP" in await self.line()
        assert await self.ask("qmp_capabilities") == {"return": {}}


@asynccontextmanager
async def client(path: str) -> AsyncIterator[Client]:
    async with await trio.open_unix_socket(path) as stream:
        yield Client(stream)


@asynccontextmanager
async def outlasting_client(served: Served) -> AsyncIterator[tuple[trio.Nursery, Client]]:
    """Monitors in a nursery of their own, and a client that is still open when they have ended."""
    with trio.fail_after(30):
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            await nursery.start(serve_monitors, served.monitored, served.user, served.own)
            user = await stack.enter_async_context(client(served.user))
            await user.negotiate()
            yield nursery, user


async def test_a_message_needs_no_line_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as user:
        await user.negotiate()

        assert await user.ask("query-name") == {"return": {"name": "vm1"}}


async def test_several_messages_in_one_piece_are_answered_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as user:
        await user.negotiate()
        requests = b"".join(json.dumps({"execute": "query-status", "id": n}).encode() for n in range(300))

        await user.stream.send_all(requests)

        assert [(await user.line())["id"] for _ in range(300)] == list(range(300))


async def test_one_user_session_after_the_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for _ in range(20):
            async with client(served.user) as user:
                await user.negotiate()
                assert (await user.ask("query-status"))["return"]["status"] == "running"


async def test_the_second_user_waits_for_the_first_and_pefbox_does_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as first:
        await first.negotiate()
        async with client(served.user) as second:
            assert await trio.to_thread.run_sync(execute, served.own, "query-name") == {"name": "vm1"}
            with trio.move_on_after(0.1) as too_early:
                await second.line()
            assert too_early.cancelled_caught

            await first.stream.aclose()

            await second.negotiate()


async def test_pefbox_is_served_while_a_users_command_waits(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as user:
        await user.negotiate()
        await user.stream.send_all(b'{"execute":"system_reset"}')
        await served.machine.resetting.wait()

        assert (await trio.to_thread.run_sync(execute, served.own, "query-status"))["running"] is True

        served.machine.held.set()
        assert await user.line() == {"return": {}}


async def test_events_reach_every_session_that_has_negotiated(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as user, client(served.own) as own:
        await user.negotiate()
        assert "QMP" in await own.line()

        answers = [await user.ask("stop"), await user.line()]

        assert answers[0]["event"] == "STOP"
        assert answers[1] == {"return": {}}
        assert await own.ask("qmp_capabilities") == {"return": {}}


async def test_bad_input_is_answered_audited_and_the_session_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with client(served.user) as user:
            await user.negotiate()
            await user.stream.send_all(b'GET / HTTP/1.0\r\n{"execute": "st\xff{"execute":"query-name"}')

            assert "error" in await user.line()
            assert "error" in await user.line()
            assert (await user.line())["return"] == {"name": "vm1"}
        async with client(served.user) as following:
            await following.negotiate()
        assert served.log_lines() == ["monitor requests refused"]


async def test_a_message_without_end_is_refused_and_swallowed(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as user:
        await user.negotiate()

        await user.stream.send_all(b'{"execute":"' + b"x" * 8_000_000)

        assert "longer" in (await user.line())["error"]["desc"]
        await user.stream.send_all(b"\xff")
        assert await user.ask("query-name") == {"return": {"name": "vm1"}}


async def test_a_flood_of_requests_that_nobody_reads_stops_being_served_and_loses_nothing(tmp_path: Path) -> None:
    requests = 5000
    async with serving(tmp_path) as served, client(served.user) as user, trio.open_nursery() as nursery:
        await user.negotiate()
        nursery.start_soon(user.stream.send_all, b'{"execute":"query-status"}' * requests)

        served_before = -1
        while served.machine.status_calls != served_before:
            served_before = served.machine.status_calls
            await trio.sleep(0.2)

        assert 0 < served.machine.status_calls < requests // 2
        assert await trio.to_thread.run_sync(execute, served.own, "query-name") == {"name": "vm1"}
        for _ in range(requests):
            assert "return" in await user.line()


async def test_a_flood_leaves_the_rest_of_the_process_its_turn(tmp_path: Path) -> None:
    flood = b'{"execute":"x"' + b'[]""' * 500_000 + b"}"
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with serving(tmp_path) as served, client(served.user) as user:
        await user.negotiate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_work)
            await user.stream.send_all(flood)
            assert "error" in await user.line()
            assert await user.ask("query-name") == {"return": {"name": "vm1"}}
            nursery.cancel_scope.cancel()

    # Counted, not timed: how long a turn takes says more of the machine and of the collector than of the monitor.
    assert turns > len(flood) // READ_BYTES


async def test_a_client_that_does_not_read_its_events_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, client(served.user) as user:
        await user.negotiate()

        while not served.log_lines():
            for _ in range(MAX_WAITING_LINES):
                served.events.emit(Stopped())
            await trio.lowlevel.checkpoint()

        assert served.log_lines() == ["a monitor client does not read its events"]
        async with client(served.user) as following:
            await following.negotiate()


async def test_a_command_that_was_begun_is_finished_without_its_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with client(served.user) as user:
            await user.negotiate()
            await user.stream.send_all(b'{"execute":"system_reset"}')
            await served.machine.resetting.wait()
        served.events.emit(Stopped())
        async with client(served.user) as following:
            await following.negotiate()

            served.machine.held.set()
            await served.machine.reset_done.wait()

    assert served.machine.resets == 1


async def test_quit_is_answered_before_the_monitors_end(tmp_path: Path) -> None:
    served = Served(tmp_path)
    async with outlasting_client(served) as (nursery, user):
        await user.stream.send_all(b'{"execute":"quit"}')
        await served.machine.ended.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            event, answer = await user.line(), await user.line()
            with pytest.raises(EOFError):
                await user.line()

    assert (event["event"], event["data"]["reason"]) == ("SHUTDOWN", "host-qmp-quit")
    assert answer == {"return": {}}
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("hang", ["silent", "unread", "in-command"])
async def test_the_end_does_not_wait_for_a_client_that_hangs(tmp_path: Path, hang: str) -> None:
    served = Served(tmp_path)
    async with outlasting_client(served) as (nursery, user):
        if hang == "unread":
            with trio.move_on_after(0.5):
                await user.stream.send_all(b'{"execute":"query-commands"}' * 50_000)
        if hang == "in-command":
            await user.stream.send_all(b'{"execute":"system_reset"}')
            await served.machine.resetting.wait()
        start = trio.current_time()
        nursery.cancel_scope.cancel()

    assert trio.current_time() - start < 3
    assert "a monitor session failed" not in served.log_lines()


async def test_the_socket_file_is_for_its_owner_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for path in (served.user, served.own):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_a_dead_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left.sock"))
    left.close()
    (tmp_path / "file").write_text("kept")

    open_monitor_socket(tmp_path / "left.sock").close()
    with pytest.raises(HostFault, match="file"):
        open_monitor_socket(tmp_path / "file")

    assert (tmp_path / "file").read_text() == "kept"


async def test_a_path_too_long_for_a_socket_is_a_host_fault(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match="too long"):
        open_monitor_socket(tmp_path / ("x" * 120))


async def test_the_own_client_shows_a_refusal(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with pytest.raises(QmpRefusal) as refusal:
            await trio.to_thread.run_sync(execute, served.own, "no-such")

    assert refusal.value.error_class == "CommandNotFound"
