"""Where clusters live on this machine: run directories, state directories, and which clusters run.

A run directory holds sockets and the manifest and is gone after `down`; a state directory holds machine keys, audit
log, log and trace files and stays. A cluster that runs holds a lock on a file in each, so no pid is ever guessed at.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import UserError

LOCK_FILE = "lock"
MANIFEST_FILE = "manifest.json"
LAUNCHER_SOCKET = "launcher.sock"
TOKEN_FILE = "token"
LAUNCHER_LOG = "launcher.log"
TRACE_SUFFIX = ".trace"
_RECORD_LOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Paths:
    """The directories of one cluster."""

    run_dir: Path
    state_dir: Path

    @property
    def manifest(self) -> Path:
        """What this cluster made on the machine."""
        return self.run_dir / MANIFEST_FILE

    @property
    def lock_file(self) -> Path:
        """Locked as long as the cluster runs."""
        return self.run_dir / LOCK_FILE

    @property
    def launcher_socket(self) -> Path:
        """Where the operator's commands reach the launcher."""
        return self.run_dir / LAUNCHER_SOCKET

    @property
    def token_file(self) -> Path:
        """What a client of the launcher shows to prove that it can read this directory."""
        return self.run_dir / TOKEN_FILE

    @property
    def launcher_log(self) -> Path:
        """The launcher's own log."""
        return self.log_dir / LAUNCHER_LOG

    @property
    def log_dir(self) -> Path:
        """What the processes log, and write to standard error."""
        return self.state_dir / "log"

    def process_dir(self, place: str) -> Path:
        """The run directory of one process, by its place; the links it binds lie below."""
        return self.run_dir / file_stem(place)

    def log_file(self, target: str) -> Path:
        """The JSON lines of one process."""
        return self.log_dir / f"{file_stem(target)}.log"

    def stderr_file(self, place: str) -> Path:
        """What one process wrote to standard error, by its place."""
        return self.log_dir / f"{file_stem(place)}.stderr"

    @property
    def trace_dir(self) -> Path:
        """The trace files of all processes."""
        return self.state_dir / "trace"

    def trace_file(self, place: str) -> Path:
        """What one process recorded (protocol.trace), by its place: that of a VM that arrives is another."""
        return self.trace_dir / f"{file_stem(place)}{TRACE_SUFFIX}"

    def host_state_dir(self, host: str) -> Path:
        """Machine key and audit log of one host."""
        return self.state_dir / host

    def audit_log(self, host: str) -> Path:
        """The ultravisor's audit log of one host."""
        return self.host_state_dir(host) / "audit.jsonl"

    def ledger(self, host: str) -> Path:
        """What the ultravisor of one host decided of migrations."""
        return self.host_state_dir(host) / "migrations.jsonl"


def file_stem(target: str) -> str:
    """`alpha/kvm` as a file name."""
    return target.replace("/", ".")


def runtime_root(environment: Mapping[str, str] = os.environ) -> Path:
    """The directory of all run directories of this user."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pefbox" if runtime else Path(f"/tmp/pefbox-{os.getuid()}")


def state_root(environment: Mapping[str, str] = os.environ) -> Path:
    """The directory of all default state directories of this user."""
    state = environment.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "pefbox"


def default_paths(cluster: str, state_dir: Path | None = None) -> Paths:
    """The directories of `cluster`; `state_dir` replaces the default one."""
    state = state_dir.absolute() if state_dir is not None else state_root() / cluster
    return Paths(runtime_root() / cluster, state)


def make_private_dir(path: Path) -> None:
    """Make `path`, for this user only; raises UserError when it belongs to somebody else or is open to others."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or path.is_symlink():
        raise UserError(f"{path} does not belong to this user alone: remove it, or set XDG_RUNTIME_DIR")


class Lock:
    """An exclusive lock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path, taken: str) -> None:
        """Take it; raises UserError with text `taken` when somebody else holds it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _record_lock())
        except BlockingIOError:
            os.close(self._fd)
            raise UserError(taken) from None

    def release(self) -> None:
        """Let others have it."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Locks:
    """What a cluster that runs holds."""

    state: Lock
    run: Lock


@contextmanager
def in_turn(root: Path) -> Iterator[None]:
    """One after the other, among all who take or remove run directories below `root`."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a live process holds the lock at `path`; it is not taken to find out, for somebody may just take it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _record_lock())
    finally:
        os.close(fd)
    return bool(_RECORD_LOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _record_lock() -> bytes:
    """A struct flock of fcntl(2) for an exclusive lock on the whole file."""
    return _RECORD_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def run_dirs(root: Path | None = None) -> list[Path]:
    """Every run directory of this user, running or left over."""
    root = root if root is not None else runtime_root()
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())


def running_clusters(root: Path | None = None) -> list[str]:
    """The names of the clusters that run now."""
    return [path.name for path in run_dirs(root) if is_locked(path / LOCK_FILE)]


def left_over_clusters(root: Path | None = None) -> list[str]:
    """The names of the clusters that were killed and not cleaned up since."""
    root = root if root is not None else runtime_root()
    if not root.is_dir():
        return []
    with in_turn(root):
        # Not one that is just taking its directory, or giving it up.
        return [path.name for path in run_dirs(root) if not is_locked(path / LOCK_FILE)]


def choose_cluster(name: str | None) -> str:
    """The cluster a command means: `name`, or the only running one; raises UserError otherwise."""
    running = running_clusters()
    if name is not None:
        if name in running:
            return name
        raise UserError(f'no cluster "{name}" runs{_listed(running)}{killed_note()}')
    if len(running) == 1:
        return running[0]
    if not running:
        raise UserError(f"no cluster runs{killed_note()}; start one with: pefbox up CLUSTER.toml")
    raise UserError(f"several clusters run, say which with --cluster: {', '.join(running)}")


def killed_note() -> str:
    """What was left by clusters that were killed, as the end of a line; nothing when nothing was."""
    left = left_over_clusters()
    return f"; killed, with things left behind (pefbox clean): {', '.join(left)}" if left else ""


def _listed(running: list[str]) -> str:
    return f"; running: {', '.join(running)}" if running else ""
