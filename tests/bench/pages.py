"""`page_move` and `page_fault_in`: secure pages of a running VM, out to normal memory and in again."""

from __future__ import annotations

import statistics
import time

import trio

from deploy.api import Process
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.floors.page_floor import PageFloor
from tests.bench.machine import CLUSTERS, job, move, running

N_PAGES = 4096
FIRST_GFN = 0x780
"""Behind kernel, initial RAM disk and swiotlb pool, and below the device tree: pages that the kernel does not use."""
N_FAULTS = 64
WALKED_GFN, N_WALKED = 0x100, 64
"""Pages that stay, which a busy guest loads from."""
WALK_MS = 6000
BUSY_ROUNDS = 3
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
            moves.append(Round(await _move_all(kvm), N_PAGES / floor_seconds))
            await move(kvm, "out", "svm", FIRST_GFN, N_FAULTS)
            times_ns = await job(guest, "touch", gfn=FIRST_GFN, n=N_FAULTS)
            faults.append(Round(statistics.median(times_ns) / _NS_PER_US))
        busy = [await _move_while_busy(guest, kvm) for _ in range(min(BUSY_ROUNDS, n_rounds))]
        if await job(guest, "digest", gfn=FIRST_GFN, n=N_PAGES) != digests:
            raise RuntimeError("pages came back with another content")
    return [
        Figure("page_move", "pages/s", moves, Budget(Kind.RATIO_AT_LEAST, MOVE_LIMIT)),
        Figure("page_move_busy", "pages/s", busy),
        Figure("page_fault_in", "us", faults),
    ]


async def _move_all(kvm: Process) -> float:
    """Pages a second, out and in again."""
    started = time.perf_counter()
    await move(kvm, "out", "svm", FIRST_GFN, N_PAGES)
    await move(kvm, "in", "svm", FIRST_GFN, N_PAGES)
    return N_PAGES / (time.perf_counter() - started)


async def _move_while_busy(guest: Process, kvm: Process) -> Round:
    """As `_move_all`, while the guest loads from other pages without a pause."""
    rates: list[float] = []
    loads: list[int] = []

    async def walk() -> None:
        loads.append(await job(guest, "walk", gfn=WALKED_GFN, n=N_WALKED, ms=WALK_MS))
        if not rates:
            raise RuntimeError("the guest's walk ended before the pages had moved")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(walk)
        rates.append(await _move_all(kvm))
    if not loads[0]:
        raise RuntimeError("the guest that should be busy loaded nothing")
    return Round(rates[0])
