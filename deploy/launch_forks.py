"""Forking launchers on order, of a process that has loaded what clusters need (deploy.launch_server)."""

from __future__ import annotations

import functools
import os
import select
import signal
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

import msgspec
from setproctitle import setproctitle

# The launcher's own modules, which deploy.launcher_main loads only when its templates load already.
from deploy import launch, launcher_main, makers  # noqa: F401
from deploy.launch_server import N_LAUNCH_FILES, LaunchOrder
from deploy.launcher_process import encode_status
from deploy.template import NO_TEMPLATES, Template, Templates, become_subreaper
from protocol.template import MAX_ORDER_BYTES, NO_PROCESS, encode_pid
from services.runtime.confine import confine, die_with_parent
from services.runtime.process import ServiceMain
from services.template.forking import ForkServer, fork_or_none, run_as_program
from shared.process_end import leave


class LaunchForks:
    """Takes orders on `orders`, and waits for the launchers, whose parent this process is."""

    def __init__(self, orders: socket.socket, mains: Iterable[ServiceMain]) -> None:
        self._orders = orders
        self._mains = list(mains)
        self._pid_of: dict[int, int] = {}
        """Of the launchers that run, by pidfd."""
        self._poll = select.poll()
        self._poll.register(orders, select.POLLIN)

    def serve(self) -> NoReturn:
        """Until whoever started this is gone."""
        # The library finds the place of the title by the environment, which a launcher gets from its order.
        setproctitle("pefbox launch server")
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._pid_of:
                    self._take_end(fd)
                else:
                    self._take_order()

    def _take_end(self, pidfd: int) -> None:
        os.waitpid(self._pid_of.pop(pidfd), 0)
        self._poll.unregister(pidfd)
        os.close(pidfd)

    def _take_order(self) -> None:
        data, files, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, N_LAUNCH_FILES + 1)
        if not data:
            leave()
        try:
            pid, pidfd = self._fork(files)
        except (OSError, ValueError):
            self._orders.send(encode_pid(NO_PROCESS))
            return
        finally:
            for fd in files:
                os.close(fd)
        self._pid_of[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        socket.send_fds(self._orders, [encode_pid(pid)], [pidfd])

    def _fork(self, files: Sequence[int]) -> tuple[int, int]:
        """A launcher and its pidfd. Raises OSError, and ValueError when there was no room for all `files`."""
        order_fd, *others = files
        order = msgspec.msgpack.decode(os.pread(order_fd, os.fstat(order_fd).st_size, 0), type=LaunchOrder)
        if len(files) != N_LAUNCH_FILES + order.has_owner:
            raise ValueError("files are missing")
        pid = fork_or_none()
        if pid == 0:
            os.close(order_fd)
            run_as_program(functools.partial(self._become, order, *others))
        if pid is None:
            raise BlockingIOError("no process left")
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _become(self, order: LaunchOrder, ready_fd: int, errors_fd: int, status_fd: int, *owner_fds: int) -> NoReturn:
        status = 1
        try:
            self._become_program(order, errors_fd)
            status = self._launch(order, ready_fd, status_fd, owner_fds)
        except SystemExit as end:
            # Of an argument that is none.
            status = end.code if isinstance(end.code, int) else status
        finally:
            with suppress(BrokenPipeError):
                os.write(status_fd, encode_status(status))
        leave(status)

    def _become_program(self, order: LaunchOrder, errors_fd: int) -> None:
        """What a program has that is started: a session, its output and environment, and no file of the server."""
        self._orders.close()
        for pidfd in self._pid_of:
            os.close(pidfd)
        os.setsid()
        os.dup2(0, 1)
        os.dup2(errors_fd, 2)
        os.close(errors_fd)
        os.environb.clear()
        os.environb.update(order.environment)
        setproctitle("pefbox launcher")

    def _launch(self, order: LaunchOrder, ready_fd: int, status_fd: int, owner_fds: Sequence[int]) -> int:
        owner = [f"--owner-fd={fd}" for fd in owner_fds]
        arguments = launcher_main.parse([*map(os.fsdecode, order.arguments), f"--ready-fd={ready_fd}", *owner])
        if arguments.service_module is not None:
            return launcher_main.run(arguments, NO_TEMPLATES)
        return launcher_main.run(arguments, _forked_templates(self._mains, (ready_fd, status_fd, *owner_fds)))


def _forked_templates(mains: Sequence[ServiceMain], not_theirs: Iterable[int]) -> Templates:
    """One template for all of `mains`, a fork of this process without the files `not_theirs`. Raises OSError."""
    if not become_subreaper():
        return NO_TEMPLATES
    launcher_pid = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = fork_or_none()
        if pid == 0:
            not_theirs = (ours.detach(), *not_theirs)
            run_as_program(functools.partial(_serve_forks, theirs, mains, launcher_pid, not_theirs))
    if pid is None:
        ours.close()
        return NO_TEMPLATES
    return Templates(dict.fromkeys((main.role for main in mains), Template("template of all roles", pid, ours)))


def _serve_forks(
    orders: socket.socket, mains: Sequence[ServiceMain], launcher_pid: int, not_theirs: Iterable[int]
) -> NoReturn:
    for fd in not_theirs:
        os.close(fd)
    os.setsid()
    os.dup2(0, 2)
    die_with_parent(launcher_pid)
    confine(dumpable=False, landlock_dirs=None)
    setproctitle("pefbox template")
    ForkServer(orders, mains, launcher_pid).serve()
