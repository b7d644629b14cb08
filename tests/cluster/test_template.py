"""The templates: what is forked from which, and what becomes of a cluster that has lost them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from deploy.api import RunningCluster
from tests.cluster.two_hosts import cluster_text, members_of, pids, running_hosts, templates_of

ONE_HOST = cluster_text({"alpha": "vm1"})
OTHERS = ("alpha/kvm", "vm1/qemu", "vm1/guest")


def program_address(pid: int) -> str:
    """Where the interpreter's program lies, which is drawn anew for each program that is started."""
    return Path(f"/proc/{pid}/maps").read_text().partition("-")[0]


def parent_and_session(pid: int) -> tuple[int, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[3])


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


async def restart_and_see(running: RunningCluster) -> None:
    await running.restart("vm1")
    assert (await running.vm("vm1").row()).state == "running"
    assert members_of(running.launcher_pid) == set((await pids(running)).values())


async def test_a_process_shares_its_layout_with_its_template_and_the_ultravisor_with_no_other_role(
    tmp_path: Path,
) -> None:
    """An address that kvm, qemu or a guest finds out about itself says nothing about the ultravisor."""
    text = ONE_HOST.replace("secure = ", "debuggable = true\nsecure = ")
    async with running_hosts(tmp_path, text, debug=True) as running:
        found = await pids(running)

        of_ultravisor = program_address(found["alpha/ultravisor"])
        (of_others,) = {program_address(found[target]) for target in OTHERS}
        assert {program_address(pid) for pid in templates_of(running.launcher_pid)} == {of_ultravisor, of_others}
        assert of_ultravisor != of_others


async def test_a_fork_is_a_child_of_the_launcher_with_a_session_and_a_name_of_its_own(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, ONE_HOST) as running:
        for target, pid in (await pids(running)).items():
            assert parent_and_session(pid) == (running.launcher_pid, pid)
            assert title(pid) == f"pefbox {running.name} {target}"


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
        assert log.count("the template is of no use any more") == 1
