"""Starting the process of a plan: by its module, or as a fork of a template (services.template)."""

from __future__ import annotations

import functools
import socket
from collections.abc import Awaitable, Callable

import trio

from deploy.child import Child
from deploy.control_channel import ControlChannel
from deploy.plan import ProcessPlan
from deploy.python_process import new_output, start_module
from deploy.run_dirs import Paths
from deploy.template import NO_TEMPLATES, Template
from protocol.roles import Role
from protocol.template import MAX_ORDER_BYTES, NO_PROCESS, decode_pid
from services.runtime.log import Log

SERVICE_MODULE = "services.{role}"
"""What `python -m` runs for a role."""

Start = Callable[[int, int], Awaitable[int]]
"""Starts a process with this control socket and file of standard error; its pid, or NO_PROCESS."""

_LOAD_SECONDS = 20.0
"""Until a template has answered once: it may still load, on a machine that does much else."""
_FORK_SECONDS = 5.0


class Spawner:
    """Starts the processes of one cluster: forks of `templates`, or each running `module` of its role."""

    def __init__(self, module: str, log: Log) -> None:
        self.templates = NO_TEMPLATES
        self._module = module
        self._log = log
        self._turn = trio.Lock()

    async def spawn(self, plan: ProcessPlan, paths: Paths) -> Child:
        """Start the process of `plan`; raises OSError. Not to be cancelled: it would exist, and nobody know it."""
        child = None
        if self.templates.of(plan.role) is not None:
            child = await _started(plan, paths, functools.partial(self._fork, plan.role))
        if child is None:
            child = await _started(plan, paths, functools.partial(self._load, plan.role))
        assert child is not None
        return child

    async def _load(self, role: Role, control_fd: int, output_fd: int) -> int:
        module = self._module.format(role=role.value)
        return start_module(module, ["--control-fd", str(control_fd)], control_fd, output_fd)

    async def _fork(self, role: Role, control_fd: int, output_fd: int) -> int:
        """NO_PROCESS without a template; one that does not answer is given up."""
        async with self._turn:
            template = self.templates.of(role)
            if template is None:
                return NO_PROCESS
            try:
                return await _ask(template, role, [control_fd, output_fd])
            except (OSError, trio.TooSlowError) as error:
                self._log.warning("processes load by themselves", template=template.name, reason=str(error))
                self.templates.give_up(template)
                return NO_PROCESS


async def _ask(template: Template, role: Role, files: list[int]) -> int:
    """The pid that it answers; raises OSError, TooSlowError."""
    socket.send_fds(template.orders, [role.value.encode()], files)
    with trio.fail_after(_FORK_SECONDS if template.has_answered else _LOAD_SECONDS):
        await trio.lowlevel.wait_readable(template.orders)
    answer = template.orders.recv(MAX_ORDER_BYTES)
    if not answer:
        raise ConnectionResetError("it has ended")
    template.has_answered = True
    return decode_pid(answer)


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
