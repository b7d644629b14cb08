"""Unmodified firmware and Linux, which turns itself secure by UV_ESM from its own prom_init."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.cluster_file import read_cluster_file
from deploy.demo_host import press
from deploy.linux_shell import LinuxShell
from deploy.memory_segments import SHM_DIR
from deploy.run_program import RunOrder, cluster_text
from protocol.geometry import PAGE_BYTES
from tests.cluster.linux_vms import (
    COMMAND_LINE,
    MEMORY_BYTES,
    audit_events,
    make_files,
    write_cluster_file,
)
from tests.cluster.vm_files import console_end, console_until
from tests.needs import need_firmware, need_linux

pytestmark = [pytest.mark.linux, pytest.mark.slow]

N_PAGES = MEMORY_BYTES // PAGE_BYTES
BOOT_SECONDS = 180.0
SEED = "what the host does not know"
MARKER = hashlib.sha256(SEED.encode()).hexdigest()[:40]
PLANT = (
    f"M=$(echo -n {SEED} | sha256sum | cut -c1-40); "
    "echo $M > /tmp/file; hostname $M; KEPT=$M /bin/busybox sleep 10000 & echo $! > /tmp/pid"
)
"""The page cache, the kernel's own name, a process's memory; the command line holds the seed alone."""
REGION_OFFSET, REGION_BYTES = 4 << 20, 256 << 10


@asynccontextmanager
async def linux(directory: Path, command_line: str = COMMAND_LINE) -> AsyncIterator[tuple[RunningCluster, LinuxShell]]:
    """Linux at its first prompt."""
    need_firmware()
    need_linux()
    file = directory / "linux.toml"
    write_cluster_file(file, ["vm1"], command_line=command_line)
    async with cluster(file, state_dir=directory) as running:
        yield running, LinuxShell(running.vm("vm1"))


async def test_linux_turns_itself_secure_and_its_host_sees_nothing_of_it(tmp_path: Path) -> None:
    """One boot for all: what Linux sees, its disk, its host's view, memory pressure, and a reboot at the end."""
    async with linux(tmp_path) as (running, shell):
        vm = running.vm("vm1")
        text = await shell.until_prompt()
        await shell.silence_kernel()

        assert "Switching to secure mode." in text
        assert "Memory encryption is active and system is using DMA bounce buffers" in text
        await expect_secure(vm, shell)
        await check_the_disk(shell, tmp_path / "vm1.img")
        await check_the_hosts_view(running, shell)
        await check_a_snapshot(vm, shell, tmp_path / "vm1.snap")
        await check_memory_pressure(running, shell)
        await check_a_reboot(vm, shell)

    events = [event for event in audit_events(tmp_path, "vm1") if event != "share"]
    saved = ["snapshot-begun", "snapshot-taken", "svm-terminated", "restore-begun", "restored"]
    assert events == ["esm", *saved, "svm-terminated", "esm", "svm-terminated"]


async def expect_secure(vm: Vm, shell: LinuxShell) -> None:
    """Linux and ultravisor agree; what is shared is swiotlb (64 MiB), paravirtual pages, bounce pages and RTAS."""
    assert await shell.run("cat /sys/devices/system/cpu/svm") == "1"
    row = await vm.row()
    assert row.secure
    assert row.pages["shared"] is not None
    assert 1024 < row.pages["shared"] < 1040
    assert row.pages["normal"] == 0


async def check_the_disk(shell: LinuxShell, disk: Path) -> None:
    """Read whole through the identity window and swiotlb; a random file written to it is right in the host's file."""
    assert "direct64-ddr-window" in await shell.run("ls /proc/device-tree/pci*")
    assert (await shell.run("sha256sum /dev/vda")).split()[0] == sha256_of(disk)

    await shell.run(f"head -c {REGION_BYTES} /dev/urandom > /tmp/region")
    digest = (await shell.run("sha256sum /tmp/region")).split()[0]
    await shell.run(f"dd if=/tmp/region of=/dev/vda bs=64k seek={REGION_OFFSET >> 16} conv=notrunc; sync")
    assert sha256_of(disk, REGION_OFFSET, REGION_BYTES) == digest


def sha256_of(disk: Path, offset: int = 0, n_bytes: int = -1) -> str:
    """Of a part of the disk, or all of it, as the host has it."""
    with disk.open("rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read(n_bytes)).hexdigest()


def normal_ram(running: RunningCluster, vm: str = "vm1") -> bytes:
    (name,) = [name for name in os.listdir(SHM_DIR) if name.startswith(f"pefbox-{running.name}-{vm}-")]
    return (SHM_DIR / name).read_bytes()


def found(memory: bytes) -> int:
    """How often the marker is there, as text or as bytes."""
    return memory.count(MARKER.encode()) + memory.count(bytes.fromhex(MARKER))


async def check_the_hosts_view(running: RunningCluster, shell: LinuxShell) -> None:
    """All of normal RAM is searched; what goes to the disk is found, so the search is not blind (S1, S2)."""
    await shell.run(PLANT)
    assert found(normal_ram(running)) == 0

    await shell.run("echo shared | sha256sum > /tmp/shared; dd if=/tmp/shared of=/dev/vda conv=notrunc,fsync")
    assert hashlib.sha256(b"shared\n").hexdigest().encode() in normal_ram(running)
    pages = (await running.vm("vm1").row()).pages
    # No device was given the address of a private page: that would have paged it out.
    assert pages["paged_out"] == 0


async def check_memory_pressure(running: RunningCluster, shell: LinuxShell) -> None:
    """kvm pages out 30 % of all pages at random while the guest checksums: nothing changes for it (S3)."""
    await shell.run("dd if=/dev/vda of=/tmp/ballast bs=1M")
    before = await shell.run("sha256sum /tmp/ballast /bin/busybox")
    digests = []
    spec = read_cluster_file(running.paths.state_dir / "linux.toml").vms[0]

    async def checksum() -> None:
        digests.append(await shell.run("sha256sum /tmp/ballast /bin/busybox"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(checksum)
        assert await press(running, spec, 0.3) > 0.2 * N_PAGES
    assert found(normal_ram(running)) == 0
    digests.append(await shell.run("sha256sum /tmp/ballast /bin/busybox"))

    assert digests == [before, before]
    assert await shell.run("cat /tmp/file") == MARKER
    assert await shell.run("hostname") == MARKER
    assert await shell.run("tr '\\0' '\\n' < /proc/$(cat /tmp/pid)/environ | grep KEPT") == f"KEPT={MARKER}"


async def check_a_snapshot(vm: Vm, shell: LinuxShell, file: Path) -> None:
    """It goes on where it was, and nothing of what was planted is in the file (S1): what follows finds it in the VM."""
    before = await shell.run("sha256sum /bin/busybox; dd if=/dev/vda bs=64k count=16 2>/dev/null | sha256sum")
    await vm.snapshot(file)
    assert found(await trio.Path(file).read_bytes()) == 0
    await vm.restore(file)
    await expect_secure(vm, shell)
    assert await shell.run("sha256sum /bin/busybox; dd if=/dev/vda bs=64k count=16 2>/dev/null | sha256sum") == before


async def check_a_reboot(vm: Vm, shell: LinuxShell) -> None:
    """It ends the secure VM; a normal one starts in firmware, and turns itself secure anew."""
    since = await console_end(vm)
    await vm.console_write(b"reboot -f\r")
    await console_until(vm, "SLOF", seconds=BOOT_SECONDS, since=since)
    row = await vm.row()
    assert (row.state, row.secure) == ("running", False)

    text = await shell.until_prompt(since)
    await shell.silence_kernel()
    assert "Switching to secure mode." in text
    await expect_secure(vm, shell)
    assert await shell.run("ls /tmp/file") == "ls: /tmp/file: No such file or directory"


async def test_the_host_finds_what_a_normal_vm_wrote(tmp_path: Path) -> None:
    """The same search as above, where there is something to find."""
    image = need_linux()
    order = RunOrder(
        program=Path(image.kernel),
        initrd=Path(image.initramfs),
        command_line="console=hvc0 quiet loglevel=0",
        memory_bytes=MEMORY_BYTES,
    )
    (tmp_path / "linux.toml").write_text(cluster_text(order, None))
    async with cluster(tmp_path / "linux.toml", state_dir=tmp_path) as running:
        shell = LinuxShell(running.vm("program"))
        await shell.until_prompt()
        await shell.silence_kernel()
        await shell.run(PLANT)

        assert found(normal_ram(running, "program")) >= 3


async def test_a_wrong_kernel_initramfs_or_command_line_is_refused_and_linux_gives_up(tmp_path: Path) -> None:
    """Its own message is on the console, it ends by ibm,os-term; why is told to the operator alone."""
    need_firmware()
    need_linux()
    wrong = {"kernel": "kernel digest differs", "initramfs": "initrd digest differs", "line": "bootargs digest differs"}
    file = tmp_path / "linux.toml"
    write_cluster_file(file, list(wrong))
    make_files(file, tmp_path)
    change(tmp_path / "kernel.vmlinux", b"Linux version 6", b"Linux version 7")
    change(tmp_path / "initramfs.initramfs", b"pefbox: linux", b"pefboy: linux")
    text = file.read_text().replace('make = "linux"', "")
    before, named, after = text.partition("[vms.line]")
    file.write_text(before + named + after.replace("swiotlb=force", "swiotlb=force quiet"))

    async with cluster(file, state_dir=tmp_path) as running:
        for name, reason in wrong.items():
            await expect_refusal(running, name, reason)

    for name in wrong:
        assert audit_events(tmp_path, name) == ["esm-refused", "svm-terminated"]


def change(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


async def expect_refusal(running: RunningCluster, name: str, reason: str) -> None:
    vm = running.vm(name)
    row = await vm.wait_state("off", seconds=BOOT_SECONDS)
    assert not row.secure
    assert row.last_esm["outcome"] == "refused"
    assert row.last_esm["reason"] == reason
    text = await console_until(vm, "Returned -4 from switching to secure mode.", seconds=5)
    assert "svm 0" not in text
    assert reason not in text
    status = await running.process(f"{name}/qemu").query("vm.status")
    assert (status["state"], status["panic"]) == ("guest-panicked", "Switch to secure mode failed..")
