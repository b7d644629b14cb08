"""`up_two_hosts` and `idle_rss`: the cluster of the demo, from nothing to secure, and what it takes when idle."""

from __future__ import annotations

import time
from pathlib import Path

import trio

from deploy.api import cluster, processes_of
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.machine import prepare, running

TWO_HOSTS = Path("deploy/clusters/two-hosts.toml")
UP_LIMIT_SECONDS = 6.0
RSS_LIMIT_MIB = 80.0
IDLE_SECONDS = 10.0
_VMS = ("vm1", "vm2")
_ROLES = ("/kvm", "/ultravisor")
_KIB_PER_MIB = 1024


async def measure_up(n_rounds: int) -> list[Figure]:
    """From the start of `up` until both guests are secure; disks, images and blobs exist."""
    runs = []
    state = await trio.to_thread.run_sync(prepare, TWO_HOSTS)
    for _ in range(n_rounds):
        started = time.perf_counter()
        async with cluster(TWO_HOSTS, state_dir=state) as machine:
            for name in _VMS:
                await machine.vm(name).secure()
            runs.append(Round(time.perf_counter() - started))
    return [Figure("up_two_hosts", "s", runs, Budget(Kind.VALUE_AT_MOST, UP_LIMIT_SECONDS))]


async def measure_rss(_n_rounds: int) -> list[Figure]:
    """The largest kvm or ultravisor, each idle for IDLE_SECONDS after its VM turned secure. One run a process."""
    async with running(TWO_HOSTS) as machine:
        for name in _VMS:
            await machine.vm(name).secure()
        await trio.sleep(IDLE_SECONDS)
        rows = [row for row in processes_of(await machine.status()) if row.target.endswith(_ROLES)]
        sizes = [Round(resident_mib(row.pid)) for row in rows if row.pid is not None]
    largest = max(sizes, key=lambda size: size.value)
    return [Figure("idle_rss", "MiB", [largest], Budget(Kind.VALUE_AT_MOST, RSS_LIMIT_MIB))]


def resident_mib(pid: int) -> float:
    """RssAnon and RssFile: what the process itself takes, without the guests' memory that it maps."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) / _KIB_PER_MIB
