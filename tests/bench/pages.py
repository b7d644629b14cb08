"""`page_move` and `page_fault_in`: secure pages of a running VM, out to normal memory and in again."""

from __future__ import annotations

import statistics
import time

import trio

from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.floors.page_floor import PageFloor
from tests.bench.machine import CLUSTERS, job, move, running

N_PAGES = 4096
FIRST_GFN = 0x780
"""Behind kernel, initial RAM disk and swiotlb pool, and below the device tree: pages that the kernel does not use."""
N_FAULTS = 64
MOVE_LIMIT = 0.20
_NS_PER_US = 1000


async def measure(n_rounds: int) -> list[Figure]:
    """Move all pages and run the floor, in turn; then let the guest fault a few in, each round."""
    moves: list[Round] = []
    faults: list[Round] = []
    floor = await trio.to_thread.run_sync(PageFloor, N_PAGES)
    async with running(CLUSTERS / "pages.toml") as machine:
        await machine.vm("svm").secure()
        guest, kvm = machine.process("svm/guest"), machine.process("alpha/kvm")
        await job(guest, "fill", gfn=FIRST_GFN, n=N_PAGES)
        digests = await job(guest, "digest", gfn=FIRST_GFN, n=N_PAGES)
        for _ in range(n_rounds):
            floor_seconds = await trio.to_thread.run_sync(floor.seconds)
            started = time.perf_counter()
            await move(kvm, "out", "svm", FIRST_GFN, N_PAGES)
            await move(kvm, "in", "svm", FIRST_GFN, N_PAGES)
            seconds = time.perf_counter() - started
            moves.append(Round(N_PAGES / seconds, N_PAGES / floor_seconds))
            await move(kvm, "out", "svm", FIRST_GFN, N_FAULTS)
            times_ns = await job(guest, "touch", gfn=FIRST_GFN, n=N_FAULTS)
            faults.append(Round(statistics.median(times_ns) / _NS_PER_US))
        if await job(guest, "digest", gfn=FIRST_GFN, n=N_PAGES) != digests:
            raise RuntimeError("pages came back with another content")
    return [
        Figure("page_move", "pages/s", moves, Budget(Kind.RATIO_AT_LEAST, MOVE_LIMIT)),
        Figure("page_fault_in", "us", faults),
    ]
