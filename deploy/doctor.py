"""What this machine offers a cluster and what it lacks, each absence with what it costs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from deploy.firmware import PACKAGE, find_firmware
from deploy.preflight import ENGINE_PACKAGE, INSTALL_ENGINE
from deploy.run_dirs import left_over_clusters

_MIB = 1 << 20
_SYS_USERFAULTFD = 323
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_MEMFD_SECRET = 447
_LANDLOCK_CREATE_RULESET_VERSION = 1
_PR_GET_SECCOMP = 21
_UFFD_USER_MODE_ONLY = 1
_CAP_IPC_LOCK = 14
_SMALL_SHM_BYTES = 1 << 30
LIBRARIES = ("trio", "trio-asyncio", "pyzmq", "msgspec", "cryptography", "structlog", "click", "rich")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `cost` says what its absence means; a `required` one must be there."""

    name: str
    ok: bool
    detail: str
    cost: str = ""
    required: bool = False

    def as_json(self) -> dict[str, Any]:
        """All facts; `cost` only where there is one to pay."""
        facts = {"name": self.name, "ok": self.ok, "required": self.required, "detail": self.detail}
        return facts if self.ok else facts | {"cost": self.cost}


def examine() -> list[Finding]:
    """Look at everything; nothing is changed on the machine."""
    return [check() for check in CHECKS]


def findings_table(findings: list[Finding]) -> Table:
    """One row a finding, with the cost of what lacks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "WHAT", "FOUND", "WITHOUT IT"):
        table.add_column(column)
    for finding in findings:
        if finding.ok:
            table.add_row("[green]ok[/]", finding.name, finding.detail, "")
        else:
            mark = "[bold red]needed[/]" if finding.required else "[yellow]lacks[/]"
            table.add_row(mark, finding.name, finding.detail, finding.cost)
    return table


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", ok, platform.python_version(), "pefbox runs on Python 3.11 to 3.13", required=True)


def _libraries() -> Finding:
    found, missing = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    detail = f"missing: {', '.join(missing)}" if missing else ", ".join(found)
    return Finding("libraries", not missing, detail, "install with: pip install .", required=True)


def _architecture() -> Finding:
    machine = platform.machine()
    cost = "words that processes share would tear: other machines need fences that do not exist yet"
    return Finding("x86-64", machine == "x86_64", machine, cost, required=True)


def _curve() -> Finding:
    # zmq is only worth its import time here.
    import zmq

    cost = "links cannot be authenticated: install a libzmq with CURVE"
    return Finding("ZeroMQ CURVE", bool(zmq.has("curve")), f"libzmq {zmq.zmq_version()}", cost, required=True)


def _shared_memory() -> Finding:
    try:
        shm = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", False, str(error.strerror), "normal RAM lies there", required=True)
    free_bytes, total_bytes = shm.f_bavail * shm.f_frsize, shm.f_blocks * shm.f_frsize
    detail = f"{free_bytes // _MIB} of {total_bytes // _MIB} MiB free"
    cost = "two VMs of 256 MiB fit, little more: mount -o remount,size=2G /dev/shm"
    return Finding("/dev/shm", free_bytes >= _SMALL_SHM_BYTES, detail, cost)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding("open files", hard >= 1024 or hard < 0, f"limit {soft}, hard {hard}", "fewer VMs: ulimit -n 1024")


def _memfd_secret() -> Finding:
    cost = "secure memory is a sealed memfd: the kernel's own mapping holds it too"
    fd = _libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        return Finding("memfd_secret", False, os.strerror(ctypes.get_errno()), cost)
    os.close(fd)
    if _may_lock_all():
        return Finding("memfd_secret", True, "any size")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    cost = f"secure VMs above {limit // _MIB} MiB use a sealed memfd: raise RLIMIT_MEMLOCK or grant CAP_IPC_LOCK"
    return Finding("memfd_secret", False, f"up to {limit // _MIB} MiB a process (RLIMIT_MEMLOCK)", cost)


def _may_lock_all() -> bool:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return limit == resource.RLIM_INFINITY or bool(_effective_capabilities() >> _CAP_IPC_LOCK & 1)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return int(value, 16)
    return 0


def _userfaultfd() -> Finding:
    cost = "a load that bypasses qemu's accessor finds zeros instead of the page's ciphertext"
    fd = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        return Finding("userfaultfd", False, os.strerror(ctypes.get_errno()), cost)
    os.close(fd)
    return Finding("userfaultfd", True, "user mode")


def _seccomp() -> Finding:
    ok = _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0
    detail = "available" if ok else os.strerror(ctypes.get_errno())
    return Finding("seccomp", ok, detail, "system calls of the host processes cannot be filtered")


def _landlock() -> Finding:
    abi = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    cost = "kvm and qemu can read files and memory of processes of the same user: run each role as its own uid"
    if abi < 1:
        return Finding("Landlock", False, os.strerror(ctypes.get_errno()), cost)
    return Finding("Landlock", True, f"ABI {abi}")


def _unicorn() -> Finding:
    ok = importlib.util.find_spec(ENGINE_PACKAGE) is not None
    detail = importlib.metadata.version(ENGINE_PACKAGE) if ok else "not installed"
    cost = f"guests that are real POWER code cannot run, model guests do: {INSTALL_ENGINE}"
    return Finding(ENGINE_PACKAGE, ok, detail, cost)


def _slof() -> Finding:
    found = find_firmware()
    cost = f"no real firmware for real POWER guests: apt-get install {PACKAGE}"
    return Finding("SLOF", found is not None, found or "no slof.bin", cost)


def _program(name: str, cost: str) -> Finding:
    # mke2fs lies where an ordinary user's PATH does not look.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return Finding(name, found is not None, found or "not found", cost)


def _mke2fs() -> Finding:
    return _program("mke2fs", "the demo's disk is a tar of files instead of an ext4 file system")


def _gdb() -> Finding:
    return _program("gdb-multiarch", "no debugger at hand for POWER guests")


def _left_over() -> Finding:
    left = left_over_clusters()
    detail = f"killed: {', '.join(left)}" if left else "nothing of killed clusters"
    return Finding("left over", not left, detail, "their RAM stays in /dev/shm until: pefbox clean")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _libraries,
    _architecture,
    _curve,
    _shared_memory,
    _open_files,
    _memfd_secret,
    _userfaultfd,
    _seccomp,
    _landlock,
    _unicorn,
    _slof,
    _mke2fs,
    _gdb,
    _left_over,
)
