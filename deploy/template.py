"""The templates, of which the processes of a cluster are forks (protocol.template), started and ended.

They are started before the launcher has loaded its own modules, so that all load at once: little is imported here. One
of a cluster that starts warm is a fork of what has loaded all (deploy.launch_forks).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from deploy.python_process import new_output, start_module
from protocol.roles import Role
from protocol.template import FAMILIES

_PR_SET_CHILD_SUBREAPER = 36


class Template:
    """One that was started. Its forks are children of this process, and go on when it ends.

    Orders go over `orders`, which does not block. Until it `has_answered` it may still load.
    """

    def __init__(self, name: str, pid: int, orders: socket.socket) -> None:
        """Takes `orders`."""
        self.name = name
        self.pid = pid
        self.orders = orders
        orders.setblocking(False)
        self.has_answered = False

    def kill(self) -> None:
        """End it; whoever waits for an answer hears that there is none."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it; returns when it is gone."""
        self.kill()
        self.orders.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Templates:
    """Those of a cluster, by the roles that are forked from them. Leaving the `with` ends them."""

    def __init__(self, of: Mapping[Role, Template]) -> None:
        self._of = dict(of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def living(self) -> set[Template]:
        """Those that are there."""
        return set(self._of.values())

    def of(self, role: Role) -> Template | None:
        """The one that a process of `role` is forked from; None when there is none, or no more."""
        return self._of.get(role)

    def give_up(self, template: Template) -> None:
        """End one; the processes of its roles load by themselves from then on."""
        self._of = {role: other for role, other in self._of.items() if other is not template}
        template.close()

    def kill(self) -> None:
        """As that of each."""
        for template in self.living:
            template.kill()

    def close(self) -> None:
        """End all; what was forked goes on."""
        for template in self.living:
            self.give_up(template)


def become_subreaper() -> bool:
    """Have what templates fork be children of this process; whether the system lets it."""
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def load_templates() -> Templates:
    """One a family of roles, as far as the machine has what it takes. Each loads while the caller goes on."""
    of: dict[Role, Template] = {}
    if become_subreaper():
        for roles in FAMILIES:
            with suppress(OSError):
                of |= dict.fromkeys(roles, _load_template(roles))
    return Templates(of)


def _load_template(roles: frozenset[Role]) -> Template:
    names = sorted(role.value for role in roles)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # What it cannot load no process of its roles can, which then says so.
        with theirs, new_output(Path(os.devnull)) as output_fd:
            orders_fd = theirs.fileno()
            arguments = ["--orders-fd", str(orders_fd), *names]
            pid = start_module("services.template", arguments, orders_fd, output_fd)
    except OSError:
        ours.close()
        raise
    return Template(f"template of {' and '.join(names)}", pid, ours)


NO_TEMPLATES = Templates({})
"""Each process loads by itself."""
