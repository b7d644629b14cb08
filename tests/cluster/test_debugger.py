"""A debugger holds one process of a running cluster longer than any bound, and everything goes on afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, cluster, processes_of
from services.ultravisor.audit import audit_path, read_lines
from tests.cluster.debugging import at_prompt
from tests.cluster.vm_files import VmFiles, answer_of, console_end, console_until, make_vm_files

HOLD_SECONDS = 6.5
"""Longer than the bounds of every peer but the ultravisor's patience with kvm, 15 s, of which this is the first try."""
TARGETS = ("alpha/kvm", "alpha/ultravisor", "vm1/qemu", "vm1/guest")
N_REQUESTS = 400
IO = f"io write 4096 1 {N_REQUESTS}\r"
"""Takes a second or more."""
VM = 'time = "wall"\ndebuggable = true'


async def states(running: RunningCluster) -> dict[str, tuple[str, str]]:
    """State and detail of each process."""
    return {row.target: (row.state, row.detail) for row in processes_of(await running.status())}


async def wait_for(running: RunningCluster, target: str, state: str, detail: str) -> None:
    """Returns as soon as a process is in `state` with this detail."""
    await _wait(running, target, lambda found: found == (state, detail))


async def wait_held(running: RunningCluster, target: str) -> None:
    """Returns as soon as a debugger holds a process."""
    await _wait(running, target, lambda found: found[0] == "debugged" and found[1].startswith("held at "))


async def _wait(running: RunningCluster, target: str, holds: Callable[[tuple[str, str]], bool]) -> None:
    found = None
    with trio.move_on_after(5):
        while True:
            found = (await states(running))[target]
            if holds(found):
                return
            await trio.sleep(0.05)
    raise AssertionError(f"{target} is {found}")


@pytest.mark.slow
async def test_l1_each_role_is_held_while_the_others_live_on_and_the_guests_disk_is_right(tmp_path: Path) -> None:
    """A cluster each, side by side: they mostly wait."""
    async with trio.open_nursery() as nursery:
        for number, target in enumerate(TARGETS):
            directory = tmp_path / str(number)
            directory.mkdir()
            nursery.start_soon(hold_for_long, target, directory)


async def hold_for_long(target: str, directory: Path) -> None:
    """Hold `target` in the middle of the guest's disk requests; all of them are served in the end."""
    files = make_vm_files(directory, vm=VM)
    async with cluster(files.cluster_file, state_dir=files.state_dir, debug=True) as running:
        vm = running.vm("vm1")
        await vm.secure()
        await console_until(vm, "pefbox: ready")
        since = await console_end(vm)
        async with at_prompt(running, target) as operator:
            await operator.held()
            await operator.type("continue")
            await wait_for(running, target, "running", "a debugger is attached")
            await vm.console_write(IO.encode())
            await console_until(vm, "io ", since=since)
            await operator.interrupt()
            await operator.held()
            await stays_held(running, target)
            await operator.leave()
        await wait_for(running, target, "running", "")
        shown = await console_until(vm, "\r\n> ", since=since)
        assert answer_of(shown).startswith(f"ok requests {N_REQUESTS} "), shown
        since = await console_end(vm)
        await vm.console_write(b"hash\r")
        shown = await console_until(vm, "\r\n> ", since=since)
        assert answer_of(shown).split()[1] == files.sha256()
        row = await vm.row()
        assert (row.state, row.secure) == ("running", True)
        check_logs(running, target)
        check_audit(files, target)


async def stays_held(running: RunningCluster, target: str) -> None:
    """For longer than any bound; whoever waits says for whom, and nobody is worse off."""
    held_until = time.monotonic() + HOLD_SECONDS
    await wait_held(running, target)
    waited = False
    while time.monotonic() < held_until:
        now = await states(running)
        assert now.pop(target)[0] == "debugged"
        for other, (state, detail) in now.items():
            assert state in ("running", "waiting"), (other, state, detail)
            assert state == "running" or detail == f"waiting for {target}"
            waited |= state == "waiting"
        await trio.sleep(0.1)
    if target == "vm1/guest":
        # What the ultravisor asks of it is bounded as ever: nobody else's page-out waits for a debugger.
        # Those that are shared are out already.
        arguments = {"vm": "vm1", "gpa": 0, "n": 8}
        codes = (await running.process("alpha/kvm").query("page.out", arguments, 5.0))["codes"]
        assert {"H_BUSY"} <= set(codes) <= {"H_BUSY", "H_SUCCESS"}
    # Of a guest nobody wants anything as long as it does nothing.
    assert waited or target == "vm1/guest"
    assert (await running.vm("vm1").row()).state == "running"


def check_logs(running: RunningCluster, target: str) -> None:
    """Nobody took the held process for lost, and nobody lost patience."""
    for other in TARGETS:
        log = running.process(other).log()
        for bad in ("peer lost", "not answered", "internal error", "svm-failed", "does not stop"):
            assert bad not in log, (other, bad)
    assert '"debugger"' in running.process(target).log()


def check_audit(files: VmFiles, target: str) -> None:
    """The audit log says who was looked into, if that was the ultravisor or a guest."""
    with audit_path(files.state_dir, "alpha").open("rb") as log:
        lines = [line for line in read_lines(log) if line.event.startswith("debugger-")]
    told = target in ("alpha/ultravisor", "vm1/guest")
    assert [line.event for line in lines] == (["debugger-attached", "debugger-detached"] if told else [])
    assert all(line.facts["process"] == target for line in lines)
