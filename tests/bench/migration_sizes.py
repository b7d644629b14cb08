"""`python -m tests.bench.migration_sizes`: bytes and time of a migration by RAM size and by dirty rate.

VMs of the bench's migration cluster in other sizes, three eighths of their RAM random, move to the other host and back;
then one size with guests that write at a given rate. The table and the plot go into docs/. A guest that writes faster
than its pages are sent does not converge: it is given up after a while, and the table says so.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import trio
from rich.console import Console

from deploy.api import RunningCluster
from deploy.migration_record import Phase
from deploy.progress import is_over
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from tests.bench.machine import CLUSTERS, STATE, job, running, writing

SIZES_MIB = (64, 128, 256, 512, 1024, 2048)
RATES_MB = (0, 10, 20, 40, 80, 160)
RATES_SIZE_MIB = 256
FILLED = 3 / 8
GIVE_UP_SECONDS = 15.0
ROUNDS = 3
VMS = {"vm": "normal", "svm": "secure"}
TABLE = Path("docs/migration-figures.md")
PLOT = Path("docs/migration-figures.svg")
RESULT = Path("build/migration-sizes.json")
_OTHER_HOST = {"alpha": "beta", "beta": "alpha"}
_FILL_PAGES = 4096
_MIB = 1 << 20
_MB = 1_000_000
_MS = 1000.0
_POLL_SECONDS = 0.05
_TEMPLATES = Path(__file__).parent


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """The median of some migrations of one VM; times are None when it did not converge."""

    kind: str
    ram_mib: int
    dirty_mb_per_second: float
    sent_mib: float
    rounds: int
    total_ms: float | None
    downtime_ms: float | None


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.migration_sizes", description=(__doc__ or "").strip())
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"migrations of each kind (default {ROUNDS})")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_MIB, metavar="MIB", help="RAM sizes")
    parser.add_argument("--docs", action="store_true", help=f"also write {TABLE} and {PLOT}")
    arguments = parser.parse_args()
    moves = trio.run(functools.partial(measure, tuple(arguments.sizes), arguments.rounds))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_bytes(msgspec.json.format(msgspec.json.encode(moves)))
    Console().print(table_of(moves), markup=False)
    if arguments.docs:
        TABLE.write_text(_render("migration_sizes.md.j2", moves))
        PLOT.write_text(_render("migration_sizes.svg.j2", moves))


async def measure(sizes_mib: tuple[int, ...], n_rounds: int) -> list[Move]:
    """Every size with idle guests, then every rate."""
    moves = []
    for size_mib in sizes_mib:
        async with _cluster_of(size_mib) as machine:
            for vm in VMS:
                await _fill(machine, vm, size_mib)
                moves.append(await _moves(machine, vm, size_mib, 0, n_rounds))
    async with _cluster_of(RATES_SIZE_MIB) as machine:
        for vm in VMS:
            gfns = await _fill(machine, vm, RATES_SIZE_MIB)
            for rate_mb in RATES_MB[1:]:
                async with writing(machine, vm, gfns, rate_mb * _MB):
                    moves.append(await _moves(machine, vm, RATES_SIZE_MIB, rate_mb, n_rounds))
    return moves


@asynccontextmanager
async def _cluster_of(size_mib: int) -> AsyncIterator[RunningCluster]:
    text = (CLUSTERS / "migration.toml").read_text().replace('"256M"', f'"{size_mib}M"')
    STATE.mkdir(parents=True, exist_ok=True)
    cluster_file = STATE / f"migration-{size_mib}.toml"
    cluster_file.write_text(text)
    async with running(cluster_file) as machine:
        await machine.vm("svm").secure()
        yield machine


async def _fill(machine: RunningCluster, vm: str, size_mib: int) -> range:
    """Random content in pages of the kernel's allocator; which."""
    guest = machine.process(f"{vm}/guest")
    n_pages = int(size_mib * _MIB * FILLED) // PAGE_BYTES
    first = await job(guest, "alloc", n=n_pages)
    if first is None:
        raise UserError(f"{vm} of {size_mib} MiB has no {n_pages} free pages in a row")
    for gfn in range(first, first + n_pages, _FILL_PAGES):
        await job(guest, "fill", gfn=gfn, n=min(_FILL_PAGES, first + n_pages - gfn))
    return range(first, first + n_pages)


async def _moves(machine: RunningCluster, vm: str, size_mib: int, rate_mb: int, n_rounds: int) -> Move:
    """There and back, `n_rounds` times in all."""
    runs = []
    for _ in range(n_rounds):
        facts = await _move(machine, vm, _OTHER_HOST[await machine.vm(vm).host()])
        runs.append(facts["progress"])
        if facts["phase"] != Phase.DONE:
            return _median(vm, size_mib, rate_mb, runs[-1:], done=False)
    return _median(vm, size_mib, rate_mb, runs, done=True)


async def _move(machine: RunningCluster, name: str, host: str) -> dict[str, Any]:
    """How the migration ended: at the other host, or given up."""
    vm = machine.vm(name)
    await vm.begin_migration(host, bandwidth=0)
    give_up_at = trio.current_time() + GIVE_UP_SECONDS
    while True:
        facts = await vm.job_info()
        if is_over(facts):
            break
        if trio.current_time() > give_up_at:
            give_up_at = math.inf
            await vm.cancel_migration()
        await trio.sleep(_POLL_SECONDS)
    if facts["phase"] not in (Phase.DONE, Phase.CANCELLED):
        raise UserError(f"{name} did not move to {host}: {facts['reason']}")
    return facts


def _median(vm: str, size_mib: int, rate_mb: int, runs: list[dict[str, Any]], *, done: bool) -> Move:
    def of(name: str) -> float:
        return statistics.median(float(run[name]) for run in runs)

    return Move(
        kind=VMS[vm],
        ram_mib=size_mib,
        dirty_mb_per_second=rate_mb,
        sent_mib=of("transferred_bytes") / _MIB,
        rounds=round(of("round")),
        total_ms=of("total_time_ms") if done else None,
        downtime_ms=of("downtime_ms") if done else None,
    )


def table_of(moves: list[Move]) -> str:
    """A Markdown table."""
    rows = [
        "| VM | RAM, MiB | written, MB/s | sent, MiB | rounds | time, s | downtime, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for move in moves:
        took = "does not converge" if move.total_ms is None else f"{move.total_ms / _MS:.2f}"
        stood = "" if move.downtime_ms is None else f"{move.downtime_ms:.0f}"
        cells = (
            move.kind,
            f"{move.ram_mib:,}",
            f"{move.dirty_mb_per_second:g}",
            f"{move.sent_mib:,.0f}",
            f"{move.rounds}",
            took,
            stood,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _render(template: str, moves: list[Move]) -> str:
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    idle = [move for move in moves if not move.dirty_mb_per_second]
    at_rates = [move for move in moves if move.ram_mib == RATES_SIZE_MIB]
    facts = {"idle": idle, "at_rates": at_rates, "rate_mib": RATES_SIZE_MIB, "kinds": list(VMS.values())}
    return environment.get_template(template).render(idle_table=table_of(idle), rate_table=table_of(at_rates), **facts)


if __name__ == "__main__":
    main()
