"""L1: when a cluster is down, by order or because its launcher was killed, nothing of it stays on the machine."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, processes_of
from deploy.memory_segments import SHM_DIR
from deploy.run_dirs import runtime_root
from protocol.errors import UserError
from protocol.template import FAMILIES
from tests.cluster.conftest import MINIMAL
from tests.cluster.two_hosts import (
    children_of,
    cluster_text,
    is_alive,
    members_of,
    pids,
    process_state,
    running_hosts,
    templates_of,
    until,
)

pytestmark = pytest.mark.cold
CHECKOUT = Path(__file__).parents[2]
DEATH_SECONDS = 2.0
OWNER_GONE_SECONDS = 10.0
ONE_HOST = cluster_text({"alpha": "vm1"})
OWNED = "owned"
OWNER = f"""
import sys
from pathlib import Path
import trio
from deploy.api import cluster

async def main():
    async with cluster(sys.argv[1], name="{OWNED}", state_dir=Path(sys.argv[2])) as running:
        # In one write: with PYTHONUNBUFFERED `print` makes two, and the reader may be gone before the second.
        sys.stdout.write(f"{{running.launcher_pid}}\\n")
        sys.stdout.flush()
        await trio.sleep_forever()

trio.run(main)
"""


@dataclass(frozen=True)
class Traces:
    """What a cluster has on the machine."""

    processes: frozenset[int]
    segments: frozenset[str]
    sockets: frozenset[str]
    run_dir: Path

    @property
    def left(self) -> list[str]:
        """What of it is there now."""
        found = [f"process {pid}" for pid in self.processes if is_alive(pid)]
        found += [f"segment {name}" for name in segments_of(self.run_dir.name)]
        found += [f"socket {path}" for path in sockets_below(self.run_dir)]
        return found + ([f"directory {self.run_dir}"] if self.run_dir.exists() else [])


async def traces_of(running: RunningCluster) -> Traces:
    """Everything of a running cluster; each kind is there, so that its absence later means something."""
    run_dir = running.paths.run_dir
    processes = children_of(running.launcher_pid)
    assert members_of(running.launcher_pid) == set((await pids(running)).values())
    assert len(templates_of(running.launcher_pid)) == len(FAMILIES)
    traces = Traces(
        frozenset({*processes, running.launcher_pid}), segments_of(running.name), sockets_below(run_dir), run_dir
    )
    assert traces.segments
    assert traces.sockets
    assert run_dir.is_dir()
    return traces


def segments_of(cluster: str) -> frozenset[str]:
    """Its RAM segments."""
    return frozenset(name for name in os.listdir(SHM_DIR) if name.startswith(f"pefbox-{cluster}-"))


def sockets_below(directory: Path) -> frozenset[str]:
    """Unix sockets bound below a directory, whether or not their file is still there (proc(5), net/unix)."""
    fields = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    paths = {parts[7] for parts in fields if len(parts) > 7}
    return frozenset(path for path in paths if Path(path).is_relative_to(directory))


async def check_untouched(running: RunningCluster, traces: Traces) -> None:
    """It has all that it had, and works."""
    assert await traces_of(running) == traces
    assert {row.state for row in processes_of(await running.status())} == {"running"}
    vm = running.vm("vm1")
    assert (await vm.row()).secure
    assert "ok free=" in await vm.console_command("pages")


async def clean() -> str:
    """What `pefbox clean` printed."""
    command = [sys.executable, "-m", "deploy.cli", "clean"]
    done = await trio.run_process(command, cwd=CHECKOUT, capture_stdout=True, capture_stderr=True)
    return (done.stdout + done.stderr).decode()


async def test_down_leaves_nothing_and_a_second_cluster_alone(tmp_path: Path) -> None:
    async with (
        running_hosts(tmp_path / "a") as going,
        running_hosts(tmp_path / "b", ONE_HOST) as staying,
    ):
        traces, others = await traces_of(going), await traces_of(staying)

        assert await going.down() == 0

        assert traces.left == []
        await check_untouched(staying, others)
    assert others.left == []


async def test_down_ends_stopped_and_half_dead_clusters(tmp_path: Path) -> None:
    async with running_hosts(tmp_path) as running:
        traces = await traces_of(running)
        for target in ("alpha/ultravisor", "vm2/qemu"):
            await running.process(target).stop()
            await running.process(target).wait_state("stopped")
        await running.process("beta/kvm").kill()
        await running.process("beta/kvm").wait_state("failed")

        assert await running.down() == 0

        assert traces.left == []


async def test_a_program_that_is_killed_leaves_no_cluster_of_its_own(tmp_path: Path) -> None:
    """The owner of a cluster gets no chance to stop it; its launcher sees that by itself."""
    owner = await trio.lowlevel.open_process(
        [sys.executable, "-c", OWNER, str(MINIMAL), str(tmp_path / "own-state")], cwd=CHECKOUT, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    async with owner.stdout:
        launcher = int(await owner.stdout.receive_some())
    run_dir = runtime_root() / OWNED
    processes = frozenset({launcher, *children_of(launcher)})
    traces = Traces(processes, segments_of(OWNED), sockets_below(run_dir), run_dir)
    assert len(processes) > 1
    assert traces.segments

    owner.kill()
    await owner.wait()

    await until(lambda: not traces.left, "nothing is left", OWNER_GONE_SECONDS)
    log = (tmp_path / "own-state" / "log" / "launcher.log").read_text()
    assert "the program that started this cluster is gone" in log


async def test_killed_launcher_takes_all_with_it_and_clean_removes_the_rest(tmp_path: Path) -> None:
    async with (
        running_hosts(tmp_path / "a") as going,
        running_hosts(tmp_path / "b", ONE_HOST) as staying,
    ):
        traces, others = await traces_of(going), await traces_of(staying)
        stopped = (await pids(going))["alpha/kvm"]
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: process_state(stopped) == "T", "alpha/kvm is stopped")

        going.kill_launcher()

        await going.wait_launcher()
        try:
            with pytest.raises(UserError, match="its launcher cannot be reached"):
                await going.status()
            await until(lambda: not any(map(is_alive, traces.processes)), "every process is dead", DEATH_SECONDS)
            assert sockets_below(traces.run_dir) == frozenset()
            assert {f"segment {name}" for name in traces.segments} < set(traces.left)
        finally:
            said = await clean()

        assert all(name in said for name in (*traces.segments, str(traces.run_dir)))
        assert traces.left == []
        await check_untouched(staying, others)


async def test_cluster_of_a_killed_launcher_starts_again_without_clean(tmp_path: Path) -> None:
    name = f"api-{secrets.token_hex(3)}"
    async with running_hosts(tmp_path / "a", ONE_HOST, name=name) as running:
        traces = await traces_of(running)
        running.kill_launcher()
        await running.wait_launcher()

    async with running_hosts(tmp_path / "a", ONE_HOST, name=name) as running:
        again = await traces_of(running)
        assert not again.segments & traces.segments
        assert not again.processes & traces.processes
        assert segments_of(name) == again.segments
    assert again.left == []
