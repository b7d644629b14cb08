"""Launchers that start warm: forks of a process that has loaded what a cluster needs.

Most of the time until a small cluster is up, Python loads modules, in each of its processes anew. Whoever starts many
clusters, as a test suite does, has them loaded once (deploy.launch_server_main), and each launcher is a fork of that
process, as the processes of its cluster are.

All of them then have in common what is drawn when a program starts, the layout of the address space above all: also
who holds secure memory with who may not read it (see protocol.template). It is for tests of guests, not for attacks.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Self

import msgspec

from deploy.launcher_process import ForkedLauncher
from deploy.python_process import last_words, start_module
from protocol.errors import UserError
from protocol.template import MAX_ORDER_BYTES, NO_PROCESS, decode_pid

ORDER = b"launch"
"""Comes with N_LAUNCH_FILES files, and one more where the cluster has an owner, which the order says.

A file that holds the LaunchOrder; the pipe for the outcome of the start (deploy.launch_outcome); standard error; the
pipe for the exit status; the owner's pipe. The answer is as a template's (protocol.template), with a pidfd.
"""
N_LAUNCH_FILES = 4
_ANSWER_SECONDS = 30.0
"""It may still load, on a machine that does much else."""


class LaunchOrder(msgspec.Struct, frozen=True):
    """What a launcher is started with, as the system has it: names of files need be no text."""

    arguments: list[bytes]
    """Of deploy.launcher_main, but for those that name open files."""
    environment: dict[bytes, bytes]
    has_owner: bool


class LaunchServer:
    """One that was started; for any thread. Leaving the `with` ends it, and no cluster."""

    def __init__(self) -> None:
        """Returns at once: it loads while the caller goes on. Raises UserError."""
        self._turn = threading.Lock()
        with ExitStack() as undo:
            try:
                self._errors = undo.enter_context(tempfile.TemporaryFile())
                self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.enter_context(self._orders)
                with theirs:
                    arguments = ["--orders-fd", str(theirs.fileno())]
                    self.pid = start_module(
                        "deploy.launch_server_main", arguments, theirs.fileno(), self._errors.fileno()
                    )
                self._pidfd = os.pidfd_open(self.pid)
                undo.callback(os.close, self._pidfd)
            except OSError as error:
                raise UserError(f"no launch server: {error}") from None
            self._held = undo.pop_all()
        self._orders.settimeout(_ANSWER_SECONDS)
        self._end = ""
        """Why it was ended, where it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; returns when it is gone. Twice is no error."""
        with self._turn:
            if self._errors.closed:
                return
            self._give_up("it was closed")
            self._held.close()
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)

    def begin(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        ready_fd: int,
        errors_fd: int,
        owner_fd: int | None,
    ) -> ForkedLauncher:
        """Have a launcher run deploy.launcher_main with `arguments`. Raises UserError.

        `ready_fd` gets the outcome of the start, `errors_fd` is standard error, the other end of `owner_fd` is held by
        who owns the cluster; they stay the caller's.
        """
        order = LaunchOrder(
            [os.fsencode(argument) for argument in arguments],
            {os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
            owner_fd is not None,
        )
        try:
            # In memory: a password that somebody has in the environment is not for the disk.
            with os.fdopen(os.memfd_create("pefbox-order"), "wb") as file:
                file.write(msgspec.msgpack.encode(order))
                file.flush()
                files = [file.fileno(), ready_fd, errors_fd]
                return self._begin(files, [] if owner_fd is None else [owner_fd])
        except OSError as error:
            raise UserError(f"no launcher: {error}") from None

    def _begin(self, files: list[int], owner: list[int]) -> ForkedLauncher:
        status_fd, told_fd = os.pipe()
        with ExitStack() as undo:
            undo.callback(os.close, status_fd)
            try:
                with self._turn:
                    pid, pidfd = self._ask([*files, told_fd, *owner])
            finally:
                os.close(told_fd)
            undo.pop_all()
        return ForkedLauncher(pid, pidfd, status_fd)

    def _ask(self, files: list[int]) -> tuple[int, int]:
        if self._end:
            raise UserError(f"no launcher: the launch server has ended: {self._end}")
        with suppress(BrokenPipeError, ConnectionResetError):
            # Its answer tells that it is gone.
            socket.send_fds(self._orders, [ORDER], files)
        answer, pidfds = self._answer()
        if not answer:
            why = last_words(self._errors) or "it was killed"
            raise UserError(f"no launcher: the launch server has ended: {why}")
        pid = decode_pid(answer)
        if pid == NO_PROCESS or not pidfds:
            # One that was forked all the same ends by itself: nobody hears that it is up.
            raise UserError("no launcher: the machine has no room for another process or open file")
        return pid, pidfds[0]

    def _answer(self) -> tuple[bytes, list[int]]:
        """Nothing when it is gone."""
        try:
            answer, pidfds, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, 1)
        except ConnectionResetError:
            return b"", []
        except TimeoutError:
            self._give_up(f"it did not answer in {_ANSWER_SECONDS:g} s")
            raise UserError(f"no launcher: the launch server has ended: {self._end}") from None
        except BaseException:
            # The answer that still comes would be taken for that to the next order.
            self._give_up("an order was broken off")
            raise
        return answer, pidfds

    def _give_up(self, why: str) -> None:
        self._end = self._end or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
