"""A trace as Perfetto and chrome://tracing read it: a track a process, slices of calls, arrows between.

Format: the JSON Trace Event Format (Google, "Trace Event Format", as read by ui.perfetto.dev). Times are microseconds.
A process may have several calls open at once, and slices of one thread have to nest; so a process's track has lanes,
and a slice goes into the first that is free.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from deploy.trace.events import Event, EventKind

_NS_PER_US = 1000
_EVENT_US = 1.0
"""An event is drawn as a slice of this length: an arrow needs one to begin and end at."""
_FIRST_LANE = 1

Row = dict[str, Any]


class _Track:
    """A process's lanes: until when each is taken."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._until_ns: list[int] = []

    def lane(self, start_ns: int, end_ns: int) -> int:
        """A lane that is free from `start_ns`; taken until `end_ns` from now on."""
        for lane, until_ns in enumerate(self._until_ns):
            if until_ns <= start_ns:
                self._until_ns[lane] = end_ns
                return lane + _FIRST_LANE
        self._until_ns.append(end_ns)
        return len(self._until_ns) - 1 + _FIRST_LANE


class _Slice:
    """A message in flight at one process: a call until its answer, or a moment."""

    def __init__(self, event: Event, end_ns: int, answer: Event | None = None) -> None:
        self.event, self.end_ns, self.answer = event, end_ns, answer


def trace_events(events: Iterable[Event]) -> Row:
    """The whole document."""
    ordered = list(events)
    tracks = {process: _Track(pid) for pid, process in enumerate(sorted({it.process for it in ordered}), 1)}
    rows = [
        {"ph": "M", "name": "process_name", "pid": track.pid, "tid": 0, "args": {"name": process}}
        for process, track in tracks.items()
    ]
    lanes: dict[int, tuple[int, int]] = {}
    for part in sorted(_slices(ordered), key=lambda part: part.event.t_ns):
        track = tracks[part.event.process]
        place = (track.pid, track.lane(part.event.t_ns, part.end_ns))
        lanes[id(part.event)] = place
        if part.answer is not None:
            lanes[id(part.answer)] = place
        rows.append(_complete(part, place))
    rows += _arrows(ordered, lanes)
    rows += [_instant(event, tracks[event.process].pid) for event in ordered if not event.is_message]
    return {"traceEvents": rows, "displayTimeUnit": "ns"}


def _slices(events: list[Event]) -> list[_Slice]:
    """Calls and events; a call that never ended lasts until the trace does."""
    last_ns = events[-1].t_ns if events else 0
    slices = []
    open_calls: dict[tuple[str, str | None, bool, int | None], _Slice] = {}
    for event in events:
        if event.ends is not None:
            began = open_calls.pop((event.process, event.link, not event.outward, _answered(event)), None)
            if began is not None:
                began.end_ns, began.answer = event.t_ns, event
        elif event.kind is EventKind.CALL:
            part = _Slice(event, last_ns)
            open_calls[event.process, event.link, event.outward, event.correlation] = part
            slices.append(part)
        elif event.is_message:
            slices.append(_Slice(event, event.t_ns + int(_EVENT_US * _NS_PER_US)))
    return slices


def _answered(event: Event) -> int | None:
    """The correlation id of the call that an answer ends; UV_RETURN names it by its second register."""
    if event.kind is EventKind.REPLY:
        return event.correlation
    return event.values[1] if event.values is not None and len(event.values) > 1 else None


def _complete(part: _Slice, place: tuple[int, int]) -> Row:
    event = part.event
    arguments: Row = {"text": event.text, "cause": f"{event.cause:#x}"}
    if event.vm is not None:
        arguments["vm"] = event.vm
    if event.time_ns is not None:
        arguments["vm_time_ns"] = event.time_ns
    if part.answer is not None:
        arguments["result"] = part.answer.text
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.kind.value,
        "pid": place[0],
        "tid": place[1],
        "ts": event.t_ns / _NS_PER_US,
        "dur": max(part.end_ns - event.t_ns, 1) / _NS_PER_US,
        "args": arguments,
    }


def _instant(event: Event, pid: int) -> Row:
    return {
        "ph": "i",
        "s": "p",
        "name": event.text,
        "cat": event.kind.value,
        "pid": pid,
        "tid": _FIRST_LANE,
        "ts": event.t_ns / _NS_PER_US,
        "args": {"cause": f"{event.cause:#x}"},
    }


def _arrows(events: list[Event], lanes: dict[int, tuple[int, int]]) -> list[Row]:
    """From each message as it was sent to the same as it came: a link keeps their order."""
    on_the_way: defaultdict[tuple[object, ...], deque[Event]] = defaultdict(deque)
    rows: list[Row] = []
    for event in events:
        if not event.is_message or id(event) not in lanes:
            continue
        ends = (event.process, event.peer) if event.outward else (event.peer, event.process)
        key = (event.link, *ends, event.kind, event.number, event.correlation, event.cause)
        if event.outward:
            on_the_way[key].append(event)
        elif on_the_way[key]:
            rows += _arrow(on_the_way[key].popleft(), event, lanes, len(rows) // 2 + 1)
    return rows


def _arrow(sent: Event, came: Event, lanes: dict[int, tuple[int, int]], number: int) -> list[Row]:
    ends = (("s", sent), ("f", came))
    return [
        {
            "ph": phase,
            "id": number,
            "name": sent.name,
            "cat": "message",
            "bp": "e",
            "pid": lanes[id(event)][0],
            "tid": lanes[id(event)][1],
            "ts": event.t_ns / _NS_PER_US,
        }
        for phase, event in ends
    ]
