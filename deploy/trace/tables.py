"""Statistics and differences for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from deploy.states import printable
from deploy.trace.diff import PairDiff, TraceDiff
from deploy.trace.stats import CallStats, TraceStats

_MAX_RESULTS = 4


def stats_tables(stats: TraceStats) -> Iterator[Table]:
    """Calls, then everything else that was counted."""
    calls = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("CALL", "FROM", "TO"):
        calls.add_column(name)
    for name in ("COUNT", "P50 US", "P99 US"):
        calls.add_column(name, justify="right")
    calls.add_column("RESULTS")
    for call in stats.calls:
        times = (_time(call.p50_us), _time(call.p99_us))
        names = (_cell(call.name), _cell(call.caller), _cell(call.callee))
        calls.add_row(*names, str(call.count), *times, _cell(_results(call)))
    yield calls
    if stats.others or stats.lost:
        others = Table(box=None, pad_edge=False, header_style="bold")
        others.add_column("EVENT")
        others.add_column("COUNT", justify="right")
        for name, count in stats.others.items():
            others.add_row(_cell(name), str(count))
        if stats.lost:
            others.add_row("places where entries are missing", str(stats.lost), style="yellow")
        yield others


def _cell(text: str) -> Text:
    """A text of a trace file: not Rich's markup."""
    return Text(printable(text))


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def _results(call: CallStats) -> str:
    shown = [f"{name} {count}" for name, count in list(call.results.items())[:_MAX_RESULTS]]
    more = len(call.results) - len(shown)
    return ", ".join([*shown, *([f"{more} others"] if more > 0 else [])])


def diff_lines(diff: TraceDiff) -> Iterator[str]:
    """What differs first, then every pair of processes."""
    yield from (f"note: {note}" for note in diff.notes)
    if diff.first is not None:
        yield f"the first difference: {_who(diff.first)}, after {diff.first.n_same} messages alike"
        yield f"  A: {diff.first.a or 'nothing more'}"
        yield f"  B: {diff.first.b or 'nothing more'}"
    for pair in diff.pairs:
        yield f"{_verdict(pair):<9} {_who(pair)}: {_counts(pair)}"
    if diff.same:
        yield "no difference as far as both go"


def _who(pair: PairDiff) -> str:
    return f"{pair.sender} to {pair.receiver}"


def _verdict(pair: PairDiff) -> str:
    return "differs" if pair.differs else "alike"


def _counts(pair: PairDiff) -> str:
    if pair.n_a == pair.n_b == pair.n_same:
        return f"{pair.n_same} messages"
    return f"{pair.n_same} messages alike of {pair.n_a} in A and {pair.n_b} in B"
