"""Linux from a disk as an installer leaves it: firmware starts it from the boot partition, its root is ext4."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.api import cluster
from deploy.linux.boot_disk import make_busybox_tree
from deploy.linux.store import LinuxImage
from deploy.linux_shell import LinuxShell
from tests.cluster.linux_vms import power_off
from tests.cluster.vm_files import console_end
from tests.guest.build import build_linux_program
from tests.linux_calls import UNKNOWN, calls_made
from tests.needs import need_cross_compilers, need_firmware, need_linux, need_program

pytestmark = [pytest.mark.linux, pytest.mark.cross]

DOCUMENT = Path(__file__).parents[2] / "docs" / "linux.md"
COMMAND_LINE = "console=hvc0 quiet root=/dev/vda2 rw"
SECOND_ENTRY_AT = 446 + 16
"""Of the partitions in an MBR."""
SECOND_LINE = f"{COMMAND_LINE} pci=nomsi"
_TEXT = """
[hosts.alpha]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "512M"
time = "wall"
[vms.vm1.guest]
kernel = "machine"
boot = "disk"
command_line = "{command_line}"
[vms.vm1.disks.root]
path = "{disk}"
"""


async def test_linux_from_its_disk_writes_starts_another_kernel_reboots_and_powers_off(tmp_path: Path) -> None:
    """One VM through all that a machine does: boot, kexec, reboot through firmware, power off; each finds the file."""
    need_firmware()
    need_cross_compilers()
    need_program("mke2fs", "e2fsprogs")
    disk = make_disk(need_linux(), tmp_path)
    file = tmp_path / "c.toml"
    file.write_text(_TEXT.format(command_line=COMMAND_LINE, disk=disk))

    async with cluster(file, state_dir=tmp_path / "state", record=True) as running:
        vm = running.vm("vm1")
        shell = LinuxShell(vm)
        await booted(shell, 0, "Trying to load:  from: /pci@800000020000000/scsi@1 ...   Successfully loaded")
        assert await shell.run("cat /proc/cmdline") == COMMAND_LINE
        assert "/dev/root on / type ext4 (rw" in await shell.run("mount")
        nodes = (await shell.run("ls /proc/device-tree/pci*")).split()
        # Firmware merges the tree that it gets from ibm,client-architecture-support into its own, node by node.
        assert [name for name in nodes if name.startswith("scsi@")] == ["scsi@1"]
        assert "linux,direct64-ddr-window-info" in nodes
        await shell.run("echo first > /root/told; sync")

        since = await console_end(vm)
        await vm.console_write(f"kexec /boot/vmlinux '{SECOND_LINE}'\r".encode())
        text = await booted(shell, since, "pefbox: linux")
        assert "SLOF" not in text
        assert await shell.run("cat /proc/cmdline") == SECOND_LINE
        # Without messages the disk has a level-triggered line of the bridge, which Linux ends each time.
        interrupts = await shell.run("cat /proc/interrupts")
        (line,) = (line for line in interrupts.splitlines() if "Level" in line and "virtio0" in line)
        assert int(line.split()[1]) > 0
        assert "MSI" not in interrupts
        await shell.run("echo second >> /root/told; sync")

        since = await console_end(vm)
        await vm.console_write(b"reboot -f\r")
        await booted(shell, since, "Successfully loaded")
        assert await shell.run("cat /proc/cmdline") == COMMAND_LINE
        assert await shell.run("cat /root/told") == "first\nsecond"
        await shell.run("mount -o remount,ro /")
        await power_off(running, vm)

    documented = DOCUMENT.read_text()
    made = {name for name, _ in calls_made(tmp_path / "state", "vm1")}
    assert len(made) > 20
    assert [name for name in made if name != UNKNOWN and f"| {name} |" not in documented] == []
    assert file_on(disk, "root/told") == b"first\nsecond\n"


def make_disk(image: LinuxImage, directory: Path) -> Path:
    """The disk as the documented command makes it, with two files more in its root."""
    tree, kernel = directory / "tree", Path(image.kernel)
    make_busybox_tree(Path(image.initramfs), tree)
    (tree / "boot").mkdir()
    shutil.copy(kernel, tree / "boot/vmlinux")
    shutil.copy(build_linux_program("kexec"), tree / "sbin/kexec")
    command = [sys.executable, "-m", "deploy.cli", "linux", "boot-disk", "disk.img", "--root", "tree"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "disk.img"


def file_on(disk: Path, name: str) -> bytes:
    """What a file of the disk's root file system holds, as the host reads it."""
    root = disk.with_suffix(".ext4")
    with disk.open("rb") as whole:
        (first_sector,) = struct.unpack_from("<I", whole.read(512), SECOND_ENTRY_AT + 8)
        whole.seek(first_sector * 512)
        root.write_bytes(whole.read())
    return subprocess.run(["debugfs", "-R", f"cat /{name}", str(root)], check=True, capture_output=True).stdout


async def booted(shell: LinuxShell, since: int, mark: str) -> str:
    """The console from `since` to the next shell; it shows `mark`."""
    text = await shell.until_prompt(since)
    assert mark in text
    return text
