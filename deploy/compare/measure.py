"""Running one trial: the VM boots, reads its whole disk, does its work, and what it came to is read off."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.compare.plan import (
    REQUESTS,
    ROUND_NS,
    TIMED_ROUNDS,
    Purpose,
    Requests,
    Trial,
    Workload,
)
from deploy.compare.vm_files import BYPASS_VM, DISK, HOST, VM, TrialFiles, write_trial
from protocol.errors import PefboxError
from services.guest.model.run_tally import MAX_REQUESTS

BOOT_SECONDS = 30.0
COMMAND_SECONDS = 60.0
READY = "pefbox: ready"
_SECURE = "secure=1"
NO_KERNEL = "pefbox: no kernel to boot"
_WAIT_SECONDS = 0.3
_IO = re.compile(r"ok requests (\d+) bytes (\d+) ns (\d+) p50_ns (\d+) p99_ns (\d+) bounced (\d+) calls(.*)")
_COUNT = re.compile(r"(\w+)=(\d+)")
_FAULT = "device fault"


class Round(msgspec.Struct, frozen=True):
    """One run of requests, as the guest tells it."""

    requests: int
    bytes: int
    ns: int
    p50_ns: int
    p99_ns: int
    bounced_bytes: int
    calls: dict[str, int]
    device_lookups: int
    """Translations that the device asked of the IOMMU for it."""


class Outcome(msgspec.Struct, kw_only=True):
    """What a trial came to. `works`: the guest read its whole disk as it is, and its work ended without an error."""

    title: str
    works: bool = False
    failure: str = ""
    """Why not, as guest, device or hypervisor said it."""
    device_faults: list[str] = []
    secure: bool = False
    rounds: dict[str, list[Round]] = {}
    """By workload."""
    bypass_rounds: dict[str, list[Round]] = {}
    """Of a VM past the IOMMU, each run right after the round of the same number; none for `net`, whose peer it is."""
    boot_calls: dict[str, int] = {}
    """Calls of the kernel until it was up, by name; those of the boot stage are not among them."""
    boot_ns: int = 0
    """From the start of the machine until the prompt, by the host's clock."""
    shared_pages: int = 0
    """Pages of 64 KiB that the ultravisor counts as shared with the host."""
    reach_pages: int = 0
    """Pages of the VM that its disk could read or write, were it hostile and the IOMMU honest."""
    plain_pages: int = 0
    """Those of them that hold what the guest put there; others hold ciphertext, or nothing."""


async def run_trial(trial: Trial, options: dict[str, int | bool]) -> Outcome:
    """Run `trial` with further `options` of the model kernel; raises UserError when the cluster does not start."""
    outcome = Outcome(title=trial.title)
    with tempfile.TemporaryDirectory(prefix="pefbox-compare-") as directory:
        files = await trio.to_thread.run_sync(write_trial, trial, Path(directory), options)
        async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
            try:
                await _work(running, trial, files, outcome)
            except _Failed as failed:
                outcome.failure = str(failed)
            # A VM that has ended is secure no more; what its kernel said of itself stays.
            outcome.secure = _SECURE.encode() in (await running.vm(VM).console_read())[0]
            outcome.device_faults = _faults(running.vm(VM).qemu.log())
    return outcome


class _Failed(PefboxError):
    """The VM does not do what it should."""


async def _work(running: RunningCluster, trial: Trial, files: TrialFiles, outcome: Outcome) -> None:
    vm = running.vm(VM)
    began = trio.current_time()
    text = await _console_until(vm, lambda text: READY in text or NO_KERNEL in text)
    outcome.boot_ns = int((trio.current_time() - began) * 1e9)
    if NO_KERNEL in text:
        raise _Failed(_disk_error(text) or "the boot stage found no kernel")
    outcome.boot_calls = _counts(await _ask(vm, "calls"))
    await _measure_exposure(running, trial, outcome)
    digest = (await _ask(vm, "hash")).split()
    if digest[:2] != ["ok", files.disk_sha256]:
        raise _Failed(_disk_error(text) or "the guest reads its disk differently: " + " ".join(digest)[:80])
    for workload in trial.workloads:
        if workload in REQUESTS:
            await _run_requests(running, trial, workload, outcome)
    if trial.secure and _SECURE not in text:
        raise _Failed("the VM did not turn itself secure")
    outcome.works = True


async def _measure_exposure(running: RunningCluster, trial: Trial, outcome: Outcome) -> None:
    states = (await running.vm(VM).qemu.query("dma.reach"))[f"{VM}/{DISK}"]
    outcome.reach_pages = sum(states.values())
    outcome.plain_pages = states["SHARED" if trial.secure else "PRESENT"]
    if trial.secure:
        ultravisor = await running.process(f"{HOST}/ultravisor").query("vm.status", {"vm": VM})
        outcome.shared_pages = ultravisor["pages"]["shared"]


async def wait_ready(vm: Vm) -> None:
    """Return when the VM's model kernel obeys commands; raises PefboxError when it does not come so far."""
    await _console_until(vm, lambda text: READY in text)


async def _run_requests(running: RunningCluster, trial: Trial, workload: Workload, outcome: Outcome) -> None:
    vm = running.vm(VM)
    if trial.purpose is not Purpose.TIME:
        if workload is Workload.NET:
            return
        outcome.rounds[workload] = [await time_requests(vm, REQUESTS[workload].command)]
        return
    bypass = running.vm(BYPASS_VM)
    await wait_ready(bypass)
    if workload is Workload.NET:
        command = await _long_enough(vm, REQUESTS[workload])
        outcome.rounds[workload] = [await time_requests(vm, command) for _ in range(TIMED_ROUNDS)]
        return
    commands = [await _long_enough(one, REQUESTS[workload]) for one in (vm, bypass)]
    rounds = []
    for _ in range(TIMED_ROUNDS):
        rounds.append([await time_requests(one, command) for one, command in zip((vm, bypass), commands, strict=True)])
    # All of them, or none: a VM that fails on the way was not timed.
    outcome.rounds[workload], outcome.bypass_rounds[workload] = [list(each) for each in zip(*rounds, strict=True)]


async def _long_enough(vm: Vm, requests: Requests) -> str:
    """The command for a round of at least ROUND_NS, by a first run that is not counted."""
    first = await time_requests(vm, requests.command)
    count = min(MAX_REQUESTS, max(requests.count, requests.count * ROUND_NS // max(first.ns, 1)))
    return requests.with_count(count)


async def time_requests(vm: Vm, command: str) -> Round:
    """An `io` command at the prompt of a model kernel; raises PefboxError when it does not end well."""
    before = await _lookups(vm)
    answer = await _ask(vm, command)
    found = _IO.search(answer)
    if found is None:
        raise _Failed(answer.removeprefix("error ")[:200])
    n_requests, n_bytes, ns, p50_ns, p99_ns, bounced = (int(number) for number in found.groups()[:6])
    lookups = await _lookups(vm) - before
    return Round(n_requests, n_bytes, ns, p50_ns, p99_ns, bounced, _counts(found[7]), lookups)


async def _lookups(vm: Vm) -> int:
    return int((await vm.qemu.query("vm.status"))["iommu_lookups"])


async def _ask(vm: Vm, line: str) -> str:
    """The answer line of a prompt command."""
    _, since = await vm.console_read()
    while (data := await vm.console_read(since))[0]:
        since = data[1]
    await vm.console_write(line.encode() + b"\r")
    text = await _console_until(vm, lambda text: _answer(text) is not None, since)
    return _answer(text) or ""


def _answer(text: str) -> str | None:
    """The first whole line that is an answer."""
    whole = text.replace("\r\n", "\n").split("\n")[:-1]
    return next((line for line in whole if line.startswith(("ok", "error"))), None)


async def _console_until(vm: Vm, holds: Callable[[str], bool], since: int = 0) -> str:
    """The console from `since` on, as soon as it `holds`; raises _Failed when the VM ends first, or with time."""
    text = ""
    with trio.move_on_after(COMMAND_SECONDS if since else BOOT_SECONDS):
        while not holds(text):
            data, since = await vm.console_read(since, _WAIT_SECONDS)
            text += data.decode(errors="replace")
            if data:
                continue
            row = await vm.row()
            if row.state == "failed":
                raise _Failed(f"the VM ended: {row.reason}")
        return text
    raise _Failed(_disk_error(text) or "the guest did not answer")


def _disk_error(text: str) -> str:
    """What the guest said of its disk."""
    found = re.findall(r"pefbox: disk: ([^\r\n]+)", text)
    return found[-1] if found else ""


def _counts(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in _COUNT.findall(text)}


def _faults(log: str) -> list[str]:
    """Why devices gave up their drivers, as qemu's log says it."""
    entries = [json.loads(line) for line in log.splitlines() if _FAULT in line]
    return [str(entry["reason"]) for entry in entries if entry.get("event") == _FAULT]
