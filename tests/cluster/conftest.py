"""Fixtures of the tests that start real processes: own run and state directories, nothing left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.api import RunningCluster, cluster
from deploy.client import DetachedStart, start_detached
from deploy.launch_server import LaunchServer
from deploy.launcher_process import LauncherProcess
from services.testing.host import RealHost, real_host
from services.ultravisor.identity import ensure_keys

CLUSTERS = Path(__file__).parents[2] / "deploy" / "clusters"
MINIMAL = CLUSTERS / "minimal.toml"
FAKE_SERVICE = "fake_service"


@pytest.fixture(autouse=True)
def own_directories(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Path]:
    """Run and state directories of this test alone; afterwards no RAM segment of it may exist.

    The clusters of the Python API start warm, where the mark `cold` does not say that the test is about processes as
    `pefbox up` starts them.
    """
    started: list[str] = []
    is_cold = request.node.get_closest_marker("cold") is not None
    shared = None if is_cold else request.getfixturevalue("pefbox_launch_server")

    def start_and_note(start: DetachedStart, server: LaunchServer | None) -> tuple[str, LauncherProcess]:
        name, launcher = start_detached(start, server or shared)
        started.append(name)
        return name, launcher

    monkeypatch.setattr("deploy.api.start_detached", start_and_note)
    # pytest's own temporary path is too long for Unix sockets.
    with tempfile.TemporaryDirectory(prefix="pb-") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield Path(runtime)
    prefixes = tuple(f"pefbox-{name}-" for name in started)
    assert [name for name in os.listdir("/dev/shm") if name.startswith(prefixes)] == []


@pytest.fixture
async def fake_cluster(tmp_path: Path) -> AsyncIterator[RunningCluster]:
    """The minimal cluster with processes that speak nothing but the control protocol."""
    async with cluster(MINIMAL, service_module=FAKE_SERVICE, state_dir=tmp_path / "own-state") as running:
        yield running


@pytest.fixture
async def minimal_cluster(tmp_path: Path) -> AsyncIterator[RunningCluster]:
    """The minimal cluster with the real services."""
    async with cluster(MINIMAL, state_dir=tmp_path / "own-state") as running:
        yield running


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RealHost]:
    """A real ultravisor and kvm, whose VMs are played."""
    with tempfile.TemporaryDirectory(prefix="pb-") as directory:
        async with real_host(Path(directory), ensure_keys(tmp_path, "alpha")) as running:
            yield running
            for process in (running.ultravisor, running.kvm):
                assert '"internal error"' not in running.log_text(process)
