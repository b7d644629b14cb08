"""Starting the process of a plan: by its module, or as a fork of a template (services.template)."""

from __future__ import annotations

import functools
import socket
from collections.abc import Awaitable, Callable

from deploy.child import Child
from deploy.control_channel import ControlChannel
from deploy.plan import ProcessPlan
from deploy.python_process import new_output, start_module
from deploy.run_dirs import Paths
from deploy.template import Template, Templates
from protocol.roles import Role
from protocol.template import NO_PROCESS
from services.runtime.log import Log

SERVICE_MODULE = "services.{role}"
"""What `python -m` runs for a role."""

Start = Callable[[int, int], Awaitable[int]]
"""Starts a process with this control socket and file of standard error; its pid, or NO_PROCESS."""


class Spawner:
    """Starts the processes of one cluster, each running `module` of its role."""

    def __init__(self, module: str, templates: Templates | None, log: Log) -> None:
        self._module = module
        self._templates = templates
        self._log = log

    def close(self) -> None:
        """End the templates; what was forked goes on."""
        if self._templates is not None:
            self._templates.close()

    def template_of(self, role: Role) -> Template | None:
        """What a process of `role` is forked from; None when it loads by itself."""
        return self._templates.of(role) if self._templates is not None else None

    async def spawn(self, plan: ProcessPlan, paths: Paths) -> Child:
        """Start the process of `plan`; raises OSError. Not to be cancelled: it would exist, and nobody know it."""
        template = self.template_of(plan.role)
        if template is not None:
            child = await _started(plan, paths, functools.partial(template.fork, plan.role))
            if child is not None:
                return child
            self._give_up(template, plan.role)
        child = await _started(plan, paths, functools.partial(self._load, plan.role))
        assert child is not None
        return child

    def _give_up(self, template: Template, role: Role) -> None:
        assert self._templates is not None
        self._log.warning("the template is of no use any more: processes load by themselves", role=role.value)
        self._templates.give_up(template)

    async def _load(self, role: Role, control_fd: int, output_fd: int) -> int:
        return start_module(
            self._module.format(role=role.value), ["--control-fd", str(control_fd)], control_fd, output_fd
        )


async def _started(plan: ProcessPlan, paths: Paths, start: Start) -> Child | None:
    """The process that `start` started with a control socket of its own; None when it started none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs, new_output(paths.stderr_file(plan.place)) as output_fd:
            pid = await start(theirs.fileno(), output_fd)
    except OSError:
        ours.close()
        raise
    if pid == NO_PROCESS:
        ours.close()
        return None
    ours.setblocking(False)
    return Child(plan, pid, ControlChannel(ours, plan.target))
