"""A blocking client of the launcher, for the commands; starting a detached one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.operator_protocol import LENGTH, Request, Response, frame
from deploy.run_dirs import (
    LAUNCHER_SOCKET,
    LOCK_FILE,
    MANIFEST_FILE,
    TOKEN_FILE,
    choose_cluster,
    is_locked,
    runtime_root,
)
from protocol.errors import UserError

if TYPE_CHECKING:
    from deploy.launch_server import LaunchServer
    from deploy.launcher_process import LauncherProcess

_CALL_SECONDS = 5.0
_DOWN_SECONDS = 20.0
_POLL_SECONDS = 0.01


def read_token(run_dir: Path) -> str:
    """What the launcher wants to see with each order; raises UserError when no launcher runs there."""
    try:
        return (run_dir / TOKEN_FILE).read_text(encoding="ascii")
    except OSError as error:
        raise UserError(f'cluster "{run_dir.name}": its launcher cannot be reached: {error.strerror}') from None


class LauncherClient:
    """A connection to the launcher of a running cluster."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._token = read_token(run_dir)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(run_dir / LAUNCHER_SOCKET))
        except OSError as error:
            self._socket.close()
            raise UserError(f'cluster "{run_dir.name}": its launcher cannot be reached: {error.strerror}') from None

    def __enter__(self) -> LauncherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def call(self, what: str, arguments: dict[str, Any] | None = None, seconds: float = _CALL_SECONDS) -> Any:  # noqa: ANN401
        """One order; raises UserError with the launcher's own line, or when it does not answer in `seconds`."""
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(frame(Request(self._token, what, arguments or {})))
            (n_bytes,) = LENGTH.unpack(self._read(LENGTH.size))
            response = msgspec.msgpack.decode(self._read(n_bytes), type=Response)
        except TimeoutError:
            raise UserError(f'cluster "{self.run_dir.name}": its launcher did not answer in {seconds:g} s') from None
        except OSError as error:
            raise UserError(f'cluster "{self.run_dir.name}": its launcher is gone ({error})') from None
        if response.error is not None:
            raise UserError(response.error)
        return response.result

    def query(self, target: str, query: str, arguments: dict[str, Any], seconds: float = 0.5) -> Any:  # noqa: ANN401
        """Ask one process."""
        order = {"target": target, "query": query, "arguments": arguments, "seconds": seconds}
        return self.call("query", order, seconds + _CALL_SECONDS)

    def is_gone_within(self, seconds: float | None) -> bool:
        """Whether the launcher ends the connection in that time, None for any: its cluster is down then."""
        self._socket.settimeout(seconds)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError:
            return True

    def take_over(self) -> socket.socket:
        """The connection itself, after an order that turned it into a stream; the caller owns it."""
        self._socket.settimeout(None)
        return self._socket

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < n_bytes:
            piece = self._socket.recv(n_bytes - len(data))
            if not piece:
                raise ConnectionResetError("connection closed")
            data += piece
        return bytes(data)


def connect(cluster: str | None) -> LauncherClient:
    """The launcher of `cluster`, or of the only one that runs; raises UserError."""
    return LauncherClient(runtime_root() / choose_cluster(cluster))


def wait_until_down(run_dir: Path) -> None:
    """Returns when the launcher of `run_dir` has ended and removed its directory; raises UserError after a while."""
    deadline = time.monotonic() + _DOWN_SECONDS
    while (run_dir / MANIFEST_FILE).exists() or is_locked(run_dir / LOCK_FILE):
        if time.monotonic() > deadline:
            raise UserError(f'cluster "{run_dir.name}" is not down after {_DOWN_SECONDS:g} s: see {run_dir}')
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class DetachedStart:
    """What a detached launcher is started with."""

    cluster_file: Path
    name: str | None = None
    state_dir: Path | None = None
    record: bool = False
    debug: bool = False
    debuggable: tuple[str, ...] = ()
    """Single processes that debuggers may enter."""
    service_module: str | None = None
    owner_fd: int | None = None
    """The read end of a pipe whose other end an owner holds; the cluster ends with it."""
    restore: Mapping[str, Path] = field(default_factory=dict)
    """VMs that go on out of a snapshot, and its file."""

    def command(self, ready_fd: int) -> list[str]:
        """The command line of the launcher as a program of its own."""
        owner = [] if self.owner_fd is None else [f"--owner-fd={self.owner_fd}"]
        program = [sys.executable, "-P", "-m", "deploy.launcher_main"]
        return [*program, *self.arguments(), f"--ready-fd={ready_fd}", *owner]

    def arguments(self) -> list[str]:
        """Those of deploy.launcher_main, but for the ones that name open files."""
        arguments = [str(self.cluster_file.absolute())]
        arguments += ["--name", self.name] if self.name is not None else []
        arguments += ["--state", str(self.state_dir.absolute())] if self.state_dir is not None else []
        for vm, file in self.restore.items():
            arguments += ["--restore", vm, str(file.absolute())]
        arguments += ["--record"] if self.record else []
        arguments += ["--debug"] if self.debug else []
        arguments += [f"--debuggable={target}" for target in self.debuggable]
        arguments += ["--service-module", self.service_module] if self.service_module is not None else []
        return arguments


def start_detached(start: DetachedStart, server: LaunchServer | None = None) -> tuple[str, LauncherProcess]:
    """Start a launcher in a session of its own and wait for its word; returns the cluster's name and the process.

    With `server` it is a fork of that. Raises UserError with the launcher's own line when the cluster did not come up.
    """
    # Here, not above: a launched service environment and a command that only asks need nothing of this.
    from deploy.launch_outcome import Outcome
    from deploy.python_process import last_words

    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, tempfile.TemporaryFile() as errors:
        try:
            launcher = _begun(start, server, writing, errors.fileno())
        finally:
            os.close(writing)
        try:
            data = pipe.read()
        except BaseException:
            # Who breaks the start off wants no cluster.
            launcher.terminate()
            launcher.wait()
            raise
        if data:
            outcome = msgspec.msgpack.decode(data, type=Outcome)
            if outcome.cluster is not None:
                return outcome.cluster, launcher
            launcher.wait()
            raise UserError(outcome.error or "the cluster did not come up")
        status = launcher.wait()
        raise UserError(f"the launcher ended with status {status}: {last_words(errors)}")


def _begun(start: DetachedStart, server: LaunchServer | None, ready_fd: int, errors_fd: int) -> LauncherProcess:
    from deploy.launcher_process import SpawnedLauncher
    from deploy.python_process import child_environment

    environment = child_environment(os.environ)
    if server is not None:
        return server.begin(start.arguments(), environment, ready_fd, errors_fd, start.owner_fd)
    return SpawnedLauncher(
        start.command(ready_fd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors_fd,
        pass_fds=(ready_fd, *(() if start.owner_fd is None else (start.owner_fd,))),
        start_new_session=True,
        cwd="/",
        env=environment,
    )
