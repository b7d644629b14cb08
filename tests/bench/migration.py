"""`migrate_secure`, `migrate_normal` and `migrate_downtime`: VMs of 256 MiB, most of it random, between two hosts.

A rate is the content of all pages that are not zero by the time from the order to the end, the launcher's work to make
the destination's processes, and what memory is made meanwhile, left out. The floor copies as many bytes through a
socket to another process.
"""

from __future__ import annotations

from typing import Any

import trio

from deploy.api import RunningCluster
from protocol.geometry import PAGE_BYTES
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.floors.program import FloorProgram
from tests.bench.machine import CLUSTERS, job, running, writing

FILLED_GFN, N_FILLED = 0x780, 2048
"""Behind kernel, initial RAM disk and swiotlb pool: 128 MiB that the kernel does not use."""
SECURE_LIMIT, NORMAL_LIMIT, DOWNTIME_LIMIT_MS = 0.25, 0.40, 300.0
DIRTY_BYTES_PER_SECOND = 20_000_000
_FLOOR_MIB = N_FILLED * PAGE_BYTES >> 20
_MIB = 1 << 20
_MS = 1000.0
_NS = 1e9
_HOSTS = ("beta", "alpha")


async def measure(n_rounds: int) -> list[Figure]:
    """Move each VM back and forth and run its floor, in turn; then with a guest that writes without end."""
    rates: dict[str, list[Round]] = {"svm": [], "vm": []}
    downtimes: list[Round] = []
    with (
        FloorProgram("stream_floor", str(_FLOOR_MIB), "sealed") as sealed,
        FloorProgram("stream_floor", str(_FLOOR_MIB), "plain") as plain,
    ):
        floors = {"svm": sealed, "vm": plain}
        async with running(CLUSTERS / "migration.toml") as machine:
            await machine.vm("svm").secure()
            for vm in rates:
                await job(machine.process(f"{vm}/guest"), "fill", gfn=FILLED_GFN, n=N_FILLED)
            for number in range(n_rounds):
                host = _HOSTS[number % 2]
                for vm, rounds in rates.items():
                    (floor_ns,) = await trio.to_thread.run_sync(floors[vm].times_ns, 1)
                    rounds.append(Round(await _rate(machine, vm, host), _FLOOR_MIB / (floor_ns / _NS)))
            for number in range(n_rounds):
                host = _HOSTS[(n_rounds + number) % 2]
                downtimes.append(Round(await _downtime_ms(machine, host)))
    return [
        Figure("migrate_secure", "MiB/s", rates["svm"], Budget(Kind.RATIO_AT_LEAST, SECURE_LIMIT)),
        Figure("migrate_normal", "MiB/s", rates["vm"], Budget(Kind.RATIO_AT_LEAST, NORMAL_LIMIT)),
        Figure("migrate_downtime", "ms", downtimes, Budget(Kind.VALUE_AT_MOST, DOWNTIME_LIMIT_MS)),
    ]


async def _move(machine: RunningCluster, vm: str, host: str) -> dict[str, Any]:
    facts = await machine.vm(vm).migrate(host, bandwidth=0)
    progress: dict[str, Any] = facts["progress"]
    return progress


async def _rate(machine: RunningCluster, vm: str, host: str) -> float:
    progress = await _move(machine, vm, host)
    moved_mib = int(progress["data_pages"]) * PAGE_BYTES / _MIB
    return moved_mib / (int(progress["total_time_ms"]) / _MS)


async def _downtime_ms(machine: RunningCluster, host: str) -> float:
    """Of the secure VM, whose guest writes all the while."""
    gfns = range(FILLED_GFN, FILLED_GFN + N_FILLED)
    async with writing(machine, "svm", gfns, DIRTY_BYTES_PER_SECOND):
        progress = await _move(machine, "svm", host)
    return float(progress["downtime_ms"])
