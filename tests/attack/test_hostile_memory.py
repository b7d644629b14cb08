"""Normal RAM that its holders spoil: a truncated segment and a full /dev/shm are error codes and audit lines (S5).

A full /dev/shm is a real one: the cluster runs in a mount namespace of its own with a small tmpfs there.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio

from deploy.api import RunningCluster
from deploy.client import DetachedStart
from deploy.launch_outcome import Outcome
from deploy.launcher_process import SpawnedLauncher
from deploy.memory_segments import SHM_DIR
from deploy.python_process import child_environment
from deploy.run_dirs import Paths, runtime_root
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from services.ultravisor.audit import audit_path, read_lines
from tests.cluster.conftest import own_directories
from tests.cluster.two_hosts import MEMORY_BYTES, N_PAGES, at_prompt, cluster_text, running_hosts, until, vm_text

__all__ = ["own_directories"]

pytestmark = pytest.mark.cold

FREE_GFN = 900
"""A page that the model kernel does not use at its prompt."""
NAME = "api-small-shm"
SMALL_SHM_BYTES = MEMORY_BYTES + (8 << 20)
NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
MOUNT = "mount -t tmpfs -o size={bytes} tmpfs /dev/shm"
START = MOUNT + ' && {{ sleep 600 & echo $! > {pid_file}; exec "$@"; }}'


async def move(running: RunningCluster, vm: str, direction: str, gfn: int, n_pages: int) -> dict[str, int]:
    """Have kvm page out or in; how often each code came."""
    arguments = {"vm": vm, "gpa": gfn * PAGE_BYTES, "n": n_pages}
    answer = await running.process("alpha/kvm").query(f"page.{direction}", arguments, 10.0)
    codes: dict[str, int] = answer["codes"]
    return codes


def memory_faults(running: RunningCluster, vm: str) -> list[str]:
    """The reasons of the audit lines about a VM's normal memory."""
    with audit_path(running.paths.state_dir, "alpha").open("rb") as log:
        lines = list(read_lines(log))
    return [str(line.facts["reason"]) for line in lines if (line.vm, line.event) == (vm, "normal-memory-fault")]


async def check_alive(running: RunningCluster, vm: str) -> None:
    """The ultravisor serves: nothing ended, and pages of `vm` go out and come in."""
    assert (await running.process("alpha/ultravisor").row()).state == "running"
    for direction in ("out", "in"):
        assert await move(running, vm, direction, FREE_GFN, 4) == {"H_SUCCESS": 4}
    row = await running.vm(vm).row()
    assert (row.state, row.secure) == ("running", True)
    assert "ok free=" in await running.vm(vm).console_command("pages")


# -- a truncated segment --------------------------------------------------------------------------------------------


async def test_truncated_segment_is_an_error_and_not_the_end_of_the_ultravisor(tmp_path: Path) -> None:
    text = cluster_text({"alpha": "vm1"}, vm_text("vm3", "alpha"))
    async with running_hosts(tmp_path, text) as running:
        assert await move(running, "vm1", "out", FREE_GFN, 4) == {"H_SUCCESS": 4}
        (segment,) = SHM_DIR.glob(f"pefbox-{running.name}-vm1-*")

        os.truncate(segment, 0)

        assert await move(running, "vm1", "out", FREE_GFN + 4, 4) == {"H_BUSY": 4}
        assert await move(running, "vm1", "in", FREE_GFN, 4) == {"H_PARAMETER": 4}
        answer = await running.vm("vm1").console_command(f"share {FREE_GFN + 8}")
        assert answer.strip() == "error U_PARAMETER"
        assert os.stat(segment).st_size == 0
        assert memory_faults(running, "vm1") == ["normal memory was truncated"]
        assert memory_faults(running, "vm3") == []
        await check_alive(running, "vm3")


# -- a full /dev/shm ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallShm:
    """A running cluster whose /dev/shm is small; `directory` is that of its namespace, seen from here."""

    running: RunningCluster
    directory: Path

    @contextmanager
    def filled(self) -> Iterator[None]:
        """No byte is free there while the block runs."""
        filler = self.directory / "filler"
        free_bytes = os.statvfs(self.directory).f_bavail * os.statvfs(self.directory).f_frsize
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes)
        try:
            assert os.statvfs(self.directory).f_bavail == 0
            yield
        finally:
            filler.unlink()


@asynccontextmanager
async def small_shm(directory: Path, text: str, shm_bytes: int) -> AsyncIterator[SmallShm]:
    """A cluster in a mount namespace with a tmpfs of `shm_bytes` on /dev/shm; raises UserError when it fails."""
    start = DetachedStart(directory / "cluster.toml", name=NAME, state_dir=directory / "own-state")
    pid_file = directory / "holder"
    _write(start.cluster_file, text)
    paths = Paths(runtime_root() / NAME, directory / "own-state")
    launcher, outcome = await trio.to_thread.run_sync(_launch, start, START.format(bytes=shm_bytes, pid_file=pid_file))
    holder = int(_read(pid_file))
    try:
        if outcome.cluster is None:
            raise UserError(outcome.error or "the cluster did not come up")
        running = RunningCluster(NAME, paths, launcher)
        try:
            yield SmallShm(running, Path(f"/proc/{holder}/root/dev/shm"))
        finally:
            with trio.CancelScope(shield=True):
                await running.down()
    finally:
        os.kill(holder, signal.SIGKILL)
        launcher.wait()


def _launch(start: DetachedStart, script: str) -> tuple[SpawnedLauncher, Outcome]:
    """The launcher in its namespace, and its first word."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        launcher = SpawnedLauncher(
            [*NAMESPACE, "sh", "-c", script, "sh", *start.command(writing)],
            pass_fds=(writing,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env=child_environment(os.environ),
        )
        os.close(writing)
        return launcher, _first_word(pipe.fileno(), launcher)


def _first_word(fd: int, launcher: SpawnedLauncher) -> Outcome:
    # The process that holds the namespace has the pipe too, so its end is no sign.
    while not select.select([fd], [], [], 0.1)[0]:
        if launcher.poll() is not None:
            return Outcome(error=f"the launcher ended with status {launcher.returncode}")
    return msgspec.msgpack.decode(os.read(fd, 1 << 16), type=Outcome)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _read(path: Path) -> str:
    return path.read_text()


def _has_namespaces() -> bool:
    tried = subprocess.run(
        [*NAMESPACE, "sh", "-c", MOUNT.format(bytes=1 << 20)], capture_output=True, check=False, timeout=10
    )
    return tried.returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _has_namespaces(), reason="unshare --mount is refused here: no small /dev/shm can be made"
)


@needs_namespaces
async def test_full_shm_is_an_error_and_not_the_end_of_the_ultravisor(tmp_path: Path) -> None:
    async with small_shm(tmp_path, cluster_text({"alpha": "vm1"}), SMALL_SHM_BYTES) as small:
        running, vm = small.running, small.running.vm("vm1")
        await vm.secure()
        await at_prompt(vm)
        before = (await vm.console_command(f"sum {FREE_GFN}")).strip()

        with small.filled():
            codes = await move(running, "vm1", "out", 0, N_PAGES)

            assert codes["H_BUSY"] > N_PAGES // 2
            assert (await vm.console_command(f"sum {FREE_GFN}")).strip() == before
        assert memory_faults(running, "vm1") == ["cannot write normal memory: No space left on device"]
        await check_alive(running, "vm1")
        assert (await vm.console_command(f"sum {FREE_GFN}")).strip() == before


@needs_namespaces
async def test_cluster_that_does_not_fit_into_shm_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/shm has 32 MiB free"):
        async with small_shm(tmp_path, cluster_text({"alpha": "vm1"}), 32 << 20):
            pass

    await until(lambda: not (runtime_root() / NAME).exists(), "the run directory is gone")
