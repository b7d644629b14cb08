"""`pefbox demo`: the main job, with every claim checked.

Two hosts start, their VMs boot as normal ones, turn themselves secure, read their whole disk and write to it. At a
mark everything that the host's side could have seen is copied; only then each guest reveals its secrets, and the
copies are searched. The exit status is 0 only if every check held.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from deploy.api import RunningCluster, Vm, cluster, processes_of
from deploy.calls_view import count_calls
from deploy.cluster_file import Cluster, VmSpec, read_cluster_file, resolve_state
from deploy.demo_evidence import SEGMENT_DIR, Evidence, frame_is_hole, read_frame, take_evidence
from deploy.demo_files import make_demo_files
from deploy.manifest import read_manifest
from deploy.run_dirs import default_paths
from protocol.errors import PefboxError, UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from protocol.roles import Role
from shared.boot_partition import SECTOR_BYTES

CLUSTER_FILE = Path(__file__).parent / "clusters" / "two-hosts.toml"
CLUSTER_NAME = "demo"
_PLANTED = "pefbox: secrets planted"
_SECURE_SECONDS = 60.0
_WORK_SECONDS = 180.0
_HASHED = re.compile(r"disk sha256 ([0-9a-f]{64}) bytes (\d+) swiotlb (\d+)")
_WROTE = re.compile(r"wrote (\d+) (\d+) sha256 ([0-9a-f]{64})")
_SECRET = re.compile(r"secret (\S+) ([0-9a-f]{64})")
_SHARED_ON_PURPOSE = "marker"

Say = Callable[[str], None]


class VmReport(msgspec.Struct, kw_only=True):
    """What was seen of one VM. `problems` are the checks that did not hold."""

    secure: bool = False
    disk_sha256_guest: str = ""
    disk_sha256_host: str = ""
    disk_bytes: int = 0
    bytes_through_swiotlb: int = 0
    hypercalls: dict[str, int] = {}
    ultracalls: dict[str, int] = {}
    host_read_of_secure_page: str = ""
    secrets_found: list[str] = []
    shared_marker_found: bool = False
    written_region_on_disk: bool = False
    seconds_to_secure: float = 0.0
    problems: list[str] = []


class DemoReport(msgspec.Struct, kw_only=True):
    """The outcome of a demo."""

    ok: bool
    vms: dict[str, VmReport]
    searched_bytes: int
    not_searched: list[str]


class _Written(msgspec.Struct, frozen=True):
    """A region that the guest wrote: sectors and the SHA-256 of its content."""

    first_sector: int
    n_sectors: int
    sha256: str


async def run_demo(state_dir: Path | None, say: Say) -> DemoReport:
    """Run it; raises UserError when the cluster does not come up."""
    paths = default_paths(CLUSTER_NAME, state_dir)
    paths.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    spec = resolve_state(read_cluster_file(CLUSTER_FILE), paths.state_dir)
    say("making disks, secure images and ESM blobs (kept for the next run)")
    await trio.to_thread.run_sync(make_demo_files, spec, paths.state_dir)
    reports = {vm.name: VmReport() for vm in spec.vms}
    for vm in spec.vms:
        reports[vm.name].disk_sha256_host = await trio.to_thread.run_sync(_sha256_of, Path(vm.disks[0].path))
    written: dict[str, _Written] = {}
    say(f"starting {len(spec.hosts)} hosts with {len(spec.vms)} VMs")
    started = time.monotonic()
    async with cluster(CLUSTER_FILE, name=CLUSTER_NAME, state_dir=paths.state_dir, record=True) as running:
        async with trio.open_nursery() as nursery:
            for vm in spec.vms:
                nursery.start_soon(_watch_vm, running.vm(vm.name), reports[vm.name], written, started, say)
        evidence = await _look_from_outside(running, spec, reports, say)
    for vm in spec.vms:
        _check_written(vm, reports[vm.name], written.get(vm.name))
        _conclude(reports[vm.name])
    ok = all(not report.problems for report in reports.values())
    return DemoReport(ok=ok, vms=reports, searched_bytes=evidence.n_bytes, not_searched=evidence.left_out)


# -- while the VM works ---------------------------------------------------------------------------------------------


async def _watch_vm(vm: Vm, report: VmReport, written: dict[str, _Written], started: float, say: Say) -> None:
    await vm.secure(_SECURE_SECONDS)
    report.secure = True
    report.seconds_to_secure = round(time.monotonic() - started, 2)
    say(f"{vm.name} is secure after {report.seconds_to_secure} s; it reads its whole disk through swiotlb")
    text = await _console_until(vm, _PLANTED)
    if hashed := _HASHED.search(text):
        report.disk_sha256_guest = hashed[1]
        report.disk_bytes, report.bytes_through_swiotlb = int(hashed[2]), int(hashed[3])
    if wrote := _WROTE.search(text):
        written[vm.name] = _Written(int(wrote[1]), int(wrote[2]), wrote[3])
    say(f"{vm.name} has read {report.disk_bytes >> 20} MiB, written a region and planted its secrets")


async def _console_until(vm: Vm, mark: str) -> str:
    text, since = "", 0
    with trio.move_on_after(_WORK_SECONDS):
        while mark not in text:
            data, since = await vm.console_read(since, 0.3)
            text += data.decode(errors="replace")
        return text
    raise UserError(f"{vm.name}: no {mark!r} on the console within {_WORK_SECONDS:g} s: {text[-300:]!r}")


# -- from the host's side -------------------------------------------------------------------------------------------


async def _look_from_outside(
    running: RunningCluster, spec: Cluster, reports: dict[str, VmReport], say: Say
) -> Evidence:
    for vm in spec.vms:
        say(f"reading secure pages of {vm.name} as its host")
        try:
            await _read_as_host(running, vm, reports[vm.name])
        except PefboxError as error:
            reports[vm.name].problems.append(str(error))
    rows = processes_of(await running.status())
    host_side = {row.target: row.pid for row in rows if row.role in (Role.KVM.value, Role.QEMU.value)}
    await _flush_records(running, host_side)
    evidence = await trio.to_thread.run_sync(take_evidence, running.paths, host_side)
    say(f"copied {evidence.n_bytes >> 20} MiB of what the hosts can see; now the guests reveal their secrets")
    for vm in spec.vms:
        report = reports[vm.name]
        revealed = dict(_SECRET.findall(await running.vm(vm.name).console_command("reveal")))
        await trio.to_thread.run_sync(_search, evidence, revealed, report)
        _count_calls(running, vm, report)
    return evidence


async def _read_as_host(running: RunningCluster, spec: VmSpec, report: VmReport) -> None:
    vm = running.vm(spec.name)
    segment = _segment_of(running, spec.name)
    first, second = await _two_equal_secure_pages(running, spec)
    if not all(frame_is_hole(segment, gpa_of(gfn), PAGE_BYTES) for gfn in (first, second)):
        report.problems.append("the raw frame of a secure page is no hole")
    content = await vm.console_command(f"sum {first:#x}")
    images = []
    for gfn in (first, second):
        answer = await vm.qemu.query("page.bytes", {"gpa": gpa_of(gfn)}, 5.0)
        images.append(answer["bytes"])
        if read_frame(segment, gpa_of(gfn), PAGE_BYTES) != answer["bytes"]:
            report.problems.append(f"gfn {gfn:#x}: qemu did not read what is in the frame")
    if hashlib.sha256(images[0]).hexdigest() in content or images[0] == images[1] or not any(images[0]):
        report.problems.append("a host's read of a secure page shows its content")
        report.host_read_of_secure_page = "plain"
        return
    report.host_read_of_secure_page = "ciphertext"
    if await vm.console_command(f"sum {first:#x}") != content:
        report.problems.append("the image of a page did not come back as it went")
    if (await vm.page(gpa_of(first)))["secure"]["state"] != "SECURE":
        report.problems.append("the image of a page was not taken back")


async def _two_equal_secure_pages(running: RunningCluster, spec: VmSpec) -> tuple[int, int]:
    vm = running.vm(spec.name)
    ultravisor = running.process(f"{spec.host}/{Role.ULTRAVISOR.value}")
    by_content: dict[str, int] = {}
    for gfn in range((spec.memory_bytes >> PAGE_SHIFT) - 1, 0, -1):
        page = await ultravisor.query("page.secure", {"vm": spec.name, "gpa": gpa_of(gfn)})
        if page["state"] != "SECURE":
            continue
        content = await vm.console_command(f"sum {gfn:#x}")
        if content in by_content:
            return by_content[content], gfn
        by_content[content] = gfn
    raise UserError(f"{spec.name} has no two secure pages of equal content")


def _segment_of(running: RunningCluster, vm: str) -> Path:
    manifest = read_manifest(running.paths.manifest)
    names = [] if manifest is None else manifest.segments
    prefix = f"pefbox-{running.name}-{vm}-"
    for name in names:
        if name.startswith(prefix):
            return SEGMENT_DIR / name
    raise UserError(f"{vm}: no RAM segment in the manifest")


async def _flush_records(running: RunningCluster, targets: dict[str, int]) -> None:
    """Stop recording on the host's side, so that what it has seen so far is all in its files."""
    for target in targets:
        await running.process(target).query("record", {"on": False})


def _search(evidence: Evidence, revealed: dict[str, str], report: VmReport) -> None:
    if not revealed:
        report.problems.append("the guest revealed no secrets")
    for name, value in revealed.items():
        places = evidence.where(bytes.fromhex(value))
        if name == _SHARED_ON_PURPOSE:
            report.shared_marker_found = any(place.startswith("normal RAM") for place in places)
        else:
            report.secrets_found += [f"{name} in {place}" for place in places]


def _count_calls(running: RunningCluster, vm: VmSpec, report: VmReport) -> None:
    report.hypercalls, report.ultracalls = count_calls(running.paths.record_file(f"{vm.name}/{Role.GUEST.value}"))


# -- after the cluster is down --------------------------------------------------------------------------------------


def _check_written(vm: VmSpec, report: VmReport, written: _Written | None) -> None:
    if written is None:
        report.problems.append("the guest wrote no region")
        return
    with open(vm.disks[0].path, "rb") as disk:
        disk.seek(written.first_sector * SECTOR_BYTES)
        content = disk.read(written.n_sectors * SECTOR_BYTES)
    report.written_region_on_disk = hashlib.sha256(content).hexdigest() == written.sha256


def _conclude(report: VmReport) -> None:
    checks = {
        "it did not become secure": report.secure,
        "guest and host see different disks": report.disk_sha256_guest == report.disk_sha256_host != "",
        "not all of the disk went through swiotlb": report.bytes_through_swiotlb >= report.disk_bytes > 0,
        "secrets were found outside the guest": not report.secrets_found,
        "the marker shared on purpose was not found: the search is blind": report.shared_marker_found,
        "the written region is not in the disk file": report.written_region_on_disk,
        "no hypercalls were recorded": bool(report.hypercalls) and bool(report.ultracalls),
        "no secure page was read as the host": report.host_read_of_secure_page == "ciphertext",
    }
    report.problems += [problem for problem, held in checks.items() if not held]


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
