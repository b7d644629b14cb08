"""`python -m tests.bench [--only NAME]... [--rounds N]`: measure, print a table, write build/bench.json.

Each group of figures is written as soon as it is measured; one that is stopped still shows what it has.

The exit status is 1 when a budget is missed, or a figure cannot be measured for want of something.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import trio
from rich.console import Console
from rich.table import Table

from protocol.errors import UserError
from tests.bench import boot, calls, debugging, disk, dma, engine, migration, pages, starting, trace
from tests.bench.figure import Budget, Figure, Measurement

RESULT = Path("build/bench.json")
FIGURES_DOC = Path("docs/figures.md")
ROUNDS = 10
MEASUREMENTS: dict[str, Measurement] = {
    "null_hypercall": calls.measure,
    "trace_off": trace.measure,
    "page_move": pages.measure,
    "blk_read": disk.measure,
    "dma_seq_read": dma.measure,
    "up_two_hosts": starting.measure_up,
    "idle_rss": starting.measure_rss,
    "mips_loop": engine.measure,
    "boot_normal": boot.measure,
    "gdb_step": debugging.measure,
    "migrate_secure": migration.measure,
}
"""By the name of their first figure."""
_STATUS = Console(stderr=True)
_MARK = "<!-- table by python -m tests.bench -->"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Figures against their floors.")
    parser.add_argument(
        "--only", choices=sorted(MEASUREMENTS), action="append", help="measure this group of figures; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of each figure (default {ROUNDS})")
    parser.add_argument("--docs", action="store_true", help=f"also write the table into {FIGURES_DOC}")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    try:
        lacking = measure(arguments.only or list(MEASUREMENTS), arguments.rounds, figures)
    except KeyboardInterrupt:
        show(figures)
        sys.exit(130)
    show(figures)
    if arguments.docs:
        write_docs(figures)
    sys.exit(0 if not lacking and all(figure.holds for figure in figures) else 1)


def measure(names: list[str], n_rounds: int, figures: list[Figure]) -> bool:
    """Measure these groups one after the other, to the end of `figures` and into bench.json as soon as each is done.

    Returns whether one could not be measured for want of something.
    """
    lacking = False
    for number, name in enumerate(names, 1):
        _STATUS.print(f"{name} ({number} of {len(names)})")
        try:
            figures += trio.run(functools.partial(MEASUREMENTS[name], n_rounds))
        except UserError as error:
            _STATUS.print(f"{name}: {error}")
            lacking = True
        write_json(figures)
    return lacking


def show(figures: list[Figure]) -> None:
    """The table on the terminal."""
    table = Table(title=f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for column in ("figure", "value", "floor", "ratio", "budget", ""):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for figure in figures:
        table.add_row(*cells(figure), "" if figure.budget is None else "held" if figure.holds else "missed")
    Console().print(table)
    for command in sorted({figure.beside for figure in figures if figure.beside}):
        Console(soft_wrap=True).print(f"beside: {command}")


def cells(figure: Figure) -> list[str]:
    """Name, value, floor, ratio, budget."""
    floor = "" if figure.floor is None else f"{figure.floor:,.1f} {figure.unit}"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    return [figure.name, f"{figure.value:,.1f} {figure.unit}", floor, ratio, budget_text(figure.budget, figure.unit)]


def budget_text(budget: Budget | None, unit: str) -> str:
    """In words."""
    if budget is None:
        return ""
    return f"{budget.kind.value} {budget.limit:g}{f' {unit}' if budget.kind.is_of_value else ''}"


def write_json(figures: list[Figure]) -> None:
    """Every figure measured now; others keep what an earlier run wrote."""
    RESULT.parent.mkdir(exist_ok=True)
    entries = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    entries |= {figure.name: figure.entry() for figure in figures}
    RESULT.write_text(json.dumps(entries, indent=2) + "\n")


def write_docs(figures: list[Figure]) -> None:
    """Replace the table between the two marks of docs/figures.md."""
    before, _, after = FIGURES_DOC.read_text().split(_MARK)
    rows = ["| figure | value | floor | ratio | budget |", "|---|---:|---:|---:|---|"]
    rows += ["| " + " | ".join(cells(figure)) + " |" for figure in figures]
    FIGURES_DOC.write_text(f"{before}{_MARK}\n" + "\n".join(rows) + f"\n{_MARK}{after}")


if __name__ == "__main__":
    main()
