"""The process of a launcher, for whoever had it started: a child of this process, or a fork of a launch server."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

KILLED = -int(signal.SIGKILL)
"""The exit status of a fork that ended without a word: a signal ended it, and most likely this one."""
_STATUS_BYTES = 4


class LauncherProcess(Protocol):
    """For any thread."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    def wait(self) -> int:
        """As `poll`, as soon as it has ended."""

    def terminate(self) -> None:
        """SIGTERM, if it still runs."""

    def kill(self) -> None:
        """SIGKILL, if it still runs."""

    def end_fd(self) -> AbstractContextManager[int]:
        """A descriptor that becomes readable when it ends, which `poll` has not told yet."""


class SpawnedLauncher(subprocess.Popen[bytes]):
    """A child of this process."""

    @contextmanager
    def end_fd(self) -> Iterator[int]:
        """See LauncherProcess."""
        pidfd = os.pidfd_open(self.pid)
        try:
            yield pidfd
        finally:
            os.close(pidfd)


class ForkedLauncher:
    """A child of a launch server: its pidfd tells that it has ended, and a pipe which status it ended with.

    The launcher holds the other end of the pipe, so neither needs the server. Both are closed when the end was told.
    """

    def __init__(self, pid: int, pidfd: int, status_fd: int) -> None:
        """Takes both descriptors."""
        self.pid = pid
        self._pidfd = pidfd
        self._status_fd = status_fd
        self._status: int | None = None
        self._turn = threading.Lock()
        os.set_inheritable(pidfd, False)
        os.set_blocking(status_fd, False)

    def poll(self) -> int | None:
        """See LauncherProcess."""
        with self._turn:
            if self._status is None and _is_readable(self._pidfd, milliseconds=0):
                self._status = _told(self._status_fd)
                os.close(self._status_fd)
                os.close(self._pidfd)
            return self._status

    def wait(self) -> int:
        """See LauncherProcess."""
        while True:
            status = self.poll()
            if status is not None:
                return status
            with self.end_fd() as fd:
                _is_readable(fd, milliseconds=None)

    def terminate(self) -> None:
        """See LauncherProcess."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """See LauncherProcess."""
        self._send(signal.SIGKILL)

    @contextmanager
    def end_fd(self) -> Iterator[int]:
        """See LauncherProcess; one that was told just now by another thread is readable at once."""
        with self._turn:
            fd = os.dup(self._pidfd) if self._status is None else os.eventfd(1)
        try:
            yield fd
        finally:
            os.close(fd)

    def _send(self, number: signal.Signals) -> None:
        with self._turn, suppress(ProcessLookupError):
            if self._status is None:
                signal.pidfd_send_signal(self._pidfd, number)


def _is_readable(fd: int, milliseconds: int | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))


def _told(status_fd: int) -> int:
    """What the launcher that has ended wrote."""
    try:
        return decode_status(os.read(status_fd, _STATUS_BYTES))
    except BlockingIOError:
        # It is held open by what the launcher forked a moment before it was killed.
        return KILLED


def encode_status(status: int) -> bytes:
    """An exit status for the pipe."""
    return status.to_bytes(_STATUS_BYTES, "little", signed=True)


def decode_status(data: bytes) -> int:
    """What the pipe holds: KILLED when that is nothing."""
    return int.from_bytes(data, "little", signed=True) if len(data) == _STATUS_BYTES else KILLED
