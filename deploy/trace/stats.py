"""Statistics of a trace: for each call how often, how long, with what result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec

from deploy.trace.events import Event, EventKind

_NS_PER_US = 1000


class CallStats(msgspec.Struct, frozen=True):
    """One call between two processes, as its caller saw it; times in microseconds, None where none ended."""

    name: str
    caller: str
    callee: str
    count: int
    p50_us: float | None
    p99_us: float | None
    results: dict[str, int]


class TraceStats(msgspec.Struct, frozen=True):
    """Calls, most frequent first; how often each event, page transition, interrupt, request and migration step was."""

    calls: list[CallStats]
    others: dict[str, int]
    lost: int


def statistics(events: Iterable[Event]) -> TraceStats:
    """Count. A call that has not ended counts and has no time."""
    times: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    results: defaultdict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    counts: Counter[tuple[str, str, str]] = Counter()
    others: Counter[str] = Counter()
    lost = 0
    for event in events:
        peer = event.peer or "?"
        if event.ends is not None and not event.outward:
            key = (event.ends, event.process, peer)
            results[key][event.result or "?"] += 1
            times[key] += [] if event.took_ns is None else [event.took_ns]
        elif event.kind is EventKind.CALL and event.ends is None and event.outward:
            counts[event.name, event.process, peer] += 1
        elif event.kind is EventKind.EVENT and event.outward:
            others[f"event {event.name}"] += 1
        elif event.kind in _OTHERS:
            others[f"{event.kind} {event.name}"] += 1
        elif event.kind is EventKind.LOST:
            lost += 1
    calls = [
        CallStats(
            name=key[0],
            caller=key[1],
            callee=key[2],
            count=max(counts[key], sum(results[key].values())),
            p50_us=percentile(times[key], 50),
            p99_us=percentile(times[key], 99),
            results=dict(results[key].most_common()),
        )
        for key in {**counts, **results}
    ]
    calls.sort(key=lambda call: (-call.count, call.name, call.caller))
    return TraceStats(calls, dict(others.most_common()), lost)


def percentile(times_ns: list[int], percent: int) -> float | None:
    """The smallest time that so many percent do not exceed, in microseconds."""
    if not times_ns:
        return None
    ordered = sorted(times_ns)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] / _NS_PER_US


_OTHERS = frozenset({EventKind.PAGE, EventKind.INTERRUPT, EventKind.REQUEST, EventKind.MIGRATION})
