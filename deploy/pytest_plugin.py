"""A pytest plugin: the fixture `pefbox_cluster` starts clusters and stops them when the test ends.

    async def test_my_guest(pefbox_cluster):
        c = await pefbox_cluster("my-cluster.toml")
        await c.vm("vm1").secure()

It needs pytest-trio. Keyword arguments are those of `deploy.api.cluster`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deploy.api import RunningCluster

ClusterFactory = Callable[..., Awaitable["RunningCluster"]]


@pytest.fixture
async def pefbox_cluster() -> AsyncIterator[ClusterFactory]:
    """A factory of running clusters; all are down when the test is over."""
    # Imported by the test that uses it: pytest loads this plugin in every run, and trio is not quick to import.
    from deploy.api import cluster

    async with AsyncExitStack() as stack:

        async def start(cluster_file: Any, **options: Any) -> RunningCluster:  # noqa: ANN401
            return await stack.enter_async_context(cluster(cluster_file, **options))

        yield start
