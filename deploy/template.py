"""The launcher's side of the templates, of which its processes are forks (protocol.template).

They are started before the launcher has loaded its own modules, so that both load at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from contextlib import suppress
from typing import Self

import trio

from deploy.python_process import new_output, start_module
from protocol.roles import Role
from protocol.template import FAMILIES, MAX_ORDER_BYTES, NO_PROCESS, decode_pid

_PR_SET_CHILD_SUBREAPER = 36
_FORK_SECONDS = 5.0
"""It may still load, on a machine that does much else."""


class Template:
    """A template that was started. Its forks are children of this process, and go on when it ends."""

    def __init__(self, roles: frozenset[Role]) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        names = sorted(role.value for role in roles)
        try:
            # What it cannot load no process of its roles can, which then says so.
            with theirs, new_output(os.devnull) as output_fd:
                orders_fd = theirs.fileno()
                arguments = ["--orders-fd", str(orders_fd), *names]
                self.pid = start_module("services.template", arguments, orders_fd, output_fd)
        except OSError:
            ours.close()
            raise
        ours.setblocking(False)
        self._orders = ours
        self._turn = trio.Lock()

    async def fork(self, role: Role, control_fd: int, output_fd: int) -> int:
        """The pid of a new process of `role` with these files; NO_PROCESS when the template makes none any more.

        Not to be cancelled: the process would exist, and nobody know it.
        """
        async with self._turn:
            with trio.move_on_after(_FORK_SECONDS), suppress(OSError):
                socket.send_fds(self._orders, [role.value.encode()], [control_fd, output_fd])
                await trio.lowlevel.wait_readable(self._orders)
                return decode_pid(self._orders.recv(MAX_ORDER_BYTES))
        return NO_PROCESS

    def close(self) -> None:
        """End it; returns when it is gone."""
        self._orders.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Templates:
    """One a family of roles, as far as the machine has room for them. Leaving the `with` ends them."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._of: dict[Role, Template] = {}
        for roles in FAMILIES:
            with suppress(OSError):
                self._of |= dict.fromkeys(roles, Template(roles))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of those that are there."""
        return sorted({template.pid for template in self._of.values()})

    def of(self, role: Role) -> Template | None:
        """The one that a process of `role` is forked from; None when there is none, or no more."""
        return self._of.get(role)

    def give_up(self, template: Template) -> None:
        """End one; the processes of its roles load by themselves from then on."""
        if template in self._of.values():
            self._of = {role: other for role, other in self._of.items() if other is not template}
            template.close()

    def close(self) -> None:
        """End all; what was forked goes on."""
        for template in set(self._of.values()):
            self.give_up(template)
