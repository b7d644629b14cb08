"""The demo's model kernel: it works by itself, tells what it did on its console, and answers a few commands there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import trio

from deploy.api import RunningCluster, Vm
from deploy.cluster_file import VmSpec
from deploy.demo_host import are_ciphertext, read_as_host, secure_state
from deploy.demo_report import VmReport, Written
from protocol.errors import UserError
from protocol.geometry import PAGE_SHIFT
from shared.boot_partition import SECTOR_BYTES

_PLANTED = "pefbox: secrets planted"
_WORK_SECONDS = 180.0
_HASHED = re.compile(r"disk sha256 ([0-9a-f]{64}) bytes (\d+) swiotlb (\d+)")
_WROTE = re.compile(r"wrote (\d+) (\d+) sha256 ([0-9a-f]{64})")
_SECRET = re.compile(r"secret (\S+) ([0-9a-f]{64})")


class ModelGuest:
    """Implements DemoGuest."""

    cluster_file = Path(__file__).parent / "clusters" / "two-hosts.toml"
    secure_seconds = 60.0

    async def work(self, vm: Vm, report: VmReport) -> Written | None:
        """As DemoGuest."""
        text = await _console_until(vm, _PLANTED)
        if hashed := _HASHED.search(text):
            report.disk_sha256_guest = hashed[1]
            report.disk_bytes, report.bytes_through_swiotlb = int(hashed[2]), int(hashed[3])
        wrote = _WROTE.search(text)
        if wrote is None:
            return None
        return Written(int(wrote[1]) * SECTOR_BYTES, int(wrote[2]) * SECTOR_BYTES, wrote[3])

    async def endure(self, running: RunningCluster, spec: VmSpec, report: VmReport) -> None:
        """As DemoGuest."""
        vm = running.vm(spec.name)
        gfns = await _two_equal_secure_pages(running, spec)
        content = await vm.console_command(f"sum {gfns[0]:#x}")
        images = await read_as_host(running, spec, gfns, report)
        if not are_ciphertext(images, report, show_content=hashlib.sha256(images[0]).hexdigest() in content):
            return
        if await vm.console_command(f"sum {gfns[0]:#x}") != content:
            report.problems.append("the image of a page did not come back as it went")
        if await secure_state(running, spec, gfns[0]) != "SECURE":
            report.problems.append("the image of a page was not taken back")

    async def read_disk(self, vm: Vm) -> str:
        """As DemoGuest."""
        answer = await vm.console_command("hash", seconds=_WORK_SECONDS)
        found = re.search(r"ok ([0-9a-f]{64}) \d+", answer)
        if found is None:
            raise UserError(f"{vm.name}: no hash of the disk: {answer[-300:]!r}")
        return found[1]

    async def reveal(self, vm: Vm) -> dict[str, str]:
        """As DemoGuest."""
        return dict(_SECRET.findall(await vm.console_command("reveal")))


async def _console_until(vm: Vm, mark: str) -> str:
    text, since = "", 0
    with trio.move_on_after(_WORK_SECONDS):
        while mark not in text:
            data, since = await vm.console_read(since, 0.3)
            text += data.decode(errors="replace")
        return text
    raise UserError(f"{vm.name}: no {mark!r} on the console within {_WORK_SECONDS:g} s: {text[-300:]!r}")


async def _two_equal_secure_pages(running: RunningCluster, spec: VmSpec) -> list[int]:
    vm = running.vm(spec.name)
    by_content: dict[str, int] = {}
    for gfn in range((spec.memory_bytes >> PAGE_SHIFT) - 1, 0, -1):
        if await secure_state(running, spec, gfn) != "SECURE":
            continue
        content = await vm.console_command(f"sum {gfn:#x}")
        if content in by_content:
            return [by_content[content], gfn]
        by_content[content] = gfn
    raise UserError(f"{spec.name} has no two secure pages of equal content")
