"""The templates: what is forked from which, and what becomes of a cluster that has lost them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster
from deploy.python_process import child_environment
from deploy.run_dirs import LAUNCHER_SOCKET, runtime_root
from protocol.template import FAMILIES
from tests.cluster.two_hosts import (
    cluster_text,
    command_line,
    members_of,
    pids,
    running_hosts,
    templates_of,
    until,
)

pytestmark = pytest.mark.cold
ONE_HOST = cluster_text({"alpha": "vm1"})
RANDOMIZED = Path("/proc/sys/kernel/randomize_va_space")


def library_address(pid: int) -> str:
    """Where the C library lies, which is drawn anew for each program that is started."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.partition("-")[0] for line in lines if "/libc.so" in line)


async def restart_and_see(running: RunningCluster) -> None:
    await running.restart("vm1")
    assert (await running.vm("vm1").row()).state == "running"
    assert members_of(running.launcher_pid) == set((await pids(running)).values())


@pytest.mark.skipif(RANDOMIZED.read_text().strip() == "0", reason="this machine draws no addresses")
async def test_who_holds_secure_memory_shares_no_layout_with_kvm_and_qemu(tmp_path: Path) -> None:
    """An address that one of these finds out about itself says nothing about the others."""
    text = ONE_HOST.replace("secure = ", "debuggable = true\nsecure = ")
    async with running_hosts(tmp_path, text, debug=True) as running:
        address = {target: library_address(pid) for target, pid in (await pids(running)).items()}

        assert address["alpha/kvm"] == address["vm1/qemu"]
        assert len(set(address.values())) == len(FAMILIES)


async def test_a_fork_is_a_child_of_the_launcher_with_a_session_and_a_name_of_its_own(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, ONE_HOST) as running:
        found = await pids(running)
        assert members_of(running.launcher_pid) == set(found.values())
        for target, pid in found.items():
            assert os.getsid(pid) == pid
            assert command_line(pid).rstrip(b"\0") == f"pefbox {running.name} {target}".encode()


async def test_a_process_that_is_forked_later_is_watched_as_any_other(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, ONE_HOST) as running:
        await restart_and_see(running)

        os.kill((await pids(running))["vm1/guest"], signal.SIGKILL)

        row = await running.vm("vm1").wait(lambda row: row.state == "failed", "failed", seconds=2)
        assert row.reason == "vm1/guest is failed (killed by SIGKILL)"
        await restart_and_see(running)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_without_its_templates_a_cluster_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    async with running_hosts(tmp_path, ONE_HOST) as running:
        templates = templates_of(running.launcher_pid)
        for template in templates:
            os.kill(template, number)

        await restart_and_see(running)
        await restart_and_see(running)

        log = running.paths.launcher_log.read_text()
        assert log.count("processes load by themselves") == len({"guest", "qemu"})


async def test_a_start_that_waits_for_a_template_can_be_broken_off(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(ONE_HOST)
    command = [sys.executable, "-P", "-m", "deploy.cli", "up", str(file), "--name", "broken-off"]
    environment = child_environment(os.environ)
    up = await trio.lowlevel.open_process(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd="/"
    )
    await until(lambda: len(templates_of(up.pid)) == len(FAMILIES), "the templates")
    for template in templates_of(up.pid):
        os.kill(template, signal.SIGSTOP)
    await until((runtime_root() / "broken-off" / LAUNCHER_SOCKET).exists, "the start")

    up.send_signal(signal.SIGINT)

    with trio.fail_after(5):
        assert await up.wait() == 0
    assert not (runtime_root() / "broken-off").exists()
    assert up.stderr is not None
    assert b"Traceback" not in await up.stderr.receive_some()
