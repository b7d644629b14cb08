"""Clusters to measure, through the public API; their files are made before anything is timed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from deploy import makers
from deploy.api import Process, RunningCluster, cluster
from deploy.cluster_file import read_cluster_file, resolve_state
from protocol.errors import PefboxError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT

STATE = Path("build/bench-state")
CLUSTERS = Path(__file__).parent / "clusters"
_SECONDS = 60.0
_WRITES_PER_SECOND = 10


def prepare(cluster_file: Path) -> Path:
    """Make what the cluster file asks for; its state directory."""
    state = STATE.resolve() / cluster_file.stem
    state.mkdir(parents=True, exist_ok=True)
    makers.make(resolve_state(read_cluster_file(cluster_file), state), state)
    return state


@asynccontextmanager
async def running(cluster_file: Path) -> AsyncIterator[RunningCluster]:
    """The cluster with cold processes and prepared files."""
    state = await trio.to_thread.run_sync(prepare, cluster_file)
    async with cluster(cluster_file, state_dir=state) as machine:
        yield machine


async def job(guest: Process, what: str, **arguments: int) -> Any:  # noqa: ANN401
    """A job of a bench kernel (services.guest.bench_engine); its outcome."""
    return await guest.query("bench", {"job": what, **arguments}, _SECONDS)


async def move(kvm: Process, direction: str, vm: str, gfn: int, n_pages: int) -> None:
    """kvm pages `n_pages` from `gfn` `out` or `in`; every one of them must go."""
    arguments = {"vm": vm, "gpa": gfn << PAGE_SHIFT, "n": n_pages}
    answer = await kvm.query(f"page.{direction}", arguments, _SECONDS)
    if answer["codes"] != {"H_SUCCESS": n_pages}:
        raise RuntimeError(f"page.{direction} of {n_pages} pages: {answer['codes']}")


@asynccontextmanager
async def writing(machine: RunningCluster, vm: str, gfns: range, bytes_per_second: int) -> AsyncIterator[None]:
    """The guest writes one page after the other of `gfns`, so many bytes a second, wherever it is."""
    n_pages = bytes_per_second // _WRITES_PER_SECOND // PAGE_BYTES

    async def write() -> None:
        at = 0
        started = trio.current_time()
        for number in range(1 << 30):
            try:
                with trio.move_on_after(1):
                    await job(machine.process(f"{vm}/guest"), "fill", gfn=gfns[at], n=n_pages)
            except PefboxError:
                # It is on its way.
                await trio.sleep(1 / _WRITES_PER_SECOND)
            at = (at + n_pages) % (len(gfns) - n_pages)
            await trio.sleep_until(started + number / _WRITES_PER_SECOND)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        yield
        nursery.cancel_scope.cancel()
