"""What keeps a process to its own: no new privileges, no core files, not dumpable, Landlock.

Confinement happens once, before the first message and before the first thread, since Landlock binds the calling
thread and those it starts later. Every protection is reported by name; one that this machine lacks is reported with
the reason, never silently left out.

Sources: prctl(2), landlock(7), Linux `include/uapi/linux/landlock.h`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence

from protocol.errors import HostFault

ON = "on"

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

_FS_WRITE_FILE = 1 << 1
_FS_READ_FILE = 1 << 2
_FS_READ_DIR = 1 << 3
_FS_REMOVE_FILE = 1 << 5
_FS_MAKE_SOCK = 1 << 9
_FS_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_RIGHTS = 0b11
_SCOPES = 0b11
_RUN_DIR_RIGHTS = _FS_READ_FILE | _FS_WRITE_FILE | _FS_READ_DIR | _FS_REMOVE_FILE | _FS_MAKE_SOCK

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """End this process when the launcher ends; raises HostFault when it already has."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise HostFault("the launcher is gone")


def confine(*, dumpable: bool, landlock_dirs: Sequence[str] | None) -> dict[str, str]:
    """Apply every protection; returns name -> `on` or why it is missing.

    `landlock_dirs` are the only places of the file system that stay reachable; None applies no Landlock.
    """
    return {
        "no_core": _attempt(_no_core),
        "no_new_privs": _attempt(lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1)),
        "not_dumpable": _set_dumpable() if dumpable else _attempt(lambda: _prctl(_PR_SET_DUMPABLE, 0)),
        "landlock": "off: this role needs none"
        if landlock_dirs is None
        else _attempt(lambda: _landlock(landlock_dirs)),
    }


def protect_memory(*, dumpable: bool) -> None:
    """The part of it for a process with secrets that is not confined; said either way, as a fork may be protected."""
    _no_core()
    _prctl(_PR_SET_DUMPABLE, int(dumpable))


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    abi: int = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    return max(abi, 0)


def _attempt(protect: object) -> str:
    assert callable(protect)
    try:
        protect()
    except (OSError, HostFault) as error:
        return f"missing: {error}"
    return ON


def _set_dumpable() -> str:
    """What it was forked from was not."""
    _prctl(_PR_SET_DUMPABLE, 1)
    return "off: started debuggable"


def _no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _landlock(directories: Sequence[str]) -> None:
    abi = landlock_abi()
    if not abi:
        raise HostFault("this kernel has no Landlock")
    if len(os.listdir("/proc/self/task")) != 1:
        raise HostFault("a thread already runs, which Landlock would not bind")
    ruleset = _create_ruleset(abi)
    try:
        for directory in directories:
            _allow_beneath(ruleset, directory)
        _call(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _create_ruleset(abi: int) -> int:
    rights = _FS_RIGHTS_BY_ABI[min(abi, 5)]
    attributes = struct.pack("=Q", rights)
    if abi >= 4:
        attributes += struct.pack("=Q", _NET_RIGHTS)
    if abi >= 6:
        attributes += struct.pack("=Q", _SCOPES)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return _call(_SYS_LANDLOCK_CREATE_RULESET, buffer, len(attributes), 0)


def _allow_beneath(ruleset: int, directory: str) -> None:
    parent = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        attributes = struct.pack("=Qi", _RUN_DIR_RIGHTS, parent)
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        _call(_SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, buffer, 0)
    finally:
        os.close(parent)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
