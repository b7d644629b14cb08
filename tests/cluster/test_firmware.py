"""Unmodified firmware: SLOF to its prompt and its Forth, programs from boot partitions, and a kernel from memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.api import Vm, cluster
from deploy.linux.partitions import PartitionType
from deploy.linux_shell import LinuxShell
from tests.cluster.linux_vms import power_off
from tests.cluster.vm_files import console_end, console_until
from tests.disk_image import Part, write_gpt_disk, write_mbr_disk
from tests.guest.build import build_client
from tests.needs import need_cross_compilers, need_debian_kernel, need_firmware, need_linux

PROMPT = "0 > "
BOOT_SECONDS = 120.0
MAGIC = b"a sector that firmware reads"

SECOND_DISK = """
[vms.vm1.disks.second]
path = "{second}"
"""

_TEXT = """
[hosts.alpha]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "512M"
time = "wall"
[vms.vm1.guest]
kernel = "machine"
{guest}
[vms.vm1.disks.root]
path = "{disk}"
"""


def cluster_file(directory: Path, guest: str) -> Path:
    """One VM with a disk of 1 MiB whose first sector begins with MAGIC."""
    disk = directory / "disk.img"
    disk.write_bytes(MAGIC.ljust(512, b"\0") + os.urandom((1 << 20) - 512))
    file = directory / "firmware.toml"
    file.write_text(_TEXT.format(guest=guest, disk=disk))
    return file


async def forth(vm: Vm, line: str) -> str:
    """What SLOF answers to a line, up to its next prompt."""
    since = await console_end(vm)
    await vm.console_write(line.encode() + b"\r")
    return await console_until(vm, f"ok\r\n{PROMPT}", since=since)


async def test_slof_finds_the_disk_reaches_its_prompt_and_speaks_forth(tmp_path: Path) -> None:
    need_firmware()
    file = cluster_file(tmp_path, 'boot = "disk"')
    async with cluster(file, state_dir=tmp_path / "state") as running:
        vm = running.vm("vm1")
        text = await console_until(vm, PROMPT, seconds=BOOT_SECONDS)
        assert "1af4 1042    virtio [ block ]" in text
        # Firmware has opened the disk and read its first sectors; a disk that it cannot open is "No such device".
        assert "Trying to load:  from: /pci@800000020000000/scsi@1" in text
        assert "Not a bootable device" in text
        assert " 5 " in await forth(vm, "2 3 + .")


async def test_slof_probes_the_bus_and_starts_a_program_from_a_boot_partition(tmp_path: Path) -> None:
    """An ELF of 32 bits behind an MBR goes back to firmware, which tries the next disk: an ELF of 64 bits, GPT."""
    need_firmware()
    need_cross_compilers()
    file = cluster_file(tmp_path, 'boot = "disk"\npci_nodes = "firmware"')
    first, second = tmp_path / "disk.img", tmp_path / "second.img"
    write_mbr_disk(
        first, [Part(PartitionType.LINUX, MAGIC), Part(PartitionType.PREP_BOOT, build_client(32).read_bytes())]
    )
    write_gpt_disk(
        second, [Part(PartitionType.LINUX, MAGIC), Part(PartitionType.PREP_BOOT, build_client(64).read_bytes())]
    )
    file.write_text(file.read_text() + SECOND_DISK.format(second=second))
    async with cluster(file, state_dir=tmp_path / "state") as running:
        vm = running.vm("vm1")
        text = await console_until(vm, PROMPT, seconds=BOOT_SECONDS)
        assert "client: 32 bits, from /pci@800000020000000/scsi@1, arguments <>" in text
        assert "client: 64 bits, from /pci@800000020000000/scsi@2, arguments <>" in text
        since = await console_end(vm)
        await vm.console_write(b"boot /pci@800000020000000/scsi@1 power-off now\r")
        await console_until(vm, "scsi@1, arguments <power-off now>", since=since)
        await vm.wait_state("off", seconds=10)


@pytest.mark.linux
async def test_debians_own_kernel_boots_to_a_shell_and_sets_the_clock(tmp_path: Path) -> None:
    """Nobody built it for this machine. Its devices are modules, which the initial RAM disk has not."""
    need_firmware()
    initramfs, kernel = need_linux().initramfs, need_debian_kernel()
    guest = f'boot = "kernel"\nimage = "{kernel}"\ninitrd = "{initramfs}"\ncommand_line = "console=hvc0 quiet"'
    async with cluster(cluster_file(tmp_path, guest), state_dir=tmp_path / "state") as running:
        vm = running.vm("vm1")
        shell = LinuxShell(vm)
        text = await shell.until_prompt()
        await shell.silence_kernel()
        assert "Calling ibm,client-architecture-support... done" in text
        assert (await shell.run("uname -r")).endswith("-powerpc64le")
        # RTAS set-time-of-day and get-time-of-day, through the kernel's clock device.
        assert await shell.run("date -u -s 2031-02-03 >/dev/null; hwclock -u -w -f /dev/rtc0") == ""
        assert "Feb  3 00:0" in await shell.run("date -u -s 2001-01-01 >/dev/null; hwclock -u -r -f /dev/rtc0")
        await power_off(running, vm)
