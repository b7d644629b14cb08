"""Statistics of a trace: for each call how often, how long, with what result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec

from deploy.trace.bounded import remember
from deploy.trace.events import MAX_OPEN, Event, EventKind, answered_by

_NS_PER_US = 1000
_Call = tuple[str, str, str]


class CallStats(msgspec.Struct, frozen=True):
    """One call between two processes; times in microseconds, None where none ended.

    A call is as its caller saw it, or as its callee did where only that recorded it.
    """

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
    counting = _Counting()
    for event in events:
        counting.count(event)
    return counting.result()


class _Counting:
    """Each call by its name, its caller and its callee."""

    def __init__(self) -> None:
        self._times: defaultdict[_Call, list[int]] = defaultdict(list)
        self._results: defaultdict[_Call, Counter[str]] = defaultdict(Counter)
        self._counts: Counter[_Call] = Counter()
        self._others: Counter[str] = Counter()
        self._lost = 0
        self._only_come: dict[tuple[str, str | None, int | None], None] = {}
        """Open calls that only their callee recorded: process, link, correlation."""
        self._counted: dict[int | None, None] = {}
        """Answers to them that were counted as they were sent; their callers may have them, too."""

    def count(self, event: Event) -> None:
        """One event."""
        peer = event.peer or "?"
        if event.ends is not None:
            self._count_answer(event, event.ends, peer)
        elif event.kind in _OTHERS:
            self._others[f"{event.kind} {event.name}"] += 1
        elif event.kind is EventKind.LOST:
            self._lost += 1
        elif event.is_second_copy:
            return
        elif event.kind is EventKind.EVENT:
            self._others[f"event {event.name}"] += 1
        elif event.kind is EventKind.CALL:
            ends = (event.process, peer) if event.outward else (peer, event.process)
            self._counts[event.name, *ends] += 1
            if not event.outward:
                remember(self._only_come, (event.process, event.link, event.correlation), None, MAX_OPEN)

    def _count_answer(self, event: Event, name: str, peer: str) -> None:
        """As its caller got it, or as it was sent to one that did not record its call."""
        if not event.outward:
            if event.message not in self._counted:
                self._end((name, event.process, peer), event)
            return
        call = (event.process, event.link, answered_by(event))
        if call in self._only_come:
            del self._only_come[call]
            self._end((name, peer, event.process), event)
            remember(self._counted, event.message, None, MAX_OPEN)

    def _end(self, call: _Call, answer: Event) -> None:
        self._results[call][answer.result or "?"] += 1
        if answer.took_ns is not None:
            self._times[call].append(answer.took_ns)

    def result(self) -> TraceStats:
        """All that was counted."""
        calls = [self._stats_of(call) for call in {**self._counts, **self._results}]
        calls.sort(key=lambda call: (-call.count, call.name, call.caller))
        return TraceStats(calls, dict(self._others.most_common()), self._lost)

    def _stats_of(self, call: _Call) -> CallStats:
        name, caller, callee = call
        return CallStats(
            name=name,
            caller=caller,
            callee=callee,
            count=max(self._counts[call], sum(self._results[call].values())),
            p50_us=percentile(self._times[call], 50),
            p99_us=percentile(self._times[call], 99),
            results=dict(self._results[call].most_common()),
        )


def percentile(times_ns: list[int], percent: int) -> float | None:
    """The smallest time that so many percent do not exceed, in microseconds."""
    if not times_ns:
        return None
    ordered = sorted(times_ns)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] / _NS_PER_US


_OTHERS = frozenset({EventKind.PAGE, EventKind.INTERRUPT, EventKind.REQUEST, EventKind.MIGRATION})
