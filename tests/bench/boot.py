"""`boot_normal`, `boot_secure`, `guest_...`: the same firmware, kernel and initial RAM disk under pefbox and QEMU.

All are started from nothing, in turn, and timed by the wall clock of whoever waits for the shell. QEMU translates
instructions too (`-accel tcg`) and has the same RAM, one processor, a disk and the paravirtual terminal; it has no
ultravisor, so its normal boot is beside both of ours. What the shell of the normal VM then does is timed from outside
as well, by the line that a command ends with.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from deploy.api import Vm, cluster
from deploy.cluster_file import read_cluster_file, resolve_state
from deploy.firmware import PACKAGE, find_firmware
from deploy.linux.store import LinuxImage, built_image, default_cache
from deploy.linux_files import make_linux_files
from protocol.errors import UserError
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.cluster.vm_files import console_end, console_until

QEMU = "qemu-system-ppc64"
QEMU_PACKAGE = "qemu-system-ppc"
MEMORY_MIB = 512
DISK_BYTES = 1 << 20
COMMAND_LINE = "console=hvc0 quiet"
SECURE_COMMAND_LINE = f"{COMMAND_LINE} svm=on swiotlb=force"
PROMPT = "/ # "
BOOT_SECONDS = 300.0
NORMAL_LIMIT = 1.2
SECURE_LIMIT = 2.0
MAX_PAIRS = 5
_DONE = "done\r\n"
_CHUNK_BYTES = 4096
_CLUSTER = """
[hosts.alpha]
secure_memory = "{memory}M"
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
{blob}
[vms.vm1.disks.root]
path = "{disk}"
[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "root"
access_platform = {secure}
"""


@dataclass(frozen=True, slots=True)
class Work:
    """What the shell of the normal VM does: `amount` of `unit` times seconds."""

    figure: str
    unit: str
    amount: int
    command: str

    @property
    def typed(self) -> bytes:
        """The line, behind which the shell prints `_DONE`; the echo of the line has no such text."""
        return f"{self.command}; echo do''ne\r".encode()


WORKS = (
    Work("guest_sha256", "MiB/s", 32, "dd if=/dev/zero bs=65536 count=512 2>/dev/null | sha256sum"),
    Work("guest_processes", "1/s", 200, "i=0; while [ $i -lt 200 ]; do /bin/busybox true; i=$((i+1)); done"),
    Work("guest_syscalls", "1/s", 200_000, "dd if=/dev/zero of=/dev/null bs=1 count=100000 2>/dev/null"),
)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the start to the shell, and of each of WORKS."""

    boot: float
    works: list[float]


@dataclass(frozen=True, slots=True)
class Machine:
    """A cluster file with one VM, and the disk that it gets anew for each start."""

    file: Path
    disk: Path
    secure: bool


async def measure(n_rounds: int) -> list[Figure]:
    """At most MAX_PAIRS pairs of each. Raises UserError when the machine lacks QEMU, firmware or kernel."""
    image, firmware = _needed()
    normal: list[Round] = []
    secure: list[Round] = []
    works: list[list[Round]] = [[] for _ in WORKS]
    with tempfile.TemporaryDirectory(prefix="pefbox-boot-") as name:
        directory = Path(name)
        machines = [_machine(image, firmware, directory, secure=secure) for secure in (False, True)]
        disk = directory / "qemu.img"
        command = qemu_command(image, firmware, disk)
        for pair in range(min(n_rounds, MAX_PAIRS)):
            # Who comes first alternates: what a machine does to one of the runs it does to the others.
            first = await _qemu(command, disk) if pair % 2 else None
            of_normal, of_secure = [await _pefbox(machine, directory) for machine in machines]
            theirs = first or await _qemu(command, disk)
            normal.append(Round(of_normal.boot, theirs.boot))
            secure.append(Round(of_secure.boot, theirs.boot))
            for work, rounds, ours, floor in zip(WORKS, works, of_normal.works, theirs.works, strict=True):
                rounds.append(Round(work.amount / ours, work.amount / floor))
    beside = shlex.join(command)
    return [
        Figure("boot_normal", "s", normal, Budget(Kind.RATIO_AT_MOST, NORMAL_LIMIT), beside),
        Figure("boot_secure", "s", secure, Budget(Kind.RATIO_AT_MOST, SECURE_LIMIT), beside),
        *(Figure(work.figure, work.unit, rounds, None, beside) for work, rounds in zip(WORKS, works, strict=True)),
    ]


def _needed() -> tuple[LinuxImage, str]:
    """Kernel and firmware; raises UserError with the command that gets what lacks."""
    if shutil.which(QEMU) is None:
        raise UserError(f"no {QEMU}; run: apt-get install {QEMU_PACKAGE}")
    firmware = find_firmware()
    if firmware is None:
        raise UserError(f"no SLOF; run: apt-get install {PACKAGE}")
    return built_image(default_cache()), firmware


def qemu_command(image: LinuxImage, firmware: str, disk: Path) -> list[str]:
    """QEMU with the machine that `_CLUSTER` describes; its terminal is its own input and output."""
    drive = f"file={disk},format=raw,if=none,id=root"
    words = [QEMU, "-M", "pseries", "-accel", "tcg", "-m", f"{MEMORY_MIB}M", "-smp", "1", "-nodefaults"]
    words += ["-display", "none", "-monitor", "none", "-serial", "stdio", "-bios", firmware]
    words += ["-drive", drive, "-device", "virtio-blk-pci,drive=root,disable-legacy=on"]
    return [*words, "-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", COMMAND_LINE]


def _machine(image: LinuxImage, firmware: str, directory: Path, *, secure: bool) -> Machine:
    """Writes the cluster file and, for a secure VM, its blob."""
    state_dir = directory / "state"
    state_dir.mkdir(exist_ok=True)
    machine = Machine(directory / f"{'secure' if secure else 'normal'}.toml", directory / "pefbox.img", secure)
    fields = {
        "memory": MEMORY_MIB,
        "kernel": image.kernel,
        "initrd": image.initramfs,
        "firmware": firmware,
        "command_line": SECURE_COMMAND_LINE if secure else COMMAND_LINE,
        "blob": 'esm_blob = "@state/vm1.esm"' if secure else "",
        "disk": machine.disk,
        "secure": "true" if secure else "false",
    }
    machine.file.write_text(_CLUSTER.format(**fields))
    if secure:
        _empty(machine.disk)
        make_linux_files(resolve_state(read_cluster_file(machine.file), state_dir), state_dir)
    return machine


async def _pefbox(machine: Machine, directory: Path) -> Times:
    """From the start of `up` of a cluster with one VM."""
    _empty(machine.disk)
    started = time.perf_counter()
    async with cluster(machine.file, state_dir=directory / "state") as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT, seconds=BOOT_SECONDS)
        booted = time.perf_counter() - started
        row = await vm.row()
        if row.secure != machine.secure:
            raise RuntimeError(f"{machine.file}: the VM is secure: {row.secure}; last ESM: {row.last_esm}")
        return Times(booted, [] if machine.secure else [await _work_seconds(vm, work) for work in WORKS])


async def _work_seconds(vm: Vm, work: Work) -> float:
    since = await console_end(vm)
    started = time.perf_counter()
    await vm.console_write(work.typed)
    await console_until(vm, _DONE, since=since, seconds=BOOT_SECONDS)
    return time.perf_counter() - started


async def _qemu(command: list[str], disk: Path) -> Times:
    """From the start of the program."""
    _empty(disk)
    return await trio.to_thread.run_sync(qemu_times, command)


def qemu_times(command: list[str]) -> Times:
    """Boot, do all of WORKS, kill. Raises RuntimeError when QEMU ends by itself."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        read_until(process, PROMPT)
        booted = time.perf_counter() - started
        return Times(booted, [_qemu_work_seconds(process, work) for work in WORKS])
    finally:
        process.kill()
        process.communicate()


def _qemu_work_seconds(process: subprocess.Popen[bytes], work: Work) -> float:
    assert process.stdin is not None
    started = time.perf_counter()
    process.stdin.write(work.typed)
    process.stdin.flush()
    read_until(process, _DONE)
    return time.perf_counter() - started


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
