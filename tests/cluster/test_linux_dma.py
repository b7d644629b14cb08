"""Linux's own ways to its disk, two VMs at a time: through the 64-bit window, through the 32-bit one, and past both.

What a secure Linux reads through the 64-bit window is tested with firmware (`test_linux_secure.py`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.linux_shell import LinuxShell
from deploy.run_program import RunOrder, check_program, cluster_text, program_blob
from deploy.trace.counts import count_calls
from deploy.trace.reader import FrameReader
from protocol.errors import UserError
from protocol.geometry import PAGE_SHIFT
from protocol.hcalls import H_PUT_TCE
from protocol.ucalls import UV_SHARE_PAGE
from protocol.wire import MessageKind, decode
from shared.tce import PERMISSION_MASK, gpa_of_tce
from tests.cluster.test_linux_secure import normal_ram
from tests.cluster.vm_files import console_until
from tests.needs import need_linux

pytestmark = [pytest.mark.linux, pytest.mark.slow]

MEMORY_BYTES = 128 << 20
DISK_BYTES = 4 << 20
BOOT_SECONDS = 120.0
HANG_SECONDS = 3.0
_POLL_SECONDS = 0.1
FOUND = "virtio_blk virtio0: [vda]"
AFTER_DISK = "Run /init as init process"
PRIVATE_TEXT = b"NET: Registered PF_INET protocol family"
"""A line of Linux's log. The kernel's file has no more of it than a form with blanks, and the terminal takes it out of
registers: whole it lies nowhere but in the memory that the kernel writes."""
CIPHERTEXT_RING = re.compile(r"queue 0: ")
MAPPING_CALLS = ("H_PUT_TCE", "H_PUT_TCE_INDIRECT")


@dataclass
class LinuxVm:
    """One Linux without firmware, in a cluster of its own, with everything recorded."""

    running: RunningCluster
    vm: Vm
    disk: Path
    digest: str
    """The disk's, before the VM started."""

    @property
    def record(self) -> Path:
        return self.running.paths.trace_file(f"{self.vm.name}/guest")

    def mapping_calls(self) -> int:
        """How often it asked for pages to be mapped for its devices."""
        hypercalls, _ = count_calls(self.record)
        return sum(hypercalls.get(name, 0) for name in MAPPING_CALLS)

    async def until_fault(self) -> str:
        """Why its disk gave up."""
        with trio.fail_after(BOOT_SECONDS):
            while True:
                faults: dict[str, str] = (await self.vm.qemu.query("vm.status"))["faults"]
                if faults:
                    return faults["program/data"]
                await trio.sleep(_POLL_SECONDS)


@asynccontextmanager
async def linux(
    directory: Path, command_line: str, *, secure: bool = False, platform: bool = True
) -> AsyncIterator[LinuxVm]:
    """It has just been started."""
    file, disk, digest = make_files(directory, command_line, secure=secure, platform=platform)
    async with cluster(file, state_dir=directory, record=True) as running:
        yield LinuxVm(running, running.vm("program"), disk, digest)


def make_files(directory: Path, command_line: str, *, secure: bool, platform: bool) -> tuple[Path, Path, str]:
    """Cluster file, disk, and the disk's digest; in `directory`, which is new."""
    image = need_linux()
    order = RunOrder(
        program=Path(image.kernel),
        initrd=Path(image.initramfs),
        command_line=f"console=hvc0 {command_line}",
        memory_bytes=MEMORY_BYTES,
        secure=secure,
        time="wall",
    )
    directory.mkdir()
    blob = program_blob(check_program(order.program, MEMORY_BYTES), order, directory) if secure else None
    disk, content = directory / "disk.img", random.Random(directory.name).randbytes(DISK_BYTES)
    disk.write_bytes(content)
    device = f'[vms.program.disks.data]\npath = "{disk}"\n[[vms.program.devices]]\nkind = "virtio-blk"\ndisk = "data"\n'
    file = directory / "dma.toml"
    file.write_text(cluster_text(order, blob) + device + f"access_platform = {str(platform).lower()}\n")
    return file, disk, hashlib.sha256(content).hexdigest()


async def test_a_normal_linux_maps_ram_once_or_with_disable_ddw_what_each_request_needs(tmp_path: Path) -> None:
    """`ddw-identity` and `iommu-always` of docs/dma-designs.md, in the kernel that was released."""
    async with AsyncExitStack() as stack:
        wide = await stack.enter_async_context(linux(tmp_path / "wide", "quiet"))
        narrow = await stack.enter_async_context(linux(tmp_path / "narrow", "quiet disable_ddw"))
        for one, has_window in ((wide, True), (narrow, False)):
            shell = LinuxShell(one.vm)
            await shell.until_prompt()
            await shell.silence_kernel()
            nodes = await shell.run("ls /proc/device-tree/pci*")
            assert ("linux,direct64-ddr-window-info" in nodes) is has_window
            assert (await shell.run("sha256sum /dev/vda")).split()[0] == one.digest
            assert (await one.vm.qemu.query("vm.status"))["faults"] == {}
        # The search that finds nothing of a secure VM below is not blind.
        assert PRIVATE_TEXT in normal_ram(narrow.running, "program")

    assert 0 < wide.mapping_calls() <= 4
    assert narrow.mapping_calls() > 50
    assert count_calls(narrow.record)[0]["H_STUFF_TCE"] > count_calls(wide.record)[0]["H_STUFF_TCE"] + 50


async def test_a_secure_linux_without_the_direct_path_waits_for_a_disk_that_reads_ciphertext(tmp_path: Path) -> None:
    """With `disable_ddw` it maps private pages, ring and all; without ACCESS_PLATFORM it gives their addresses."""
    line = "svm=on swiotlb=8192,force"
    async with AsyncExitStack() as stack:
        narrow = await stack.enter_async_context(linux(tmp_path / "narrow", f"{line} disable_ddw", secure=True))
        past = await stack.enter_async_context(linux(tmp_path / "past", line, secure=True, platform=False))
        for one in (narrow, past):
            await check_the_disk_is_lost(one)
        lookups = [(await one.vm.qemu.query("vm.status"))["iommu_lookups"] for one in (narrow, past)]

    assert lookups[0] > 0
    assert lookups[1] == 0
    assert private_mappings(narrow.record) > 0


async def check_the_disk_is_lost(one: LinuxVm) -> None:
    """Its capacity is no secret, so Linux finds it, asks for its partitions, and waits for ever, without a word."""
    assert CIPHERTEXT_RING.match(await one.until_fault())
    await console_until(one.vm, FOUND, seconds=BOOT_SECONDS)
    with pytest.raises(UserError, match=AFTER_DISK):
        await console_until(one.vm, AFTER_DISK, seconds=HANG_SECONDS)

    row = await one.vm.row()
    assert (row.state, row.secure, row.reason) == ("running", True, "")
    assert hashlib.sha256(one.disk.read_bytes()).hexdigest() == one.digest
    assert PRIVATE_TEXT.decode() in await console_until(one.vm, PRIVATE_TEXT.decode())
    assert PRIVATE_TEXT not in normal_ram(one.running, "program")


def private_mappings(record: Path) -> int:
    """How many pages a guest mapped that it had not shared, from the calls that it made."""
    shared: set[int] = set()
    n_private = 0
    for recorded in FrameReader(record).read():
        envelope = decode(recorded.frame)
        if recorded.direction != "out" or envelope.kind is not MessageKind.CALL:
            continue
        if envelope.number == UV_SHARE_PAGE.number:
            _, gfn, n_pages = msgspec.msgpack.decode(envelope.body)
            shared.update(range(gfn, gfn + n_pages))
        elif envelope.number == H_PUT_TCE.number:
            tce = msgspec.msgpack.decode(envelope.body)[-1]
            n_private += bool(tce & PERMISSION_MASK) and gpa_of_tce(tce) >> PAGE_SHIFT not in shared
    return n_private
