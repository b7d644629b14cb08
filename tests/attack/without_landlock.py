"""Run a program on a machine without Landlock: `without_landlock.py PROGRAM ARGUMENT...`.

A seccomp filter answers the Landlock calls with ENOSYS, as a kernel does that has none, for this program and all that
it starts. Sources: seccomp(2), Linux `include/uapi/linux/filter.h`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_LOAD_WORD, _JUMP_IF_GREATER_EQUAL, _JUMP_IF_GREATER, _RETURN = 0x20, 0x35, 0x25, 0x06
_RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000
_FIRST_LANDLOCK_CALL, _LAST_LANDLOCK_CALL = 444, 446
_INSTRUCTION = struct.Struct("=HBBI")

FILTER = b"".join(
    _INSTRUCTION.pack(*instruction)
    for instruction in (
        (_LOAD_WORD, 0, 0, 0),
        (_JUMP_IF_GREATER_EQUAL, 0, 2, _FIRST_LANDLOCK_CALL),
        (_JUMP_IF_GREATER, 1, 0, _LAST_LANDLOCK_CALL),
        (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS),
        (_RETURN, 0, 0, _RET_ALLOW),
    )
)


class _Program(ctypes.Structure):
    _fields_ = [("n_instructions", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def main() -> None:
    """Install the filter and become the program."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(FILTER) // _INSTRUCTION.size, FILTER)
    filtered = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    )
    if filtered:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
