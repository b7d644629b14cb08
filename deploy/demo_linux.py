"""The demo's Linux: firmware starts it, it turns itself secure, and the rest is typed at its shell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from deploy.api import RunningCluster, Vm
from deploy.cluster_file import VmSpec
from deploy.demo_host import are_ciphertext, press, read_as_host, secure_state
from deploy.demo_report import SHARED_ON_PURPOSE, VmReport, Written
from deploy.linux_shell import LinuxShell
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.roles import Role
from services.runtime.first_error import first_error_nursery
from services.runtime.page_query import MAX_PAGES_A_QUERY

PRESSURE_SHARE = 0.3
_REGION_OFFSET_BYTES = 8 << 20
_REGION_BYTES = 256 << 10
_MARKER_OFFSET_BYTES = 4 << 20
_SECTOR_BYTES = 512
_ANSWER_SECONDS = 5.0
_DIGITS = re.compile(r"[0-9a-f]{64}")

_RANDOM = "head -c 32 /dev/urandom | sha256sum | cut -c1-64"
_SECRETS = {
    "page-cache": (f"{_RANDOM} > /tmp/secret", "cat /tmp/secret"),
    "kernel": (f"hostname $({_RANDOM})", "hostname"),
    "process": (
        f"KEPT=$({_RANDOM}) /bin/busybox sleep 100000 & echo $! > /tmp/pid",
        "tr '\\0' '\\n' < /proc/$(cat /tmp/pid)/environ | sed -n 's/^KEPT=//p'",
    ),
}
"""How each is planted and told: in the page cache, in the kernel's own memory, in a process's."""


class LinuxGuest:
    """Implements DemoGuest."""

    cluster_file = Path(__file__).parent / "clusters" / "linux-two-hosts.toml"
    secure_seconds = 180.0

    def __init__(self) -> None:
        self._shells: dict[str, LinuxShell] = {}

    async def work(self, vm: Vm, report: VmReport) -> Written | None:
        """As DemoGuest."""
        shell = self._shells[vm.name] = LinuxShell(vm)
        await shell.until_prompt()
        await shell.silence_kernel()
        if await shell.run("cat /sys/devices/system/cpu/svm") != "1":
            raise UserError(f"{vm.name}: Linux does not believe itself secure")
        report.disk_bytes = int(await shell.run("cat /sys/block/vda/size")) * _SECTOR_BYTES
        report.disk_sha256_guest = _digest(await shell.run("sha256sum /dev/vda"))
        await shell.run(f"head -c {_REGION_BYTES} /dev/urandom > /tmp/region")
        digest = _digest(await shell.run("sha256sum /tmp/region"))
        await shell.run(_write("/tmp/region", _REGION_OFFSET_BYTES))
        for plant, _ in _SECRETS.values():
            await shell.run(plant)
        # Last, so that what it leaves in the swiotlb pool is still there when the host looks.
        await shell.run(f"{_RANDOM} > /tmp/marker")
        await shell.run(_write("/tmp/marker", _MARKER_OFFSET_BYTES))
        report.bytes_through_swiotlb = await self._bytes_through_swiotlb(vm, shell)
        return Written(_REGION_OFFSET_BYTES, _REGION_BYTES, digest)

    async def _bytes_through_swiotlb(self, vm: Vm, shell: LinuxShell) -> int:
        """All that the disk moved, so long as no page is out: a device's touch of a private page pages it out."""
        if (await vm.row()).pages["paged_out"] != 0:
            return 0
        statistics = (await shell.run("cat /sys/block/vda/stat")).split()
        sectors_read, sectors_written = int(statistics[2]), int(statistics[6])
        return (sectors_read + sectors_written) * _SECTOR_BYTES

    async def endure(self, running: RunningCluster, spec: VmSpec, report: VmReport) -> None:
        """As DemoGuest."""
        shell = self._shells[spec.name]
        gfns = await _two_untouched_pages(running, spec)
        # Never written since the switch, which had them start as zeros.
        images = await read_as_host(running, spec, gfns, report)
        if not are_ciphertext(images, report, show_content=False):
            return
        await self._under_pressure(running, spec, shell, report)

    async def _under_pressure(self, running: RunningCluster, spec: VmSpec, shell: LinuxShell, report: VmReport) -> None:
        """The guest checks what it holds while the host pages out a part of its memory."""
        await shell.run("dd if=/dev/vda of=/tmp/ballast bs=1M")
        before = await shell.run("sha256sum /tmp/ballast /bin/busybox")
        digests: list[str] = []

        async def checksum() -> None:
            digests.append(await shell.run("sha256sum /tmp/ballast /bin/busybox"))

        async with first_error_nursery() as nursery:
            nursery.start_soon(checksum)
            report.pages_under_pressure = await press(running, spec, PRESSURE_SHARE)
        digests.append(await shell.run("sha256sum /tmp/ballast /bin/busybox"))
        if digests != [before, before]:
            report.problems.append("paging changed what the guest reads")

    async def read_disk(self, vm: Vm) -> str:
        """As DemoGuest; from the disk, not from the page cache."""
        shell = self._shells[vm.name]
        await shell.run("echo 3 > /proc/sys/vm/drop_caches")
        return _digest(await shell.run("sha256sum /dev/vda"))

    async def reveal(self, vm: Vm) -> dict[str, str]:
        """As DemoGuest."""
        shell = self._shells[vm.name]
        told = {name: _digest(await shell.run(tell)) for name, (_, tell) in _SECRETS.items()}
        return {**told, SHARED_ON_PURPOSE: _digest(await shell.run("cat /tmp/marker"))}


def _write(path: str, offset_bytes: int) -> str:
    return f"dd if={path} of=/dev/vda bs={_SECTOR_BYTES} seek={offset_bytes // _SECTOR_BYTES} conv=notrunc,fsync 2>&1"


def _digest(text: str) -> str:
    found = _DIGITS.search(text)
    return "" if found is None else found[0]


async def _two_untouched_pages(running: RunningCluster, spec: VmSpec) -> list[int]:
    """Secure pages that nobody wrote since the switch."""
    untouched = set(range(spec.memory_bytes >> PAGE_SHIFT)) - set(await _written_pages(running, spec))
    found: list[int] = []
    for gfn in sorted(untouched):
        if await secure_state(running, spec, gfn) == "SECURE":
            found.append(gfn)
        if len(found) == 2:
            return found
    raise UserError(f"{spec.name} has no two secure pages that were never written")


async def _written_pages(running: RunningCluster, spec: VmSpec) -> Iterable[int]:
    ultravisor = running.process(f"{spec.host}/{Role.ULTRAVISOR.value}")
    written: list[int] = []
    for gpa in range(0, spec.memory_bytes, MAX_PAGES_A_QUERY * PAGE_BYTES):
        arguments = {"vm": spec.name, "gpa": gpa, "n": MAX_PAGES_A_QUERY}
        written += (await ultravisor.query("page.dirty", arguments, _ANSWER_SECONDS))["gfns"]
    return written
