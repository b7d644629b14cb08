"""L1: each process of a two-host cluster is killed and stopped in turn; in 2 s everybody who must know knows.

What the numbers mean and how long the soak takes is in docs/liveness.md.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster, processes_of
from deploy.control_channel import ControlChannel
from deploy.qmp_client import execute
from protocol import control
from services.ultravisor.audit import AuditLine, audit_path, read_lines
from tests.cluster.losing import Loss, check_noticed
from tests.cluster.test_hanging import HANGING
from tests.cluster.two_hosts import (
    VM_OF,
    at_prompt,
    cluster_text,
    log_lines,
    members_of,
    pids,
    running_hosts,
    until,
    vm_text,
)
from tests.cluster.vm_files import console_end

HOSTS = list(VM_OF)
ROLES = ("ultravisor", "kvm", "qemu", "guest")
SOAK_SECONDS = float(os.environ.get("PEFBOX_SOAK_SECONDS", "20"))
SILENT_KVM_SECONDS = 15.0
STATUS_SECONDS = 1.0
POLL_SECONDS = 0.25
PROMPT_SECONDS = 40.0
"""The guest may have thousands of hypercalls left of what it was told to do, on a machine that has other work."""
MIN_BYTES_A_SECOND = 64 * 1024


def target_of(host: str, role: str) -> str:
    """A process of the host, or of its VM."""
    return f"{host if role in ('ultravisor', 'kvm') else VM_OF[host]}/{role}"


# -- each of the eight ------------------------------------------------------------------------------------------------


async def test_each_of_eight_processes_is_killed_noticed_and_replaced(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, record=True) as running:
        for host in HOSTS:
            for role in ROLES:
                target = target_of(host, role)
                before = await pids(running)

                lost = await Loss(running, host, target, signal.SIGKILL).run()

                check_noticed(target, lost)
                await check_consequences(running, host, role)
                await running.restart(host if role in ("ultravisor", "kvm") else VM_OF[host])
                await check_replaced(running, host, role, before)


async def test_each_of_eight_processes_is_stopped_noticed_and_continued(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, record=True) as running:
        for host in HOSTS:
            for role in ROLES:
                target = target_of(host, role)
                before, since = await pids(running), await console_end(running.vm(VM_OF[host]))

                lost = await Loss(running, host, target, signal.SIGSTOP).run()

                check_noticed(target, lost)
                await running.process(target).resume()
                await running.process(target).wait_state("running")
                await check_unharmed(running, host, role, since)
                assert await pids(running) == before


async def check_consequences(running: RunningCluster, host: str, role: str) -> None:
    """What design L1 says of the death of a process of `role`, and nothing beyond its host."""
    lost, vm = target_of(host, role), running.vm(VM_OF[host])
    row = await vm.wait_state("failed", seconds=2)
    assert row.reason == f"{lost} is failed (killed by SIGKILL)"
    for ended in (vm.guest, vm.qemu):
        if ended.target != lost:
            await ended.wait_state("gone", seconds=2)
    if role != "ultravisor":
        await until_account(running, host, 0)
        await vm.wait(lambda row: not row.secure, "no longer secure", 2)
        events = [line.event for line in audit(running, host, vm.name)]
        assert events[-1] == "svm-terminated"
        assert events[-2] == "svm-failed" or role == "qemu"
    for keeper in {"ultravisor", "kvm"} - {role}:
        assert (await running.process(f"{host}/{keeper}").row()).state == "running"
    await check_others(running, host)


async def check_others(running: RunningCluster, host: str) -> None:
    """The other host and its VM noticed nothing."""
    (other,) = set(HOSTS) - {host}
    row = await running.vm(VM_OF[other]).row()
    assert (row.state, row.secure) == ("running", True)
    for role in ROLES:
        target = target_of(other, role)
        assert (await running.process(target).row()).state == "running"
        assert not [line for line in log_lines(running, target) if str(line.get("peer", "")).startswith(host)]


async def check_replaced(running: RunningCluster, host: str, role: str, before: dict[str, int]) -> None:
    """The VM is secure again, once: one incarnation runs, in new processes, and the account holds one VM (S6)."""
    vm = running.vm(VM_OF[host])
    assert (await vm.secure()).state == "running"
    await at_prompt(vm)
    after = await pids(running)
    assert members_of(running.launcher_pid) == set(after.values())
    assert len(after) == len(before) == len(HOSTS) * len(ROLES)
    new_roles = ROLES if role in ("ultravisor", "kvm") else ("qemu", "guest")
    changed = {target for target in after if after[target] != before[target]}
    assert changed == {target_of(host, new) for new in new_roles}
    await until_account(running, host, 64 << 20)
    events = [line.event for line in audit(running, host, vm.name) if line.event in ("esm", "svm-terminated")]
    assert events[-1] == "esm"


async def check_unharmed(running: RunningCluster, host: str, role: str, since: int) -> None:
    """The VM goes on where it was: it can be stopped and continued, and answers on its console."""
    vm = running.vm(VM_OF[host])
    if role == "qemu":
        # The reboot that the guest had asked for when qemu stopped is served after all.
        await at_prompt(vm, since)
    row = await vm.secure()
    assert row.qmp is not None
    for command in ("stop", "cont"):
        await trio.to_thread.run_sync(execute, row.qmp, command)
    assert "ok free=" in await vm.console_command("pages", seconds=PROMPT_SECONDS)
    assert (await vm.row()).state == "running"
    assert all(process.state == "running" for process in processes_of(await running.status()))


def audit(running: RunningCluster, host: str, vm: str) -> list[AuditLine]:
    """The audit lines about one VM."""
    with audit_path(running.paths.state_dir, host).open("rb") as log:
        return [line for line in read_lines(log) if line.vm == vm]


async def until_account(running: RunningCluster, host: str, n_bytes: int) -> None:
    """Returns when the ultravisor's account holds `n_bytes`."""
    used = -1
    with trio.move_on_after(5):
        while used != n_bytes:
            used = (await running.process(f"{host}/ultravisor").query("account"))["used_bytes"]
        return
    raise AssertionError(f"{host}: {used} bytes of secure memory are given out")


# -- what follows from whose death ------------------------------------------------------------------------------------


async def test_normal_vm_goes_on_without_ultravisor_and_fails_with_kvm(tmp_path: Path) -> None:
    text = cluster_text({"alpha": "vm1"}, vm_text("vm3", "alpha", secure=False))
    async with running_hosts(tmp_path, text) as running:
        normal = running.vm("vm3")

        await running.process("alpha/ultravisor").kill()

        assert (await running.vm("vm1").wait_state("failed", seconds=2)).reason.startswith("alpha/ultravisor is failed")
        assert "ok free=" in await normal.console_command("pages")
        assert (await normal.row()).state == "running"

        await running.process("alpha/kvm").kill()

        assert (await normal.wait_state("failed", seconds=2)).reason == "alpha/kvm is failed (killed by SIGKILL)"
        expected = [("alpha/ultravisor", 0), ("alpha/kvm", 1)]
        await until(lambda: lost_peers(running, "vm3/guest") == expected, "the normal guest names both", 2)
        await running.restart("alpha")
        await running.vm("vm1").secure()
        assert (await normal.row()).state == "running"


def lost_peers(running: RunningCluster, target: str) -> list[tuple[str, int]]:
    """The peers that a process logged as lost, and how many of its calls were open there."""
    lines = [line for line in log_lines(running, target) if line["event"] == "peer lost"]
    return [(line["peer"], line["open_calls"]) for line in lines]


async def test_svm_whose_kvm_stays_silent_ends_after_its_tries(tmp_path: Path) -> None:
    """Of what the guest asks it may stay silent for any time; what the ultravisor asks has a bound."""
    async with running_hosts(tmp_path, cluster_text({"alpha": "vm1"}), service_module=HANGING) as running:
        vm, kvm = running.vm("vm1"), running.process("alpha/kvm")
        await kvm.query("stop-at-page-in", {"vm": "vm1"})
        await vm.console_write(b"share 900\r")
        await kvm.wait_state("stopped")
        stopped = trio.current_time()

        row = await vm.wait_state("failed", seconds=SILENT_KVM_SECONDS + 4)

        assert SILENT_KVM_SECONDS - 1 < trio.current_time() - stopped < SILENT_KVM_SECONDS + 3
        assert row.reason.startswith("hypervisor-silent: ")
        assert "svm-failed" in [line.event for line in audit(running, "alpha", "vm1")]
        await kvm.resume()
        await kvm.wait_state("running")
        await vm.restart()
        await vm.secure()


async def test_news_of_a_death_reaches_a_peer_before_a_later_order_to_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        channel = ControlChannel(ours, "vm1/guest")
        channel.tell_peer_state("alpha/kvm", "stopped")
        channel.tell_peer_state("alpha/ultravisor", "stopped")
        channel.tell_peer_state("alpha/kvm", "failed")
        channel.send(control.Stop())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.write)
            end = trio.socket.from_stdlib_socket(theirs.dup())
            with end:
                sent = [control.decode_to_process(await end.recv(control.MAX_PACKET_BYTES)) for _ in range(3)]
            nursery.cancel_scope.cancel()
        channel.close()

    assert sent == [
        control.PeerState("alpha/ultravisor", "stopped"),
        control.PeerState("alpha/kvm", "failed"),
        control.Stop(),
    ]


# -- no false report --------------------------------------------------------------------------------------------------

_BUSY_LOOP = "while True: pass"
_DISK = """
[vms.{vm}]
host = "{host}"
memory = "128M"
time = "wall"
[vms.{vm}.guest]
workload = "disk"
[vms.{vm}.disks.root]
path = "@state/{vm}.img"
"""


def disk_cluster() -> str:
    """Two hosts whose VMs read and write their disks without end."""
    hosts = "".join(f'[hosts.{host}]\nsecure_memory = "256M"\n' for host in HOSTS)
    return 'make = "demo"\n' + hosts + "".join(_DISK.format(vm=vm, host=host) for host, vm in VM_OF.items())


@contextmanager
def busy_cores(loops_a_core: int) -> Iterator[None]:
    """So many busy loops on each core that this process may use."""
    n_loops = loops_a_core * len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(n_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


@pytest.mark.slow
async def test_busy_machine_gives_no_false_report(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(disk_cluster())
    async with cluster(file, state_dir=tmp_path / "own-state") as running:
        vms = [running.vm(vm) for vm in VM_OF.values()]
        for vm in vms:
            await vm.secure()
        with busy_cores(2):
            start = {vm.name: await bounced_bytes(vm) for vm in vms}
            await watch_for_false_reports(running, SOAK_SECONDS)
            end = {vm.name: await bounced_bytes(vm) for vm in vms}

        assert all(end[vm] - start[vm] > MIN_BYTES_A_SECOND * SOAK_SECONDS for vm in end), (start, end)
        reports = [line for target in await pids(running) for line in log_lines(running, target)]
        assert not [line for line in reports if line["event"] in ("peer lost", "refused", "internal error")]
        assert '"event": "state"' not in running.paths.launcher_log.read_text()


async def watch_for_false_reports(running: RunningCluster, seconds: float) -> None:
    """Ask for the status all the time; every process runs and both VMs are secure in each answer."""
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        asked = trio.current_time()
        status = await running.status()
        assert trio.current_time() - asked < STATUS_SECONDS
        assert not {row.target: row.state for row in processes_of(status) if row.state != "running"}
        rows = [vm for host in status.hosts for vm in host.vms]
        assert [(vm.name, vm.state, vm.secure) for vm in rows] == [(vm, "running", True) for vm in VM_OF.values()]
        await trio.sleep(POLL_SECONDS)


async def bounced_bytes(vm: Vm) -> int:
    """What its disk workload has moved through swiotlb so far."""
    answer = await vm.console_command("pages", seconds=30)
    (value,) = [word for word in answer.split() if word.startswith("bounced_bytes=")]
    return int(value.partition("=")[2])
