"""`pefbox demo`: the main job, with every claim checked.

Two hosts start, their VMs boot as normal ones, turn themselves secure, read their whole disk and write to it. At a
mark everything that the host's side could have seen is copied; only then each guest reveals its secrets, and the
copies are searched. At the end one VM moves to the other host while it reads its disk. The exit status is 0 only if
every check held.

What differs between kinds of guests is in `demo_model.py` and `demo_linux.py`.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import trio

from deploy import makers
from deploy.api import RunningCluster, Vm, cluster, processes_of
from deploy.cluster_file import Cluster, VmSpec, read_cluster_file, resolve_state
from deploy.demo_evidence import Evidence, take_evidence
from deploy.demo_report import (
    SHARED_ON_PURPOSE,
    DemoGuest,
    DemoReport,
    MigrationReport,
    Say,
    VmReport,
    Written,
    conclude,
)
from deploy.run_dirs import default_paths
from deploy.trace.counts import count_calls
from protocol.errors import PefboxError
from protocol.roles import Role
from services.runtime.first_error import first_error_nursery

CLUSTER_NAME = "demo"


async def run_demo(guest: DemoGuest, state_dir: Path | None, say: Say) -> DemoReport:
    """Run it; raises UserError when the cluster does not come up."""
    paths = default_paths(CLUSTER_NAME, state_dir)
    paths.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    spec = resolve_state(read_cluster_file(guest.cluster_file), paths.state_dir)
    say("making disks, secure images and ESM blobs (kept for the next run)")
    await trio.to_thread.run_sync(makers.make, spec, paths.state_dir)
    reports = {vm.name: VmReport() for vm in spec.vms}
    for vm in spec.vms:
        reports[vm.name].disk_sha256_host = await trio.to_thread.run_sync(_sha256_of, Path(vm.disks[0].path))
    say(f"starting {len(spec.hosts)} hosts with {len(spec.vms)} VMs")
    run = _Demo(spec, guest, reports, say)
    async with cluster(guest.cluster_file, name=CLUSTER_NAME, state_dir=paths.state_dir, record=True) as running:
        written = await run.work(running)
        evidence = await run.look_from_outside(running)
        await run.migrate(running)
    for vm in spec.vms:
        _check_written(vm, reports[vm.name], written.get(vm.name))
        conclude(reports[vm.name])
    ok = all(not report.problems for report in reports.values())
    return DemoReport(ok=ok, vms=reports, searched_bytes=evidence.n_bytes, not_searched=evidence.left_out)


class _Demo:
    """What a demo does with its cluster, which is about to start."""

    def __init__(self, spec: Cluster, guest: DemoGuest, reports: dict[str, VmReport], say: Say) -> None:
        self._spec = spec
        self._guest = guest
        self._reports = reports
        self._say = say
        self._started = time.monotonic()

    async def work(self, running: RunningCluster) -> dict[str, Written | None]:
        """Until every VM is secure and has done its work; the region that each wrote."""
        written: dict[str, Written | None] = {}
        async with first_error_nursery() as nursery:
            for vm in self._spec.vms:
                nursery.start_soon(self._work_of, running.vm(vm.name), written)
        return written

    async def _work_of(self, vm: Vm, written: dict[str, Written | None]) -> None:
        report = self._reports[vm.name]
        await vm.secure(self._guest.secure_seconds)
        report.secure = True
        report.seconds_to_secure = round(time.monotonic() - self._started, 2)
        self._say(f"{vm.name} is secure after {report.seconds_to_secure} s; it reads its whole disk through swiotlb")
        written[vm.name] = await self._guest.work(vm, report)
        self._say(f"{vm.name} has read {report.disk_bytes >> 20} MiB, written a region and planted its secrets")

    async def look_from_outside(self, running: RunningCluster) -> Evidence:
        """Try what a host can try, copy all that it can see, then search the copies for what the guests reveal."""
        for vm in self._spec.vms:
            self._say(f"reading secure pages of {vm.name} as its host")
            try:
                await self._guest.endure(running, vm, self._reports[vm.name])
            except PefboxError as error:
                self._reports[vm.name].problems.append(str(error))
        evidence = await _copy(running)
        self._say(f"copied {evidence.n_bytes >> 20} MiB of what the hosts can see; now the guests reveal their secrets")
        for vm in self._spec.vms:
            report = self._reports[vm.name]
            revealed = await self._guest.reveal(running.vm(vm.name))
            await trio.to_thread.run_sync(_search, evidence, revealed, report)
            record = running.paths.trace_file(f"{vm.name}/{Role.GUEST.value}")
            report.hypercalls, report.ultracalls = count_calls(record)
        return evidence

    async def migrate(self, running: RunningCluster) -> None:
        """Move the first VM to another host while it reads its disk."""
        spec, report = self._spec.vms[0], self._reports[self._spec.vms[0].name]
        others = self._spec.homes_of(spec)[1:]
        if not others:
            return
        vm = running.vm(spec.name)
        self._say(f"{spec.name} moves from {spec.host} to {others[0]} while it runs and reads its disk")
        try:
            await self._move(vm, report, spec.host, others[0])
        except PefboxError as error:
            report.problems.append(f"it did not move: {error}")
            return
        moved = report.migration
        assert moved is not None
        moved.disk_sha256_host = await trio.to_thread.run_sync(_sha256_of, Path(spec.disks[0].path))
        self._say(f"{spec.name} runs on {others[0]} after {moved.seconds} s; it stood still for {moved.downtime_ms} ms")

    async def _move(self, vm: Vm, report: VmReport, source: str, destination: str) -> None:
        digests: list[str] = []

        async def read() -> None:
            digests.append(await self._guest.read_disk(vm))

        async with first_error_nursery() as nursery:
            nursery.start_soon(read)
            facts = await vm.migrate(destination)
        report.migration = MigrationReport(
            source=source,
            destination=destination,
            seconds=round(facts["seconds"], 2),
            downtime_ms=facts["progress"]["downtime_ms"],
            disk_sha256_guest=digests[0],
        )


async def _copy(running: RunningCluster) -> Evidence:
    rows = processes_of(await running.status())
    host_side = {row.target: row.pid for row in rows if row.role in (Role.KVM.value, Role.QEMU.value)}
    for row in rows:
        # What it has seen so far is all in its files then; the calls that a guest makes are counted further on.
        on = row.target not in host_side
        await running.process(row.target).query("record", {"on": on})
    return await trio.to_thread.run_sync(take_evidence, running.paths, host_side)


def _search(evidence: Evidence, revealed: dict[str, str], report: VmReport) -> None:
    if not set(revealed) - {SHARED_ON_PURPOSE}:
        report.problems.append("the guest revealed no secrets")
    found = evidence.where({name: bytes.fromhex(value) for name, value in revealed.items()})
    for name, places in found.items():
        if name == SHARED_ON_PURPOSE:
            report.shared_marker_found = any(place.startswith("normal RAM") for place in places)
        else:
            report.secrets_found += [f"{name} in {place}" for place in places]


def _check_written(vm: VmSpec, report: VmReport, written: Written | None) -> None:
    if written is None:
        report.problems.append("the guest wrote no region")
        return
    with open(vm.disks[0].path, "rb") as disk:
        disk.seek(written.offset_bytes)
        content = disk.read(written.n_bytes)
    report.written_region_on_disk = hashlib.sha256(content).hexdigest() == written.sha256


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
