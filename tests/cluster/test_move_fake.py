"""The launcher's part of a migration, with processes that only speak the control protocol."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.manifest import ManifestData, clean_run_dir, is_alive, read_manifest
from deploy.tables import processes_of
from protocol.errors import UserError
from tests.cluster.conftest import FAKE_SERVICE

FILE = """
[networks.lan]
[hosts.alpha]
secure_memory = "64M"
[hosts.beta]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "16M"
[vms.vm1.disks.root]
path = "{disk}"
[[vms.vm1.devices]]
kind = "virtio-net"
network = "lan"
[vms.vm2]
host = "alpha"
memory = "16M"
guest.boot = "kernel"
[[vms.vm2.devices]]
kind = "virtio-net"
network = "lan"
"""
ARRIVED = "vm1/qemu@beta"


@asynccontextmanager
async def two_hosts(directory: Path, more: str = "") -> AsyncIterator[RunningCluster]:
    disk = directory / "root.img"
    disk.write_bytes(bytes(4096))
    file = directory / "c.toml"
    file.write_text(FILE.format(disk=disk) + more)
    async with cluster(file, service_module=FAKE_SERVICE) as running:
        yield running


async def seen(running: RunningCluster, target: str) -> dict[str, Any]:
    answer: dict[str, Any] = await running.process(target).query("seen")
    # A packet that says nothing more than its name is left out.
    return {**answer, "events": [event for event in answer["events"] if " " in event]}


async def answers(running: RunningCluster, target: str, **values: object) -> None:
    await running.process(target).query("set-answer", {k.replace("_", "."): v for k, v in values.items()})


async def says(running: RunningCluster, target: str, status: str, **facts: object) -> None:
    await answers(running, target, migration_status={"status": status, **facts})


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 8) -> None:
    with trio.fail_after(seconds):
        while True:
            if await holds():
                return
            await trio.sleep(0.02)


async def until_phase(vm: Vm, phase: str) -> dict[str, Any]:
    async def came() -> bool:
        try:
            return bool((await vm.job_info())["phase"] == phase)
        except UserError:
            return False

    await until(came)
    return await vm.job_info()


async def under_way(running: RunningCluster, vm: str = "vm1", **limits: int) -> Vm:
    moving = running.vm(vm)
    await moving.begin_migration("beta", **limits)
    await until_phase(moving, "moving")
    return moving


def manifest_of(running: RunningCluster) -> ManifestData:
    manifest = read_manifest(running.paths.manifest)
    assert manifest is not None
    return manifest


def exists(path: str) -> bool:
    return os.path.exists(path)


def link_dirs(running: RunningCluster) -> set[str]:
    """Every directory of a process and of a link, below the run directory."""
    root = running.paths.run_dir
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()}


async def test_a_vm_that_has_moved_lives_on_the_other_host_alone(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        before = await running.vm("vm1").row()
        vm = await under_way(running, bandwidth=1 << 20, downtime_limit=50)
        await running.process("vm1/qemu").query("channel", {"send": b"bulk"})
        assert await running.process(ARRIVED).query("channel") == b"bulk"
        await check_arriving(running)

        await says(running, ARRIVED, "completed")
        await says(running, "vm1/qemu", "completed", transferred_bytes=123, downtime_ms=7, junk=b"\0")
        facts = await until_phase(vm, "done")

        assert facts["progress"] == {"transferred_bytes": 123, "downtime_ms": 7}
        assert (facts["source"], facts["host"], facts["status"]) == ("alpha", "beta", "completed")
        after = await vm.row()
        assert (await vm.host(), after.state, after.incarnation, after.migration, after.arriving) == (
            "beta", "running", 2, None, [],
        )  # fmt: skip
        assert {row.pid for row in before.processes}.isdisjoint(row.pid for row in after.processes)
        manifest = manifest_of(running)
        assert len(manifest.segments) == 2
        assert {process.pid for process in manifest.processes} >= {row.pid for row in after.processes}
        assert not {row.pid for row in before.processes} & {process.pid for process in manifest.processes}
        for target in ("alpha/kvm", "alpha/ultravisor"):
            events = (await seen(running, target))["events"]
            assert events[-1] == "removed vm1"
            assert not any(event.startswith("vm1 is incoming") for event in events)
        await check_networks(running)
        assert after.qmp == str(running.paths.run_dir / "vm1.qemu.2" / "qmp.sock")
        directories = link_dirs(running)
        assert not {"vm1.qemu", "vm1.guest", "alpha.kvm/vm1.qemu.1"} & directories
        assert {"vm1.qemu.2", "vm1.guest.2", "beta.kvm/vm1.qemu.2"} <= directories


async def check_arriving(running: RunningCluster) -> None:
    """What the processes of both sides were told."""
    qemu, guest = await seen(running, ARRIVED), await seen(running, "vm1/guest@beta")
    assert qemu["vms"] == guest["vms"] == [["vm1", 2, True]]
    assert qemu["keys"] == ["vm1:kvm-qemu.2", "vm1:qemu-migration.2"]
    assert guest["keys"] == ["vm1:kvm-guest.2", "vm1:ultravisor-guest.2"]
    assert qemu["files"] == ["disk:root", "log", "ram:vm1", "stream:vm1", "trace"]
    assert qemu["config"]["run_dir"].endswith("vm1.qemu.2")
    for role in ("kvm", "ultravisor"):
        assert "vm1 is incoming" in (await seen(running, f"beta/{role}"))["events"]
    source = await seen(running, "vm1/qemu@alpha")
    assert "replaced ['vm1:qemu-migration.2']" in source["events"]
    parameters = {"max-bandwidth": 1 << 20, "downtime-limit": 50}
    start = f"migration.start {{'host': 'beta', 'parameters': {parameters}, 'by_monitor': False}}"
    assert start in source["events"]
    assert source["gifts"]["migration-source"] == qemu["gifts"]["migration-destination"] == ["launcher", ""]
    row = await running.vm("vm1").row()
    assert row.migration is not None
    assert [process.target for process in row.arriving] == ["vm1/qemu@beta", "vm1/guest@beta"]
    activity = await running.order("activity", {})
    assert {process["target"] for process in processes_of(activity["status"])} == activity["links"].keys()
    assert (await running.process(ARRIVED).row()).state == "running"
    # Nobody of the source's hears of processes with the same names.
    assert not any("vm1/" in event for event in (await seen(running, "alpha/kvm"))["events"])


async def check_networks(running: RunningCluster) -> None:
    link = "replaced ['network.lan:vm1+vm2.2.1']"
    for target in ("vm1/qemu", "vm2/qemu"):
        assert link in (await seen(running, target))["events"]
    assert "vm1.qemu.2/n0.2.2.1" in link_dirs(running)


async def test_a_vm_is_never_shown_off_or_normal_between_its_two_hosts(tmp_path: Path) -> None:
    """Its source has let go of it; that it runs on the other host is not heard yet."""
    async with two_hosts(tmp_path) as running:
        for role in ("kvm", "ultravisor"):
            await running.process(f"alpha/{role}").query("set-vm", {"vm": "vm1", "values": {"secure": True}})
        assert (await running.vm("vm1").row()).secure
        vm = await under_way(running)
        await running.process("alpha/ultravisor").query("set-vm", {"vm": "vm1", "values": {"secure": False}})
        left = {"state": "left", "secure": False}
        await running.process("alpha/kvm").query("set-vm", {"vm": "vm1", "values": left})

        row = await vm.row()

        assert (row.state, row.secure) == ("running", True)


async def test_gifts_go_to_the_process_of_the_giver_s_host(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        await under_way(running)
        # What kvm has for a VM that arrives came long before its qemu had its keys.
        await running.process("beta/kvm").query("give", {"tag": "tce-table:1", "vm": "vm1"})
        await running.process("alpha/kvm").query("give", {"tag": "tce-table:2", "vm": "vm1"})
        await running.process("vm1/guest@beta").query("give", {"tag": "guest-dirty-map", "vm": "vm1"})

        async def all_came() -> bool:
            qemus = [(await seen(running, target))["gifts"] for target in ("vm1/qemu", ARRIVED)]
            kvms = [(await seen(running, f"{host}/kvm"))["gifts"] for host in ("alpha", "beta")]
            return ["tce-table:2" in qemus[0], "tce-table:1" in qemus[1], "guest-dirty-map" in kvms[1]] == [True] * 3

        await until(all_came)
        assert "tce-table:1" not in (await seen(running, "vm1/qemu"))["gifts"]
        assert "tce-table:2" not in (await seen(running, ARRIVED))["gifts"]
        assert "guest-dirty-map" not in (await seen(running, "alpha/kvm"))["gifts"]


async def test_what_the_destination_says_of_the_vm_counts_when_it_lives_there(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await running.process("beta/kvm").query("notice", {"what": "vm-state", "vm": "vm1", "detail": "secure"})
        await running.process("beta/kvm").query("set-vm", {"vm": "vm1", "values": {"state": "paused"}})
        await running.process("beta/ultravisor").query("set-vm", {"vm": "vm1", "values": {"secure": True}})
        assert (await vm.row()).state == "running"
        assert not (await vm.row()).secure

        await says(running, "vm1/qemu", "completed")
        await until_phase(vm, "done")

        row = await vm.row()
        assert (row.state, row.secure) == ("paused", True)


async def test_a_vm_that_has_moved_restarts_and_moves_again(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await says(running, "vm1/qemu", "completed")
        await until_phase(vm, "done")

        await vm.restart()
        row = await vm.row()
        assert (row.state, row.incarnation, await vm.host()) == ("running", 3, "beta")
        assert (await seen(running, "vm1/qemu"))["vms"] == [["vm1", 3, False]]

        await vm.begin_migration("alpha")
        await until_phase(vm, "moving")
        assert (await seen(running, "vm1/qemu@alpha"))["keys"] == ["vm1:kvm-qemu.4", "vm1:qemu-migration.4"]
        await says(running, "vm1/qemu", "completed")
        await until_phase(vm, "done")
        assert await vm.host() == "alpha"

        await running.process("alpha/kvm").kill()
        await vm.wait_state("failed")
        await running.restart("alpha")
        assert (await vm.wait_state("running")).incarnation == 5
        assert len(manifest_of(running).segments) == 2


@pytest.mark.parametrize(("status", "phase"), [("failed", "failed"), ("cancelled", "cancelled")])
async def test_a_vm_that_does_not_move_stays_and_nothing_stays_behind(tmp_path: Path, status: str, phase: str) -> None:
    async with two_hosts(tmp_path) as running:
        directories = link_dirs(running)
        manifest = manifest_of(running)
        vm = await under_way(running)
        arriving = (await vm.row()).arriving
        await says(running, "vm1/qemu", status, reason="the link was too slow")
        facts = await until_phase(vm, phase)

        assert facts["reason"] == ("the link was too slow" if status == "failed" else "cancelled")
        row = await vm.row()
        assert (await vm.host(), row.state, row.incarnation, row.migration, row.arriving) == (
            "alpha", "running", 1, None, [],
        )  # fmt: skip
        assert link_dirs(running) == directories
        assert manifest_of(running).segments == manifest.segments
        assert not any(exists(f"/proc/{process.pid}") for process in arriving)
        for target in ("beta/kvm", "beta/ultravisor"):
            assert (await seen(running, target))["events"][-1] == "removed vm1"
        assert "removed vm1" not in (await seen(running, "alpha/kvm"))["events"]

        # Another attempt shares no name with the first one.
        await vm.begin_migration("beta")
        await until_phase(vm, "moving")
        assert (await seen(running, ARRIVED))["keys"] == ["vm1:kvm-qemu.3", "vm1:qemu-migration.3"]


@pytest.mark.parametrize("victim", ["qemu", "guest"])
async def test_the_end_of_an_arriving_process_fails_the_move_alone(tmp_path: Path, victim: str) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await running.process(f"vm1/{victim}@beta").kill()

        async def peers_know() -> bool:
            return f"vm1/{victim} failed" in (await seen(running, "beta/kvm"))["events"]

        await until(peers_know)
        assert f"vm1/{victim} failed" not in (await seen(running, "alpha/kvm"))["events"]
        assert (await vm.job_info())["phase"] == "moving"
        await says(running, "vm1/qemu", "failed")

        facts = await until_phase(vm, "failed")
        assert facts["reason"] == f"vm1/{victim} is failed (killed by SIGKILL)"
        assert (await vm.row()).state == "running"


@pytest.mark.parametrize("victim", ["qemu", "guest"])
async def test_a_vm_whose_source_died_runs_where_it_arrived(tmp_path: Path, victim: str) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await says(running, ARRIVED, "completed")
        await running.process(f"vm1/{victim}").kill()
        await until_phase(vm, "done")

        row = await vm.row()
        assert (await vm.host(), row.state, row.reason) == ("beta", "running", "")


async def test_a_vm_whose_source_died_before_it_arrived_has_failed(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await says(running, ARRIVED, "failed")
        await running.process("vm1/qemu").kill()
        await until_phase(vm, "failed")

        row = await vm.wait_state("failed")
        assert row.reason == "vm1/qemu is failed (killed by SIGKILL)"
        assert await vm.host() == "alpha"
        await vm.restart()
        assert (await vm.wait_state("running")).incarnation == 3


async def test_death_of_the_destination_s_kvm_is_left_to_the_source_s_qemu(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        arriving = (await vm.row()).arriving
        await running.process("beta/kvm").kill()

        async def ended() -> bool:
            return not any(exists(f"/proc/{process.pid}") for process in arriving)

        await until(ended)
        await says(running, "vm1/qemu", "failed")
        await until_phase(vm, "failed")
        assert (await vm.row()).state == "running"


async def test_a_vm_that_failed_as_soon_as_it_had_arrived_fails_there(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        notice = {"what": "vm-failed", "vm": "vm1", "detail": "page-integrity"}
        await running.process("beta/ultravisor").query("notice", notice)
        await says(running, "vm1/qemu", "completed")
        await until_phase(vm, "done")

        assert (await vm.wait_state("failed")).reason == "page-integrity"
        assert await vm.host() == "beta"


async def test_the_disk_is_locked_by_whoever_runs_the_vm(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        with (tmp_path / "root.img").open("r+b") as disk:
            vm = await under_way(running)
            with pytest.raises(BlockingIOError):
                fcntl.flock(disk, fcntl.LOCK_EX | fcntl.LOCK_NB)
            await says(running, "vm1/qemu", "completed")
            await until_phase(vm, "done")
            with pytest.raises(BlockingIOError):
                fcntl.flock(disk, fcntl.LOCK_EX | fcntl.LOCK_NB)
            await vm.qemu.kill()
            await vm.wait_state("failed")
            await vm.guest.wait_state("gone")
            fcntl.flock(disk, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_what_stands_against_a_move_is_said_before_anything_is_started(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = running.vm("vm1")
        processes = manifest_of(running).processes
        assert await vm.can_migrate("beta") == []
        assert await vm.can_migrate("alpha") == ["vm1 is on alpha already"]
        with pytest.raises(UserError, match=r'^no host "gamma"; there are: alpha, beta$'):
            await vm.migrate("gamma")
        with pytest.raises(UserError, match=r'^no VM "vm9"; there are: vm1, vm2$'):
            await running.vm("vm9").migrate("beta")
        with pytest.raises(UserError, match="migration parameter downtime-limit"):
            await vm.begin_migration("beta", downtime_limit=1 << 40)

        await running.process("alpha/ultravisor").query("set-vm", {"vm": "vm1", "values": {"secure": True}})
        await running.process("beta/ultravisor").query("set-account", {"used_bytes": 60 << 20})
        await answers(running, "beta/ultravisor", migration_check={"reason": "no trusted root"})
        await answers(running, "alpha/ultravisor", migration_check={"reason": "the policy forbids it"})
        reasons = await vm.can_migrate("beta")
        assert reasons == [
            "beta has 4 MiB of secure memory free and vm1 needs 16 MiB: restart or stop a secure VM there, "
            "or give it more `secure_memory`",
            "alpha/ultravisor: the policy forbids it",
            "beta/ultravisor: no trusted root",
        ]
        line = r"vm1 cannot move to beta: beta has 4 MiB .* \(and 2 more: pefbox can-migrate vm1 beta\)"
        with pytest.raises(UserError, match=line):
            await vm.migrate("beta")
        await running.process("beta/kvm").stop()
        await running.process("beta/kvm").wait_state("stopped")
        assert "beta/kvm is stopped" in await vm.can_migrate("beta")
        assert manifest_of(running).processes == processes


async def test_a_vm_that_moves_or_its_hosts_are_not_restarted_and_it_moves_once(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        with pytest.raises(UserError, match="restart is not possible: vm1 is on its way to beta"):
            await vm.restart()
        with pytest.raises(UserError, match="vm1 cannot move to beta: vm1 is on its way to beta"):
            await vm.migrate("beta")
        await running.process("beta/kvm").kill()
        await running.process("beta/kvm").wait_state("failed")
        with pytest.raises(UserError, match="beta: vm1 is on its way from alpha to beta: pefbox migrate vm1 --cancel"):
            await running.restart("beta")
        await running.vm("vm2").restart()


async def test_limits_are_changed_and_a_cancel_is_passed_on(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        with pytest.raises(UserError, match="vm1 is not on its way anywhere"):
            await running.vm("vm1").cancel_migration()
        vm = await under_way(running)
        await vm.set_migration(bandwidth=5)
        await vm.cancel_migration()

        events = (await seen(running, "vm1/qemu"))["events"]
        assert events[-2:] == ["migration.set {'parameters': {'max-bandwidth': 5}}", "migration.cancel {}"]


async def test_a_cancel_of_what_has_moved_already_is_refused(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await answers(running, "vm1/qemu", migration_cancel={"status": "completed"})

        with pytest.raises(UserError, match="too late: vm1 runs on beta"):
            await vm.cancel_migration()


async def test_the_monitor_s_user_moves_a_vm_too_and_hears_why_not(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = running.vm("vm1")
        refusal = """migration.refused {'reason': 'no host "nowhere"; there are: alpha, beta'}"""
        await vm.qemu.query("notice", {"what": "migrate", "vm": "vm1", "detail": "nowhere"})
        with trio.fail_after(10):
            # Until it has heard, it is not heard again.
            while refusal not in (await seen(running, "vm1/qemu@alpha"))["events"]:  # noqa: ASYNC110
                await trio.sleep(0.01)

        await vm.qemu.query("notice", {"what": "migrate", "vm": "vm1", "detail": "beta"})
        await until_phase(vm, "moving")
        await running.process("alpha/kvm").query("notice", {"what": "migrate", "vm": "vm2", "detail": "beta"})
        await running.process(ARRIVED).query("notice", {"what": "migrate", "vm": "vm1", "detail": "alpha"})
        with pytest.raises(UserError, match="vm2 has not moved"):
            await running.vm("vm2").job_info()


@pytest.mark.parametrize("arrived", [True, False])
async def test_a_normal_vm_in_doubt_is_where_its_qemus_say(tmp_path: Path, arrived: bool) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await says(running, "vm1/qemu", "in-doubt")
        await until_phase(vm, "in-doubt")
        row = await vm.row()
        assert (row.state, row.reason) == ("paused", "nobody knows where it runs: pefbox recover vm1")
        with pytest.raises(UserError, match="nobody knows where vm1 runs"):
            await vm.restart()
        with pytest.raises(UserError, match="vm1/qemu on beta is running and does not say what it has"):
            await vm.recover()

        await says(running, ARRIVED, "completed" if arrived else "failed")
        assert await vm.recover() == ("beta" if arrived else "alpha")
        assert (await vm.row()).state == "running"
        assert (await vm.row()).migration is None
        if not arrived:
            assert "migration.resume {}" in (await seen(running, "vm1/qemu"))["events"]
        with pytest.raises(UserError, match="vm1 is not in doubt"):
            await vm.recover()


@pytest.mark.parametrize(("word", "moved"), [("cc", True), ("cc", False), (None, False)])
async def test_a_secure_vm_in_doubt_is_where_the_ultravisors_say(tmp_path: Path, word: str | None, moved: bool) -> None:
    async with two_hosts(tmp_path) as running:
        await running.process("alpha/ultravisor").query("set-vm", {"vm": "vm1", "values": {"secure": True}})
        vm = await under_way(running)
        given = {"word": word, "session": "dd"}
        await answers(running, "alpha/ultravisor", migration_word=given, migration_take={"moved": moved})
        await says(running, "vm1/qemu", "in-doubt")
        await until_phase(vm, "in-doubt")

        assert await vm.recover() == ("beta" if moved else "alpha")

        source = [e for e in (await seen(running, "alpha/ultravisor"))["events"] if e.startswith("migration.")]
        back = "aa" if word is None else "bb"
        assert source[-2:] == [
            "migration.word {'vm': 'vm1', 'as': 'source'}",
            f"migration.take {{'vm': 'vm1', 'as': 'source', 'word': '{back}'}}",
        ]
        events = (await seen(running, "beta/ultravisor"))["events"]
        if word is None:
            assert "migration.abandon {'vm': 'vm1', 'session': 'dd'}" in events
        else:
            assert "migration.take {'vm': 'vm1', 'as': 'destination', 'word': 'cc'}" in events
        # Where it runs its qemu hears so, which may have given it up.
        order = "migration.has-started {}" if moved else "migration.resume {}"
        assert order in (await seen(running, "vm1/qemu"))["events"]


async def test_a_vm_that_does_not_go_on_after_a_doubt_is_said_to_stand_still(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await says(running, "vm1/qemu", "in-doubt")
        await until_phase(vm, "in-doubt")
        await says(running, ARRIVED, "failed")
        await answers(running, "vm1/qemu", migration_resume={"refused": "the ultravisor has not taken the VM back"})

        with pytest.raises(UserError, match="vm1 stands still on alpha: vm1/qemu: the ultravisor has not taken"):
            await vm.recover()

        row = await vm.row()
        assert row.state == "paused"
        assert row.reason == "it does not go on: vm1/qemu: the ultravisor has not taken the VM back: pefbox recover vm1"
        await answers(running, "vm1/qemu", migration_resume=None)
        assert await vm.recover() == "alpha"
        assert (await vm.row()).state == "running"


async def test_the_host_where_a_vm_in_doubt_may_be_comes_back_before_it_is_recovered(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        await says(running, "vm1/qemu", "in-doubt")
        await until_phase(vm, "in-doubt")
        for host in ("alpha", "beta"):
            await running.process(f"{host}/kvm").kill()
            await running.process(f"{host}/kvm").wait_state("failed")
        with pytest.raises(UserError, match="alpha: vm1 is on its way from alpha to beta: pefbox recover vm1"):
            await running.restart("alpha")

        await running.restart("beta")
        assert await vm.recover() == "alpha"

        assert (await vm.row()).reason == "alpha/kvm is failed (killed by SIGKILL)"
        await running.restart("alpha")
        assert (await vm.wait_state("running")).incarnation == 3


async def test_a_secure_vm_in_doubt_whose_source_lost_its_ultravisor_is_where_it_arrived_or_gone(
    tmp_path: Path,
) -> None:
    async with two_hosts(tmp_path) as running:
        await running.process("alpha/ultravisor").query("set-vm", {"vm": "vm1", "values": {"secure": True}})
        vm = await under_way(running)
        await says(running, "vm1/qemu", "in-doubt")
        await until_phase(vm, "in-doubt")
        await running.process("alpha/ultravisor").kill()
        await running.process("alpha/ultravisor").wait_state("failed")
        await says(running, ARRIVED, "completed")

        assert await vm.recover() == "beta"
        assert (await vm.row()).state == "running"


async def test_a_move_is_cancelled_while_its_processes_start(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = running.vm("vm1")
        await vm.begin_migration("beta")
        await vm.cancel_migration()

        await until_phase(vm, "cancelled")
        events = (await seen(running, "vm1/qemu"))["events"]
        assert not any(event.startswith("migration.start") for event in events)


async def test_limits_that_are_changed_while_its_processes_start_count_from_the_beginning(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = running.vm("vm1")
        await vm.begin_migration("beta", bandwidth=5, downtime_limit=50)
        await vm.set_migration(bandwidth=7)

        await until_phase(vm, "moving")
        events = (await seen(running, "vm1/qemu@alpha"))["events"]
        start = next(event for event in events if event.startswith("migration.start"))
        assert "'parameters': {'max-bandwidth': 7, 'downtime-limit': 50}" in start


async def test_two_vms_move_at_once(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vms = [await under_way(running, name) for name in ("vm1", "vm2")]
        for vm in vms:
            await says(running, f"{vm.name}/qemu", "completed")
            await until_phase(vm, "done")

        assert [await vm.host() for vm in vms] == ["beta", "beta"]
        for vm in vms:
            assert "replaced ['network.lan:vm1+vm2.2.2']" in (await seen(running, f"{vm.name}/qemu"))["events"]


async def test_a_start_that_fails_is_undone_with_its_reason(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        directories, segments = link_dirs(running), manifest_of(running).segments
        vm = running.vm("vm1")
        (tmp_path / "root.img").unlink()
        await vm.begin_migration("beta")
        facts = await until_phase(vm, "failed")

        assert facts["reason"].endswith("root.img: No such file or directory")
        assert link_dirs(running) == directories
        assert manifest_of(running).segments == segments
        assert (await vm.row()).state == "running"


async def test_down_in_the_middle_ends_all_and_leaves_nothing(tmp_path: Path, own_directories: Path) -> None:
    async with two_hosts(tmp_path) as running:
        await under_way(running)
        manifest = manifest_of(running)
        assert len(manifest.processes) == 4 + 4 + 2
        assert len(manifest.segments) == 3

        assert await running.down() == 0

    assert not any(is_alive(process) for process in manifest.processes)
    assert not any(exists(f"/dev/shm/{name}") for name in manifest.segments)
    assert list((own_directories / "pefbox").iterdir()) == []


async def test_down_while_it_starts_leaves_nothing(tmp_path: Path, own_directories: Path) -> None:
    async with two_hosts(tmp_path) as running:
        await running.vm("vm1").begin_migration("beta")
        assert await running.down() == 0

    assert list((own_directories / "pefbox").iterdir()) == []


async def test_killed_launcher_in_the_middle_takes_all_along(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        await under_way(running)
        manifest = manifest_of(running)
        running.kill_launcher()
        await running.wait_launcher()

        async def all_ended() -> bool:
            return not any(is_alive(process) for process in manifest.processes)

        await until(all_ended)
        removed = clean_run_dir(running.paths.run_dir)
        assert removed is not None
        assert {f"segment {name}" for name in manifest.segments} <= set(removed)


async def test_an_arriving_process_that_hangs_is_shown(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        await under_way(running)
        arrived = running.process(ARRIVED)
        await arrived.stop()
        await arrived.wait_state("stopped")

        async def told() -> bool:
            return "vm1/qemu stopped" in (await seen(running, "beta/kvm"))["events"]

        await until(told)
        assert (await running.process("vm1/qemu").row()).state == "running"
        await arrived.resume()
        await arrived.wait_state("running")


def pefbox(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deploy.cli", *arguments], capture_output=True, text=True, timeout=60)


async def test_the_commands_move_a_vm_and_say_how_it_went(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:

        async def command(*arguments: str) -> subprocess.CompletedProcess[str]:
            return await trio.to_thread.run_sync(pefbox, *arguments)

        assert (await command("can-migrate", "vm1", "beta")).stdout == "yes: vm1 can move to beta\n"
        refused = await command("can-migrate", "vm1", "alpha")
        assert (refused.returncode, refused.stdout) == (1, "no: vm1 cannot move to alpha\n  vm1 is on alpha already\n")
        started = await command("migrate", "vm1", "beta", "--bandwidth", "64M/s", "--detach")
        assert started.returncode == 0
        assert started.stdout.startswith("vm1  alpha -> beta  moving")
        assert (await command("migrate", "vm1", "--downtime-limit", "9")).returncode == 0
        assert (await command("migrate", "vm1", "--cancel")).returncode == 0
        progress = {"round": 2, "transferred_bytes": 5 << 20, "remaining_bytes": 1 << 20, "total_bytes": 16 << 20}
        await says(running, "vm1/qemu", "active", zero_pages=3, data_pages=4, expected_downtime_ms=10, **progress)
        await trio.sleep(0.2)
        shown = await command("jobinfo", "vm1")
        assert shown.stdout.splitlines()[1:] == [
            "  round 2  5.0 MiB sent  1.0 MiB of 16 MiB remain",
            "  pages  zero 3  data 4",
            "  expected downtime 10 ms",
        ]
        for view in ("status", "ps"):
            assert "vm1/qemu@beta" in (await command(view)).stdout
        await says(running, "vm1/qemu", "completed", transferred_bytes=70 << 20, downtime_ms=84)
        await until_phase(running.vm("vm1"), "done")
        assert json.loads((await command("jobinfo", "vm1", "--json")).stdout)["phase"] == "done"
        assert (await command("recover", "vm1")).stderr == "pefbox: vm1 is not in doubt: it is on beta\n"

        await answers(running, "vm1/qemu", migration_started={"status": "failed", "reason": "no luck"})
        failed = await command("migrate", "vm1", "alpha")
        assert (failed.returncode, failed.stderr) == (1, "pefbox: vm1 stays on beta: no luck\n")
        await answers(
            running,
            "vm1/qemu",
            migration_started={"status": "completed", "transferred_bytes": 70 << 20, "downtime_ms": 84},
        )
        done = await command("migrate", "vm1", "alpha")
        assert done.returncode == 0
        assert done.stdout.startswith("vm1 runs on alpha: ")
        assert done.stdout.endswith(" s, downtime 84 ms, 70 MiB\n")
        console = await trio.to_thread.run_sync(lambda: subprocess.run(
            [sys.executable, "-m", "deploy.cli", "console", "vm1"], capture_output=True, input=b"", timeout=20
        ))  # fmt: skip
        assert console.stdout == b"hello\n"
