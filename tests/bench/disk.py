"""`blk_read`: a secure VM reads its disk in order, through swiotlb, 256 KiB a request, 8 deep."""

from __future__ import annotations

import functools

import trio

from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.floors.disk_floor import read_seconds
from tests.bench.machine import CLUSTERS, STATE, job, running

N_BYTES = 64 << 20
READ_LIMIT = 0.15
_NS_PER_SECOND = 1e9
_MIB = 1 << 20


async def measure(n_rounds: int) -> list[Figure]:
    """Guest and floor in turn over the same bytes of the same file, which both find in the page cache."""
    runs = []
    async with running(CLUSTERS / "disk.toml") as machine:
        await machine.vm("svm").secure()
        guest = machine.process("svm/guest")
        await machine.vm("svm").console_command("pages")
        floor = functools.partial(read_seconds, STATE.resolve() / "disk" / "svm.img", N_BYTES)
        await trio.to_thread.run_sync(floor)
        for _ in range(n_rounds):
            floor_seconds = await trio.to_thread.run_sync(floor)
            outcome = await job(guest, "read", n=N_BYTES)
            if outcome["error"]:
                raise RuntimeError(f"the disk read ended with {outcome['error']}")
            seconds = outcome["ns"] / _NS_PER_SECOND
            runs.append(Round(N_BYTES / _MIB / seconds, N_BYTES / _MIB / floor_seconds))
    return [Figure("blk_read", "MiB/s", runs, Budget(Kind.RATIO_AT_LEAST, READ_LIMIT))]
