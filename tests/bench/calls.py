"""`null_hypercall`, `null_hypercall_svm`, and both beside a ping-pong."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.floors.program import FloorProgram
from tests.bench.machine import CLUSTERS, job, running

N_CALLS = 500
SLICES_A_ROUND = 4
"""Figure and floors take turns often, so that what else runs on the machine meets them alike."""
DIRECT_LIMIT = 1.3
RELAYED_LIMIT = 1.4
_FLOORS = ("direct", "relayed", "pingpong")
_NS_PER_US = 1000


@asynccontextmanager
async def floors() -> AsyncIterator[dict[str, FloorProgram]]:
    """All three, started and warm."""
    programs = {topology: FloorProgram("call_floor", topology) for topology in _FLOORS}
    try:
        for program in programs.values():
            await trio.to_thread.run_sync(program.times_ns, N_CALLS)
        yield programs
    finally:
        for program in programs.values():
            program.close()


async def measure(n_rounds: int) -> list[Figure]:
    """Both hypercalls and all floors in turn, `n_rounds` times."""
    rows: list[dict[str, float]] = []
    async with running(CLUSTERS / "calls.toml") as machine, floors() as programs:
        await machine.vm("svm").secure()
        await machine.vm("plain").wait_state("running")
        guests = {name: machine.process(f"{name}/guest") for name in ("plain", "svm")}
        for guest in guests.values():
            await job(guest, "hypercalls", n=N_CALLS)
        for _ in range(n_rounds):
            times_ns: dict[str, list[int]] = {name: [] for name in (*guests, *programs)}
            for _ in range(SLICES_A_ROUND):
                for name, guest in guests.items():
                    times_ns[name] += await job(guest, "hypercalls", n=N_CALLS)
                for topology, program in programs.items():
                    times_ns[topology] += await trio.to_thread.run_sync(program.times_ns, N_CALLS)
            rows.append({name: statistics.median(times) / _NS_PER_US for name, times in times_ns.items()})

    def paired(value: str, floor: str) -> list[Round]:
        return [Round(row[value], row[floor]) for row in rows]

    return [
        Figure("null_hypercall", "us", paired("plain", "direct"), Budget(Kind.RATIO_AT_MOST, DIRECT_LIMIT)),
        Figure("null_hypercall_svm", "us", paired("svm", "relayed"), Budget(Kind.RATIO_AT_MOST, RELAYED_LIMIT)),
        Figure("ratio_pingpong", "us", paired("plain", "pingpong")),
        Figure("ratio_pingpong_svm", "us", paired("svm", "pingpong")),
    ]
