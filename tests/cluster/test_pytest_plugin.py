"""The fixture that pefbox brings to the tests of others, as they have it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.pytest_plugin import ClusterFactory
from tests.cluster.conftest import MINIMAL
from tests.cluster.two_hosts import command_line


@pytest.fixture(autouse=True)
def own_directories(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In the place of the fixture of this folder, which decides by itself how clusters start."""
    with tempfile.TemporaryDirectory(prefix="pb-") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        yield Path(runtime)


async def test_clusters_start_warm_unless_they_are_to_start_cold(pefbox_cluster: ClusterFactory) -> None:
    first, second = await pefbox_cluster(MINIMAL), await pefbox_cluster(MINIMAL)
    cold = await pefbox_cluster(MINIMAL, server=None)

    assert {command_line(warm.launcher_pid).rstrip(b"\0") for warm in (first, second)} == {b"pefbox launcher"}
    assert b"deploy.launcher_main" in command_line(cold.launcher_pid)
    for running in (first, second, cold):
        assert (await running.status()).healthy
