"""What the processes of a cluster are doing: their status with the counters of every link, asked in parallel."""

from __future__ import annotations

import time

import msgspec
import trio

from deploy.child import Child
from deploy.cluster_run import ClusterRun
from deploy.status import ClusterStatus, arriving_name, ask, gather_status


class LinkActivity(msgspec.Struct, kw_only=True):
    """One end of a link (services.runtime.link.Link.statistics); counts since the process began."""

    peer: str
    calls: int
    open_calls: int
    serving: int
    queued: int
    refused: int


class ClusterActivity(msgspec.Struct, kw_only=True):
    """At `monotonic_ns`; `links` are those of each process that answered, by its name in the status and link id."""

    monotonic_ns: int
    status: ClusterStatus
    links: dict[str, dict[str, LinkActivity]]


async def gather_activity(run: ClusterRun) -> ClusterActivity:
    """Ask every process, bounded; one that does not answer is left out."""
    links: dict[str, dict[str, LinkActivity]] = {}

    async def one(name: str, child: Child) -> None:
        answer = await ask(child, "statistics", {})
        try:
            links[name] = msgspec.convert(answer, dict[str, LinkActivity])
        except msgspec.ValidationError:
            return

    status: list[ClusterStatus] = []

    async def whole() -> None:
        status.append(await gather_status(run))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(whole)
        for child in run.children.values():
            nursery.start_soon(one, child.target, child)
        for child in run.incoming.values():
            nursery.start_soon(one, arriving_name(child), child)
    return ClusterActivity(monotonic_ns=time.monotonic_ns(), status=status[0], links=links)
