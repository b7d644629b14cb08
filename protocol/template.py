"""Orders of the launcher to a template of its processes: SOCK_SEQPACKET, one order and one answer at a time.

An order is the name of a role, and comes with two files: the control socket of the new process (protocol.control) and
its standard output and error. The answer is the pid of the new process, or NO_PROCESS when the machine has none left.
"""

from __future__ import annotations

from protocol.roles import Role

FAMILIES = (frozenset({Role.ULTRAVISOR}), frozenset({Role.GUEST}), frozenset({Role.KVM, Role.QEMU}))
"""Roles that are forked from the same template, which loads all of them.

Forks of one template have in common what is drawn when a program starts: the layout of the address space, the canaries
of its stacks, the keys of Python's hashes. Who holds secure memory has none of that in common with who may not read it,
but in a cluster that was started warm (deploy.launch_server), for tests.
"""
MAX_ORDER_BYTES = 64
N_ORDER_FILES = 2
NO_PROCESS = 0
_PID_BYTES = 4


def encode_pid(pid: int) -> bytes:
    """The answer to an order."""
    return pid.to_bytes(_PID_BYTES, "little")


def decode_pid(answer: bytes) -> int:
    """The pid of an answer; NO_PROCESS for one that is none."""
    return int.from_bytes(answer, "little") if len(answer) == _PID_BYTES else NO_PROCESS
