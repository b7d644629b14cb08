"""The report of a comparison: a page of HTML that needs no other file, JSON, and a short table of text."""

from __future__ import annotations

from pathlib import Path

import jinja2
import msgspec
from rich.table import Table

from deploy.compare.claims import Borne, ClaimResult
from deploy.compare.costs import tce_calls
from deploy.compare.plan import REQUESTS, TIMED_ROUNDS, Workload
from deploy.compare.results import Comparison, DesignResult, KindResult, Verdict, Works
from deploy.compare.vm_files import MEMORY_BYTES
from protocol.errors import UserError
from protocol.geometry import PAGE_SHIFT

TEMPLATE = Path(__file__).parent / "report.html.j2"
BAR_PIXELS = 500
_MARKS = {Works.YES: "yes", Works.NO: "NO", Works.NOT_RUN: "-"}


class Report(msgspec.Struct, frozen=True):
    """What is written as JSON."""

    comparison: Comparison
    claims: list[ClaimResult]


class Bar(msgspec.Struct, frozen=True):
    """A bar of the plot, in pixels."""

    label: str
    secure: bool
    median: float
    low: float
    high: float


def write_report(report: Report, directory: Path, about: str = "") -> list[Path]:
    """Write `report.html` and `report.json` into `directory`, made if need be; raises UserError."""
    pages = {
        "report.html": as_html(report, about).encode(),
        "report.json": msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in pages.items():
            (directory / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{directory}: the report cannot be written: {error.strerror}") from None
    return [directory / name for name in pages]


def as_html(report: Report, about: str = "") -> str:
    """The page."""
    comparison = report.comparison
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    requests = {str(workload): _describe(workload) for workload in REQUESTS}
    return template.render(
        comparison=comparison,
        claims=report.claims,
        about=about,
        rounds=TIMED_ROUNDS,
        vm_pages=MEMORY_BYTES >> PAGE_SHIFT,
        requests=requests,
        workloads=[workload for workload in comparison.workloads if workload != Workload.BOOT],
        costs=msgspec.structs.asdict(comparison.costs),
        kinds_of=kinds_of,
        spread=_spread,
        percent=_percent,
        tce_calls=tce_calls,
        bars_of=lambda workload: bars_of(comparison, workload),
        scale_of=lambda workload: scale_of(comparison, workload),
    )


def as_table(report: Report) -> Table:
    """What works, and the counts of one request of the first workload."""
    comparison = report.comparison
    first = next((workload for workload in comparison.workloads if workload != Workload.BOOT), "")
    table = Table(title="DMA designs", show_lines=False)
    for title in ("#", "design", "normal", "secure", "old guest", "old firmware", "changed"):
        table.add_column(title)
    for title in (f"calls/{first}", "secure", "of bypass", "secure"):
        table.add_column(title, justify="right")
    for row in comparison.designs:
        verdicts = (row.normal.verdict, row.secure.verdict, row.old_guest, row.old_firmware)
        figures = [_calls(row.normal, first), _calls(row.secure, first), _share(row.normal, first),
                   _share(row.secure, first)]  # fmt: skip
        changed = ", ".join(row.changes) or "nothing"
        table.add_row(str(row.number), row.design, *map(_mark, verdicts), changed, *figures)
    return table


def claim_lines(report: Report) -> list[str]:
    """A line a claim."""
    marks = {Borne.OUT: "borne out    ", Borne.NOT: "NOT borne out", Borne.OPEN: "not run      "}
    return [f"{marks[claim.verdict]}  {claim.claim}" for claim in report.claims]


def kinds_of(row: DesignResult) -> list[tuple[str, KindResult]]:
    """The kinds of VM of a design, by what they are called."""
    kinds = [("normal", row.normal), ("secure", row.secure)]
    return kinds if row.unpatched is None else [*kinds, ("normal, unpatched guest", row.unpatched)]


def scale_of(comparison: Comparison, workload: str) -> float:
    """The highest throughput of a workload, which is as long as a bar gets."""
    timings = [
        kind.workloads[workload].timing
        for row in comparison.designs
        for _, kind in kinds_of(row)
        if workload in kind.workloads
    ]
    return max((timing.mib_per_second[2] for timing in timings if timing is not None), default=0.0)


def bars_of(comparison: Comparison, workload: str) -> list[Bar]:
    """A bar for each design and kind of VM that was timed."""
    scale = scale_of(comparison, workload)
    bars = []
    for row in comparison.designs:
        for name, kind in kinds_of(row):
            timing = kind.workloads[workload].timing if workload in kind.workloads else None
            if timing is not None and scale:
                median, low, high = (value * BAR_PIXELS / scale for value in timing.mib_per_second)
                bars.append(Bar(f"{row.design}, {name}", name == "secure", median, low, high))
    return bars


def _describe(workload: Workload) -> str:
    counted = ", counted in the first timed round" if workload is Workload.NET else ""
    return f"{REQUESTS[workload].title}; figures are of one request{counted}"


def _spread(values: tuple[float, float, float]) -> str:
    median, low, high = values
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _percent(values: tuple[float, float, float] | None) -> str:
    if values is None:
        return ""
    median, low, high = (100 * value for value in values)
    return f"{median:.0f}% ({low:.0f} to {high:.0f})"


def _mark(verdict: Verdict) -> str:
    return _MARKS[verdict.works]


def _calls(kind: KindResult, workload: str) -> str:
    measured = kind.workloads.get(workload)
    if measured is None or measured.work is None:
        return ""
    return f"{measured.work.all_calls:.2f}"


def _share(kind: KindResult, workload: str) -> str:
    measured = kind.workloads.get(workload)
    if measured is None or measured.timing is None or measured.timing.of_bypass is None:
        return ""
    return f"{100 * measured.timing.of_bypass[0]:.0f}%"
