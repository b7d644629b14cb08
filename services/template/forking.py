"""Forking services on the launcher's order (protocol.template).

To load Python and the modules of a service takes most of the time until it is ready. A template does that once for all
services of its roles, each of which is a fork(2) of it: of a process with one thread that holds nothing of a cluster, a
VM or a key.

The launcher waits for its processes (waitid(2)) and they die with it (PR_SET_PDEATHSIG), so each becomes its child: it
is forked twice, and when the process in between has ended the kernel gives it to the launcher, which is the subreaper
(prctl(2), PR_SET_CHILD_SUBREAPER). Only then does it go on.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

from protocol.roles import Role
from protocol.template import MAX_ORDER_BYTES, N_ORDER_FILES, NO_PROCESS, decode_pid, encode_pid
from services.runtime.process import ServiceMain, serve
from shared.process_end import leave

_GO = b"g"


class ForkServer:
    """Takes the launcher's orders on `orders` and becomes what `mains` are."""

    def __init__(self, orders: socket.socket, mains: Iterable[ServiceMain], launcher_pid: int) -> None:
        self._orders = orders
        self._mains = {main.role: main for main in mains}
        self._launcher_pid = launcher_pid

    def serve(self) -> NoReturn:
        """Fork one process an order, until the launcher is gone."""
        while True:
            order, files, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, N_ORDER_FILES)
            if not order:
                leave()
            main = self._mains[Role(order.decode())]
            pid = fork_for_launcher(functools.partial(self._become, main, *files))
            for fd in files:
                os.close(fd)
            self._orders.send(encode_pid(pid))

    def _become(self, main: ServiceMain, control_fd: int, output_fd: int) -> NoReturn:
        self._orders.close()
        os.setsid()
        for standard in (1, 2):
            os.dup2(output_fd, standard)
        os.close(output_fd)
        serve(main, control_fd, self._launcher_pid)


def fork_for_launcher(become: Callable[[], NoReturn]) -> int:
    """`become` runs in a new child of the subreaper above this process; its pid, NO_PROCESS when there is none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            between = fork_or_none()
            if between == 0:
                ours.close()
                _fork_again(theirs, become)
        if between is None:
            return NO_PROCESS
        os.waitpid(between, 0)
        pid = decode_pid(ours.recv(MAX_ORDER_BYTES))
        with suppress(OSError):
            # One that was killed meanwhile is the launcher's to notice.
            ours.send(_GO)
        return pid


def fork_or_none() -> int | None:
    """As os.fork; None when the machine has no process left."""
    try:
        return os.fork()
    except OSError:
        return None


def _fork_again(parent: socket.socket, become: Callable[[], NoReturn]) -> NoReturn:
    pid = fork_or_none()
    if pid is None:
        leave(1)
    if pid != 0:
        parent.send(encode_pid(pid))
        leave()
    with parent:
        if parent.recv(len(_GO)) != _GO:
            leave(1)
    run_as_program(become)


def run_as_program(become: Callable[[], NoReturn]) -> NoReturn:
    """As the interpreter runs a program: nothing of it returns to the server's loop."""
    try:
        become()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            leave(end.code or 0)
        sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    leave(1)
