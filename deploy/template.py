"""The templates, of which the processes of a cluster are forks (protocol.template), started and ended.

They are started before the launcher has loaded its own modules, so that all load at once: little is imported here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Sequence
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

    def __init__(self, roles: frozenset[Role]) -> None:
        """Raises OSError."""
        names = sorted(role.value for role in roles)
        self.name = f"template of {' and '.join(names)}"
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.orders.setblocking(False)
        self.has_answered = False
        try:
            # What it cannot load no process of its roles can, which then says so.
            with theirs, new_output(Path(os.devnull)) as output_fd:
                orders_fd = theirs.fileno()
                arguments = ["--orders-fd", str(orders_fd), *names]
                self.pid = start_module("services.template", arguments, orders_fd, output_fd)
        except OSError:
            self.orders.close()
            raise

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
    """One a family of roles, as far as the machine has what it takes. Leaving the `with` ends them."""

    def __init__(self, families: Sequence[frozenset[Role]] = FAMILIES) -> None:
        self._of: dict[Role, Template] = {}
        if families and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0:
            for roles in families:
                with suppress(OSError):
                    self._of |= dict.fromkeys(roles, Template(roles))

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


NO_TEMPLATES = Templates(())
"""Each process loads by itself."""
