"""`boot_normal` and `guest_sha256`: the same firmware, kernel, initial RAM disk and disk under pefbox and under QEMU.

Both are started from nothing, in turn, and timed by the wall clock of whoever waits for the shell. QEMU translates
instructions too (`-accel tcg`) and has the same RAM, one processor, a disk and the paravirtual terminal. What the shell
then does is timed from outside as well, by the line that a command ends with.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from deploy.api import cluster
from deploy.firmware import PACKAGE, find_firmware
from deploy.linux.config import fragment_sha256
from deploy.linux.store import LinuxImage, Store, default_cache
from protocol.errors import UserError
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.cluster.vm_files import console_end, console_until

QEMU = "qemu-system-ppc64"
QEMU_PACKAGE = "qemu-system-ppc"
MEMORY_MIB = 512
DISK_BYTES = 1 << 20
COMMAND_LINE = "console=hvc0 quiet"
PROMPT = "/ # "
BOOT_SECONDS = 300.0
NORMAL_LIMIT = 1.2
MAX_PAIRS = 5
SHA256_MIB = 32
_DONE = "done\r\n"
_SHA256 = f"dd if=/dev/zero bs=65536 count={SHA256_MIB * 16} 2>/dev/null | sha256sum; echo do''ne\r"
_CHUNK_BYTES = 4096
_CLUSTER = """
[hosts.alpha]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "{memory}M"
time = "wall"
[vms.vm1.guest]
kernel = "machine"
boot = "kernel"
image = "{kernel}"
initrd = "{initrd}"
firmware = "{firmware}"
command_line = "{command_line}"
[vms.vm1.disks.root]
path = "{disk}"
"""

Times = tuple[float, float]
"""Seconds to the shell, and seconds of the digest."""


async def measure(n_rounds: int) -> list[Figure]:
    """At most MAX_PAIRS pairs. Raises UserError when the machine lacks QEMU, firmware or kernel."""
    image, firmware = _needed()
    boots: list[Round] = []
    digests: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="pefbox-boot-") as name:
        directory = Path(name)
        command = qemu_command(image, firmware, directory / "qemu.img")
        for pair in range(min(n_rounds, MAX_PAIRS)):
            # Who comes first alternates: what a machine does to one of two runs it does to both.
            ours, theirs = await _pair(
                lambda: _pefbox(image, firmware, directory), lambda: _qemu(command, directory / "qemu.img"), pair
            )
            boots.append(Round(ours[0], theirs[0]))
            digests.append(Round(SHA256_MIB / ours[1], SHA256_MIB / theirs[1]))
    beside = shlex.join(command)
    return [
        Figure("boot_normal", "s", boots, Budget(Kind.RATIO_AT_MOST, NORMAL_LIMIT), beside),
        Figure("guest_sha256", "MiB/s", digests, None, beside),
    ]


async def _pair(
    ours: Callable[[], Awaitable[Times]], theirs: Callable[[], Awaitable[Times]], number: int
) -> tuple[Times, Times]:
    if number % 2:
        of_theirs = await theirs()
        return await ours(), of_theirs
    of_ours = await ours()
    return of_ours, await theirs()


def _needed() -> tuple[LinuxImage, str]:
    """Kernel and firmware; raises UserError with the command that gets what lacks."""
    if shutil.which(QEMU) is None:
        raise UserError(f"no {QEMU}; run: apt-get install {QEMU_PACKAGE}")
    firmware = find_firmware()
    if firmware is None:
        raise UserError(f"no SLOF; run: apt-get install {PACKAGE}")
    image = Store(default_cache()).newest(fragment_sha256())
    if image is None:
        raise UserError("no guest kernel; run: pefbox linux build (some minutes)")
    return image, firmware


def qemu_command(image: LinuxImage, firmware: str, disk: Path) -> list[str]:
    """QEMU with the machine that `_CLUSTER` describes; its terminal is its own input and output."""
    drive = f"file={disk},format=raw,if=none,id=root"
    words = [QEMU, "-M", "pseries", "-accel", "tcg", "-m", f"{MEMORY_MIB}M", "-smp", "1", "-nodefaults"]
    words += ["-display", "none", "-monitor", "none", "-serial", "stdio", "-bios", firmware]
    words += ["-drive", drive, "-device", "virtio-blk-pci,drive=root,disable-legacy=on"]
    return [*words, "-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", COMMAND_LINE]


async def _pefbox(image: LinuxImage, firmware: str, directory: Path) -> Times:
    """From the start of `up` of a cluster with one VM."""
    disk = directory / "pefbox.img"
    _empty(disk)
    file = directory / "boot.toml"
    fields = {"memory": MEMORY_MIB, "kernel": image.kernel, "initrd": image.initramfs, "firmware": firmware}
    file.write_text(_CLUSTER.format(command_line=COMMAND_LINE, disk=disk, **fields))
    started = time.perf_counter()
    async with cluster(file, state_dir=directory / "state") as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT, seconds=BOOT_SECONDS)
        booted = time.perf_counter() - started
        since = await console_end(vm)
        started = time.perf_counter()
        await vm.console_write(_SHA256.encode())
        await console_until(vm, _DONE, since=since, seconds=BOOT_SECONDS)
        return booted, time.perf_counter() - started


async def _qemu(command: list[str], disk: Path) -> Times:
    """From the start of the program."""
    _empty(disk)
    return await trio.to_thread.run_sync(qemu_times, command)


def qemu_times(command: list[str]) -> Times:
    """Boot, digest, kill. Raises RuntimeError when QEMU ends by itself."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        read_until(process, PROMPT)
        booted = time.perf_counter() - started
        started = time.perf_counter()
        assert process.stdin is not None
        process.stdin.write(_SHA256.encode())
        process.stdin.flush()
        read_until(process, _DONE)
        return booted, time.perf_counter() - started
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[bytes], mark: str) -> None:
    """Raises RuntimeError when the program's output ends before it has `mark`."""
    assert process.stdout is not None
    text = b""
    while mark.encode() not in text:
        data = os.read(process.stdout.fileno(), _CHUNK_BYTES)
        if not data:
            raise RuntimeError(f"{QEMU} ended before {mark!r}: {text[-400:]!r}")
        text += data


def _empty(disk: Path) -> None:
    disk.write_bytes(bytes(DISK_BYTES))
