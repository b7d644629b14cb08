"""A pytest plugin: the fixture `pefbox_cluster` starts clusters and stops them when the test ends.

    async def test_my_guest(pefbox_cluster):
        c = await pefbox_cluster("my-cluster.toml")
        await c.vm("vm1").secure()

It needs pytest-trio. Keyword arguments are those of `deploy.api.cluster`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deploy.api import RunningCluster
    from deploy.launch_server import LaunchServer

ClusterFactory = Callable[..., Awaitable["RunningCluster"]]


@pytest.fixture(scope="session")
def pefbox_launch_server() -> Iterator[LaunchServer]:
    """What the clusters of this session are forked from (deploy.launch_server); started when it is first used."""
    from deploy.launch_server import LaunchServer

    with LaunchServer() as server:
        yield server


@pytest.fixture
async def pefbox_cluster(request: pytest.FixtureRequest) -> AsyncIterator[ClusterFactory]:
    """A factory of running clusters, which start warm but with `server=None`; all are down when the test is over."""
    # Imported by the test that uses it: pytest loads this plugin in every run, and trio is not quick to import.
    from deploy.api import cluster

    async with AsyncExitStack() as stack:

        async def start(cluster_file: Any, **options: Any) -> RunningCluster:  # noqa: ANN401
            if "server" not in options:
                options["server"] = request.getfixturevalue("pefbox_launch_server")
            return await stack.enter_async_context(cluster(cluster_file, **options))

        yield start
