"""What a process with the rights of kvm or qemu can do to others: nothing that the kernel was asked to forbid.

The attacker is a program of its own that confines itself as a host role does (`services.runtime.confine`, its run
directory only) and then tries. The same attacker without confinement is the control: it must succeed, or a failure of
the confined one would show nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from deploy.api import RunningCluster, processes_of
from deploy.memory_segments import SHM_DIR
from deploy.python_process import child_environment
from services.runtime.confine import landlock_abi
from services.ultravisor.audit import audit_path, read_lines
from tests.cluster.conftest import own_directories
from tests.cluster.two_hosts import VM_OF, cluster_text, pids, running_hosts, templates_of, until

__all__ = ["own_directories"]

pytestmark = pytest.mark.cold

HERE = Path(__file__).parent
ON_PROCESS = ("ptrace", "mem", "fd", "environ", "pidfd_getfd", "process_vm_readv", "process_vm_writev")
NO_RIGHTS = {"EPERM", "EACCES"}
SCOPED_ABI = 6
"""The first Landlock that keeps signals inside (landlock(7))."""
ONE_HOST = cluster_text({"alpha": "vm1"})

needs_landlock = pytest.mark.skipif(not landlock_abi(), reason="this kernel has no Landlock: nothing is promised")


class Report(msgspec.Struct):
    """What the attacker says: the outcome of each attempt, `done` or the name of the error."""

    protections: dict[str, str]
    no_new_privs: int
    dumpable: int
    core_limit: tuple[int, int]
    processes: dict[str, dict[str, str]]
    files: dict[str, str]
    own: dict[str, str]


async def attack(run_dir: Path | None, targets: dict[str, int], files: list[str]) -> Report:
    """Let the attacker try; with `run_dir` it is confined as the host role of that directory."""
    orders = msgspec.json.encode({"run_dir": str(run_dir) if run_dir else None, "targets": targets, "files": files})
    command = [sys.executable, "-P", str(HERE / "attacker.py"), orders.decode()]
    environment = child_environment(os.environ)
    done = await trio.run_process(command, capture_stdout=True, cwd="/", env=environment, start_new_session=True)
    return msgspec.json.decode(done.stdout, type=Report)


@contextmanager
def sleeping_victim() -> Iterator[int]:
    """The pid of a process that nothing protects."""
    victim = subprocess.Popen(["sleep", "600"])
    try:
        yield victim.pid
    finally:
        victim.kill()
        victim.wait()


def others_of(running: RunningCluster, role: str) -> list[str]:
    """Files that are no business of vm1's `role`: keys, logs, RAM, the machine's own, and other run directories."""
    paths = running.paths
    ram = [str(path) for path in SHM_DIR.glob(f"pefbox-{running.name}-*")]
    assert ram
    keys = [str(paths.host_state_dir("alpha") / "machine-key.pem"), str(paths.host_state_dir("alpha") / "audit.jsonl")]
    owner = "alpha" if role == "kvm" else "vm1"
    own_log = paths.log_file(f"{owner}/{role}")
    return [*ram, *keys, str(own_log), "/etc/passwd", str(paths.manifest), str(paths.process_dir("alpha/ultravisor"))]


async def test_attacker_without_confinement_succeeds(tmp_path: Path) -> None:
    with sleeping_victim() as pid:
        report = await attack(None, {"victim": pid}, ["/etc/passwd"])

    if report.processes["victim"]["ptrace"] == "EPERM" and os.geteuid():
        pytest.skip("this machine forbids ptrace to ordinary users (yama)")
    assert report.processes["victim"] == {**dict.fromkeys(ON_PROCESS, "done"), "signal": "done"}
    assert report.files == {"/etc/passwd": "done"}
    assert report.own == {"exec": "done", "create": "done", "connect": "ECONNREFUSED"}


@needs_landlock
@pytest.mark.parametrize("role", ["kvm", "qemu"])
async def test_host_role_reaches_neither_processes_nor_files_of_others(tmp_path: Path, role: str) -> None:
    async with running_hosts(tmp_path, ONE_HOST) as running:
        templates = {f"template {pid}": pid for pid in templates_of(running.launcher_pid)}
        targets = await pids(running) | templates
        own_dir = running.paths.process_dir("alpha/kvm" if role == "kvm" else "vm1/qemu")
        files = others_of(running, role)

        report = await attack(own_dir, targets, files)

        assert report.protections == dict.fromkeys(("no_core", "no_new_privs", "not_dumpable", "landlock"), "on")
        assert (report.no_new_privs, report.dumpable, report.core_limit) == (1, 0, (0, 0))
        assert set(report.processes) == set(targets)
        for target, outcomes in report.processes.items():
            allowed = {name for name, outcome in outcomes.items() if outcome not in NO_RIGHTS}
            assert allowed <= ({"signal"} if landlock_abi() < SCOPED_ABI else set()), (target, outcomes)
        assert report.files == dict.fromkeys(files, "EACCES")
        assert report.own["exec"] == report.own["create"] == "EACCES"
        assert report.own["connect"] == ("EACCES" if landlock_abi() >= 4 else "ECONNREFUSED")
        assert {row.state for row in processes_of(await running.status())} == {"running"}


async def test_every_process_says_and_has_what_protects_it(tmp_path: Path) -> None:
    async with running_hosts(tmp_path) as running:
        for row in processes_of(await running.status()):
            landlock = row.protections.pop("landlock")
            assert row.protections == {"no_core": "on", "no_new_privs": "on", "not_dumpable": "on"}
            if row.role in ("kvm", "qemu"):
                assert landlock == "on" or landlock_abi() == 0
            check_in_kernel(row.pid)
        for pid in templates_of(running.launcher_pid):
            check_in_kernel(pid)
        for host, vm in VM_OF.items():
            facts = esm_facts(running, host, vm)
            assert (facts["missing_protections"] == "none") == bool(landlock_abi())


def check_in_kernel(pid: int) -> None:
    """What proc(5) shows of a process: no new privileges, no core file, and, to an ordinary user, no entry."""
    status = Path(f"/proc/{pid}/status").read_text().split("\n")
    assert "NoNewPrivs:\t1" in status
    (core,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max core")]
    assert core.split()[4:6] == ["0", "0"]
    if os.geteuid():
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/{pid}/fd")


async def test_audit_line_of_an_esm_names_a_protection_that_was_left_out(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, ONE_HOST, debug=True) as running:
        missing = esm_facts(running, "alpha", "vm1")["missing_protections"]

    assert "not_dumpable off: started debuggable" in missing


async def test_machine_without_landlock_is_named_in_status_and_in_the_audit_line(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    await trio.Path(file).write_text(ONE_HOST)
    blind = [sys.executable, "-P", str(HERE / "without_landlock.py"), sys.executable, "-P", "-m", "deploy.cli"]
    environment = child_environment(os.environ)
    name, state = "api-no-landlock", tmp_path / "own-state"
    up = ["up", str(file), "--detach", "--name", name, "--state", str(state)]
    await trio.run_process([*blind, *up], env=environment, cwd="/", capture_stdout=True)
    cli = [sys.executable, "-P", "-m", "deploy.cli"]
    try:
        await until(lambda: bool(_esm_lines(state, "alpha", "vm1")), "vm1 is secure", 20)
        shown = await trio.run_process(
            [*cli, "status", "--json", "--cluster", name], env=environment, cwd="/", capture_stdout=True
        )
    finally:
        await trio.run_process([*cli, "down", "--cluster", name], env=environment, cwd="/", capture_stdout=True)

    assert "landlock of kvm and qemu missing" in _esm_lines(state, "alpha", "vm1")[-1]["missing_protections"]
    host = msgspec.json.decode(shown.stdout)["hosts"][0]
    rows = {row["target"]: row["protections"]["landlock"] for row in host["processes"] + host["vms"][0]["processes"]}
    assert rows["alpha/kvm"] == rows["vm1/qemu"] == "missing: this kernel has no Landlock"


def esm_facts(running: RunningCluster, host: str, vm: str) -> dict[str, Any]:
    """The facts of the last successful ESM of a VM."""
    return _esm_lines(running.paths.state_dir, host, vm)[-1]


def _esm_lines(state_dir: Path, host: str, vm: str) -> list[dict[str, Any]]:
    try:
        with audit_path(state_dir, host).open("rb") as log:
            return [dict(line.facts) for line in read_lines(log) if (line.vm, line.event) == (vm, "esm")]
    except FileNotFoundError:
        return []
