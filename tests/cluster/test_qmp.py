"""The monitor of a real VM: the public qemu.qmp client, events, `pefbox qmp` beside an open session, quit."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from qemu.qmp import EventListener, ExecuteError, QMPClient

from deploy.api import RunningCluster, cluster
from protocol.errors import UserError
from tests.cluster.vm_files import PROMPT, console_end, console_until, make_vm_files

SECONDS = 20
T = TypeVar("T")


async def in_asyncio(work: Callable[[], Awaitable[T]]) -> T:
    """Run a piece of asyncio, the client's own world, in a thread."""

    async def bounded() -> T:
        return await asyncio.wait_for(work(), SECONDS)

    return await trio.to_thread.run_sync(lambda: asyncio.run(bounded()))


async def next_event(listener: EventListener) -> tuple[str, Any]:
    event = await listener.get()
    assert isinstance(event["timestamp"], dict)
    return str(event["event"]), event.get("data")


async def drive(path: str) -> dict[str, Any]:
    """Every command but quit; what came back, and the events in order."""
    client = QMPClient("test")
    await client.connect(path)
    seen: dict[str, Any] = {"before": await client.execute("query-status")}
    seen["version"] = await client.execute("query-version")
    entries: Any = await client.execute("query-commands")
    seen["commands"] = {entry["name"] for entry in entries}
    with client.listener() as listener:
        await client.execute("stop")
        seen["stopped"] = await client.execute("query-status")
        await client.execute("stop")
        await client.execute("cont")
        seen["running"] = await client.execute("query-status")
        await client.execute("system_reset")
        seen["events"] = [await next_event(listener) for _ in range(3)]
    with pytest.raises(ExecuteError) as refused:
        await client.execute("no-such-command")
    seen["refusal"] = refused.value.error_class
    await client.disconnect()
    return seen


async def test_the_public_client_drives_a_secure_vm(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        vm = running.vm("vm1")
        path = (await vm.row()).qmp
        assert path is not None
        since = await console_end(vm)

        seen = await in_asyncio(lambda: drive(path))

        assert seen["before"] == seen["running"] == {"running": True, "status": "running"}
        assert seen["stopped"] == {"running": False, "status": "paused"}
        assert {"qmp_capabilities", "query-status", "stop", "cont", "system_reset", "quit"} <= seen["commands"]
        assert set(seen["version"]["qemu"]) == {"major", "minor", "micro"}
        reset = ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
        assert seen["events"] == [("STOP", None), ("RESUME", None), reset]
        assert seen["refusal"] == "CommandNotFound"
        await console_until(vm, PROMPT, since=since)
        assert (await vm.secure()).state == "running"


async def test_a_stopped_vm_stands_still_and_goes_on_where_it_was(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        vm = running.vm("vm1")
        await pefbox_qmp(running, "stop")
        await vm.wait_state("paused")

        with pytest.raises(UserError, match="no prompt"):
            await vm.console_command("id", seconds=0.5)
        await pefbox_qmp(running, "cont")
        await console_until(vm, "ok root")

        assert (await vm.row()).state == "running"


async def test_pefbox_does_not_wait_behind_a_user_session(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        path = (await running.vm("vm1").row()).qmp
        assert path is not None
        token = trio.lowlevel.current_trio_token()

        async def hold() -> tuple[list[tuple[str, Any]], Any]:
            client = QMPClient("user")
            await client.connect(path)
            with client.listener() as listener:
                answer = await asyncio.to_thread(lambda: trio.from_thread.run(ask, trio_token=token))
                events = [await next_event(listener) for _ in range(2)]
            await client.disconnect()
            return events, answer

        async def ask() -> list[Any]:
            with trio.fail_after(SECONDS):
                return [await pefbox_qmp(running, command) for command in ("query-status", "stop", "cont")]

        events, answers = await in_asyncio(hold)

        assert answers == [{"running": True, "status": "running"}, {}, {}]
        assert [name for name, _ in events] == ["STOP", "RESUME"]


async def test_quit_ends_the_vm_as_asked_and_nothing_is_called_a_failure(tmp_path: Path) -> None:
    async with prompt_vm(tmp_path) as running:
        vm = running.vm("vm1")
        path = (await vm.row()).qmp
        assert path is not None

        async def quit_vm() -> tuple[str, Any]:
            client = QMPClient("user")
            await client.connect(path)
            with client.listener() as listener:
                await client.execute("quit")
                event = await next_event(listener)
            try:
                await client.disconnect()
            except EOFError:
                pass
            return event

        event = await in_asyncio(quit_vm)

        assert event == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        row = await vm.wait_state("off")
        assert row.reason == "quit"
        for process in (vm.qemu, vm.guest):
            ended = await process.wait_state("gone", "failed")
            assert (ended.state, ended.detail) == ("gone", "exit status 0")
        log = running.paths.launcher_log.read_text()
        assert "failed" not in log
        for target in ("alpha/kvm", "alpha/ultravisor"):
            assert (await running.process(target).row()).state == "running"
        assert (await running.process("alpha/ultravisor").query("account"))["used_bytes"] == 0

        await vm.restart()
        await vm.secure()


@pytest.mark.parametrize("end", ["poweroff", "reboot"])
async def test_the_guest_ends_or_restarts_itself_and_the_monitor_says_so(tmp_path: Path, end: str) -> None:
    async with prompt_vm(tmp_path) as running:
        vm = running.vm("vm1")
        path = (await vm.row()).qmp
        assert path is not None
        token = trio.lowlevel.current_trio_token()

        async def type_in() -> None:
            await vm.console_write(end.encode() + b"\r")

        async def watch() -> list[tuple[str, Any]]:
            client = QMPClient("user")
            await client.connect(path)
            with client.listener() as listener:
                await asyncio.to_thread(lambda: trio.from_thread.run(type_in, trio_token=token))
                events = [await next_event(listener)]
            await client.disconnect()
            return events

        events = await in_asyncio(watch)

        if end == "poweroff":
            assert events == [("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]
            assert not (await vm.wait_state("off")).secure
        else:
            assert events == [("RESET", {"guest": True, "reason": "guest-reset"})]
            await console_until(vm, PROMPT, since=0)
        assert "failed" not in running.paths.launcher_log.read_text()


async def pefbox_qmp(running: RunningCluster, command: str) -> Any:  # noqa: ANN401
    """`pefbox qmp vm1 COMMAND`."""
    line = [sys.executable, "-m", "deploy.cli", "qmp", "vm1", command, "--cluster", running.name]
    result = await trio.run_process(line, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    assert result.returncode == 0, result.stdout.decode()
    return json.loads(result.stdout)


@asynccontextmanager
async def prompt_vm(directory: Path) -> AsyncIterator[RunningCluster]:
    """A cluster whose VM is secure and at its prompt."""
    files = make_vm_files(directory)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        await console_until(running.vm("vm1"), PROMPT)
        yield running
