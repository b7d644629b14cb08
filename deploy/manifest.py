"""What a cluster made on this machine, written down before it is used.

`pefbox clean` removes exactly what the manifest of a killed cluster names, and nothing else. A process counts as
ours only when its start time is the recorded one: pids are used again, start times are not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import msgspec

from deploy.memory_segments import unlink_segment
from deploy.run_dirs import LOCK_FILE, MANIFEST_FILE, Lock, is_locked
from protocol.errors import HostFault

VERSION = 1
_KILL_WAIT_SECONDS = 2.0


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process that was started. `start_ticks` is field 22 of /proc/PID/stat (proc(5))."""

    target: str
    pid: int
    start_ticks: int


class ManifestData(msgspec.Struct):
    """The content of manifest.json."""

    version: int
    cluster: str
    run_dir: str
    state_dir: str
    created_s: float
    launcher: ProcessRecord
    segments: list[str]
    processes: list[ProcessRecord]
    files: list[str] = []
    """Unfinished ones, outside the run directory."""


class Manifest:
    """The manifest of a running cluster. What is noted is on disk before the call returns, or HostFault is raised.

    What is forgotten may stay there while the disk is full: to look for what is gone does no harm.
    """

    def __init__(self, path: Path, data: ManifestData) -> None:
        self._path = path
        self.data = data
        self._write()

    def add_segment(self, name: str) -> None:
        """Note a RAM segment that will be made."""
        self.data.segments.append(name)
        self._write()

    def drop_segment(self, name: str) -> None:
        """Forget a RAM segment that is gone."""
        self.data.segments.remove(name)
        self._forget()

    def add_file(self, path: str) -> None:
        """Note a file that will be made, and has no use unless it is finished."""
        self.data.files.append(path)
        self._write()

    def drop_file(self, path: str) -> None:
        """Forget one that is finished, or gone."""
        self.data.files.remove(path)
        self._forget()

    def add_process(self, target: str, pid: int) -> None:
        """Note a process that was just started."""
        self.data.processes.append(ProcessRecord(target, pid, start_ticks(pid) or 0))
        self._write()

    def drop_process(self, pid: int) -> None:
        """Forget a process that is gone."""
        self.data.processes = [process for process in self.data.processes if process.pid != pid]
        self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(HostFault):
            self._write()

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(self.data)))
            new.replace(self._path)
        except OSError as error:
            raise HostFault(f"{self._path}: cannot write: {error.strerror}") from None


def new_manifest(path: Path, cluster: str, state_dir: Path) -> Manifest:
    """The manifest of the cluster that this process launches."""
    pid = os.getpid()
    launcher = ProcessRecord("launcher", pid, start_ticks(pid) or 0)
    data = ManifestData(VERSION, cluster, str(path.parent), str(state_dir), time.time(), launcher, [], [])
    return Manifest(path, data)


def read_manifest(path: Path) -> ManifestData | None:
    """The manifest at `path`; None when there is none that this version understands."""
    try:
        data = msgspec.json.decode(path.read_bytes(), type=ManifestData)
    except (OSError, msgspec.MsgspecError):
        return None
    return data if data.version == VERSION and data.run_dir == str(path.parent) else None


def start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name in parentheses may itself hold spaces and parentheses.
    return int(text.rpartition(")")[2].split()[19])


def is_alive(process: ProcessRecord) -> bool:
    """Whether exactly this process still exists."""
    return start_ticks(process.pid) == process.start_ticks


def clean_run_dir(run_dir: Path) -> list[str] | None:
    """Remove what a killed cluster left; returns what was removed.

    None, and nothing touched, when the cluster runs, or has things but no manifest that is understood.
    """
    if is_locked(run_dir / LOCK_FILE):
        return None
    if all(entry.name == LOCK_FILE for entry in run_dir.iterdir()):
        # It was killed before it made anything.
        shutil.rmtree(run_dir)
        return [f"run directory {run_dir}"]
    data = read_manifest(run_dir / MANIFEST_FILE)
    if data is None:
        return None
    lock = Lock(run_dir / LOCK_FILE, f"{run_dir.name} is being cleaned by somebody else")
    try:
        removed = _kill(data.processes)
        removed += [f"segment {name}" for name in data.segments if unlink_segment(name)]
        removed += [f"unfinished {path}" for path in data.files if _unlink(path)]
        shutil.rmtree(run_dir)
    finally:
        lock.release()
    return [*removed, f"run directory {run_dir}"]


def _kill(processes: list[ProcessRecord]) -> list[str]:
    alive = [process for process in processes if is_alive(process)]
    for process in alive:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + _KILL_WAIT_SECONDS
    while any(is_alive(process) and not _is_zombie(process.pid) for process in alive):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return [f"process {process.target} ({process.pid})" for process in alive]


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
