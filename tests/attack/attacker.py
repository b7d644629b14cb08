"""A program that tries what a hostile kvm or qemu would: run by tests/attack/test_confinement.py.

Its argument is JSON: `run_dir` (confine as a host role with this run directory; null: not at all), `targets` (name to
pid) and `files`. It prints the outcome of each attempt as JSON: `done`, or the name of the error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from services.runtime.confine import confine

_PTRACE_SEIZE = 0x4206
_PR_GET_DUMPABLE = 3
_PR_GET_NO_NEW_PRIVS = 39
_SYS_PIDFD_OPEN = 434
_SYS_PIDFD_GETFD = 438
_ANY_ADDRESS = 0x10000
_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def outcome_of(attempt: Callable[[], object]) -> str:
    """`done`, or the name of the error."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def checked(result: int) -> int:
    """The result of a libc call; raises OSError."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attack_process(pid: int) -> dict[str, str]:
    """Every way into another process that a root user has."""
    attempts: dict[str, Callable[[], object]] = {
        "mem": lambda: Path(f"/proc/{pid}/mem").open("rb").close(),
        "fd": lambda: os.listdir(f"/proc/{pid}/fd"),
        "environ": lambda: Path(f"/proc/{pid}/environ").read_bytes(),
        "pidfd_getfd": lambda: take_descriptor(pid),
        "process_vm_readv": lambda: move_memory(_libc.process_vm_readv, pid),
        "process_vm_writev": lambda: move_memory(_libc.process_vm_writev, pid),
        "signal": lambda: os.kill(pid, 0),
        "ptrace": lambda: checked(_libc.ptrace(_PTRACE_SEIZE, pid, None, None)),
    }
    return {name: outcome_of(attempt) for name, attempt in attempts.items()}


def take_descriptor(pid: int) -> None:
    """Copy descriptor 0 of another process."""
    pidfd = checked(_libc.syscall(_SYS_PIDFD_OPEN, pid, 0))
    os.close(checked(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, 0, 0)))


def move_memory(call: Callable[..., int], pid: int) -> None:
    """Copy a byte of another process; that nothing is at the address is seen only after the right to look there."""
    buffer = ctypes.create_string_buffer(1)
    here, there = _Vector(ctypes.addressof(buffer), 1), _Vector(_ANY_ADDRESS, 1)
    try:
        checked(call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


def open_any(path: str) -> None:
    """Open a file or directory for reading."""
    os.close(os.open(path, os.O_RDONLY))


def try_own() -> dict[str, str]:
    """What needs nobody else: start a program, make a file, open a TCP connection."""
    return {
        "exec": outcome_of(lambda: os.posix_spawn("/bin/true", ["true"], {})),
        "create": outcome_of(lambda: create_file(f"/tmp/attacker-{os.getpid()}")),
        "connect": outcome_of(connect_tcp),
    }


def create_file(path: str) -> None:
    """Make a file and remove it."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL))
    os.unlink(path)


def connect_tcp() -> None:
    """A connection to a port where nobody listens."""
    with socket.socket() as stream:
        stream.connect(("127.0.0.1", 1))


def main() -> None:
    """Confine, attack, report."""
    orders = json.loads(sys.argv[1])
    run_dir = orders["run_dir"]
    protections = confine(dumpable=False, landlock_dirs=[run_dir]) if run_dir is not None else {}
    report = {
        "protections": protections,
        "no_new_privs": _libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
        "dumpable": _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0),
        "core_limit": resource.getrlimit(resource.RLIMIT_CORE),
        "processes": {name: attack_process(pid) for name, pid in orders["targets"].items()},
        "files": {path: outcome_of(partial(open_any, path)) for path in orders["files"]},
        "own": try_own(),
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
