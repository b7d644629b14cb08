"""Unmodified firmware: SLOF to its prompt and its Forth, and Linux through it to a shell that reads a real disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.api import RunningCluster, Vm, cluster
from tests.cluster.vm_files import console_end, console_until
from tests.needs import need_firmware, need_linux

PROMPT = "0 > "
BOOT_SECONDS = 120.0
MAGIC = b"a sector that firmware reads"

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


@pytest.mark.parametrize("pci_nodes", ["qemu", "firmware"])
async def test_slof_finds_the_disk_reaches_its_prompt_and_speaks_forth(tmp_path: Path, pci_nodes: str) -> None:
    need_firmware()
    file = cluster_file(tmp_path, f'boot = "disk"\npci_nodes = "{pci_nodes}"')
    async with cluster(file, state_dir=tmp_path / "state") as running:
        vm = running.vm("vm1")
        text = await console_until(vm, PROMPT, seconds=BOOT_SECONDS)
        assert "1af4 1042    virtio [ block ]" in text
        # Firmware has opened the disk and read its first sectors; a disk that it cannot open is "No such device".
        assert "Trying to load:  from: /pci@800000020000000/scsi@1" in text
        assert "Not a bootable device" in text
        assert " 5 " in await forth(vm, "2 3 + .")


@pytest.mark.linux
async def test_linux_boots_through_slof_to_a_shell_and_reads_the_disk(tmp_path: Path) -> None:
    need_firmware()
    image = need_linux()
    guest = (
        f'boot = "kernel"\nimage = "{image.kernel}"\ninitrd = "{image.initramfs}"\ncommand_line = "console=hvc0 quiet"'
    )
    async with cluster(cluster_file(tmp_path, guest), state_dir=tmp_path / "state") as running:
        vm = running.vm("vm1")
        text = await console_until(vm, "/ # ", seconds=BOOT_SECONDS)
        assert "Calling ibm,client-architecture-support... done" in text
        assert await shell(vm, "uname -m") == "ppc64le"
        assert MAGIC.decode() in await shell(vm, f"dd if=/dev/vda bs={len(MAGIC)} count=1 2>/dev/null")
        assert "direct64-ddr-window" in await shell(vm, "ls /proc/device-tree/pci*")
        await power_off(running, vm)


async def shell(vm: Vm, command: str) -> str:
    """The output of one command."""
    since = await console_end(vm)
    await vm.console_write(f"{command}; echo do''ne\r".encode())
    text = await console_until(vm, "done\r\n", since=since, seconds=30)
    # The next prompt may have come with the end of the command.
    return text.partition("\r\n")[2].partition("done\r\n")[0].strip()


async def power_off(running: RunningCluster, vm: Vm) -> None:
    """`poweroff` ends the VM cleanly."""
    await vm.console_write(b"poweroff -f\r")
    row = await vm.wait_state("off", seconds=30)
    assert not row.secure
    assert (await running.process("vm1/qemu").row()).state == "running"
