"""What a demo reports, and which checks a VM must pass; the same for every kind of guest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from deploy.api import RunningCluster, Vm
from deploy.cluster_file import VmSpec

Say = Callable[[str], None]

SHARED_ON_PURPOSE = "marker"
"""The name of what a guest puts into shared memory, so that a search which finds nothing is seen to be no blind one."""


class MigrationReport(msgspec.Struct, kw_only=True):
    """A live migration. The disk was read while the VM moved, and is what the host has in the end."""

    source: str
    destination: str
    seconds: float
    downtime_ms: int
    disk_sha256_guest: str = ""
    disk_sha256_host: str = ""


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
    pages_under_pressure: int = 0
    """Secure pages that the host had paged out at random while the guest worked."""
    secrets_found: list[str] = []
    shared_marker_found: bool = False
    written_region_on_disk: bool = False
    migration: MigrationReport | None = None
    """Of the VM that was moved to another host at the end; None for one that was not."""
    seconds_to_secure: float = 0.0
    """From when its cluster was about to start."""
    problems: list[str] = []


class DemoReport(msgspec.Struct, kw_only=True):
    """The outcome of a demo."""

    ok: bool
    vms: dict[str, VmReport]
    searched_bytes: int
    not_searched: list[str]


class Written(msgspec.Struct, frozen=True):
    """A region that the guest wrote: where on its first disk, how much, and the SHA-256 of its content in hex."""

    offset_bytes: int
    n_bytes: int
    sha256: str


class DemoGuest(Protocol):
    """A kind of guest: how it is asked to do its work, and what its host can try meanwhile."""

    cluster_file: Path
    secure_seconds: float
    """How long it may take from its start until it is secure."""

    async def work(self, vm: Vm, report: VmReport) -> Written | None:
        """Read the whole first disk, write a region of it, plant secrets; fills in the report."""

    async def read_disk(self, vm: Vm) -> str:
        """SHA-256 of the whole first disk as it is now, in hex, as the guest reads it."""

    async def endure(self, running: RunningCluster, spec: VmSpec, report: VmReport) -> None:
        """Its host reads secure pages and pages out; fills in the report. Raises PefboxError."""

    async def reveal(self, vm: Vm) -> dict[str, str]:
        """The secrets, and the marker that was shared on purpose, in hex by name."""


def conclude(report: VmReport) -> None:
    """Add what did not hold to the report's problems."""
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
    if report.migration is not None:
        read, found = report.migration.disk_sha256_guest, report.migration.disk_sha256_host
        checks["the disk that was read during the migration is another than the host's"] = read == found != ""
    report.problems += [problem for problem, held in checks.items() if not held]
