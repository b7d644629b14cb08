"""A trace as Perfetto and chrome://tracing read it: a track a process, slices of calls and requests, arrows between.

Format: the JSON Trace Event Format (Google, "Trace Event Format", as read by ui.perfetto.dev). Times are microseconds.
A process may have several calls open at once, and slices of one thread have to nest; so a process's track has lanes,
and a slice goes into the first that is free. A lane is a thread there, whose number belongs to one process only.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from deploy.trace.events import Event, EventKind, answered_by, process_rank
from protocol.trace import RequestStep

_NS_PER_US = 1000
_BEGUN = RequestStep.BEGUN.name.lower()
_EVENT_US = 1.0
"""An event is drawn as a slice of this length: an arrow needs one to begin and end at."""
_MAX_LANES = 1 << 20
_Place = tuple[int, int]
"""Process and thread."""

Row = dict[str, Any]


class _Track:
    """A process's lanes: until when each is taken."""

    def __init__(self, process: str, pid: int) -> None:
        self.pid = pid
        self._process = process
        self._until_ns: list[int] = []

    def place(self, start_ns: int, end_ns: int) -> _Place:
        """In a lane that is free from `start_ns`; taken until `end_ns` from now on."""
        for lane, until_ns in enumerate(self._until_ns):
            if until_ns <= start_ns:
                self._until_ns[lane] = end_ns
                return self.pid, self._tid(lane)
        self._until_ns.append(end_ns)
        return self.pid, self._tid(len(self._until_ns) - 1)

    def names(self) -> list[Row]:
        """What the process and its lanes are called, and their order."""
        rows = [
            _metadata("process_name", self.pid, 0, name=self._process),
            _metadata("process_sort_index", self.pid, 0, sort_index=self.pid),
        ]
        for lane in range(len(self._until_ns)):
            rows.append(_metadata("thread_name", self.pid, self._tid(lane), name=f"lane {lane + 1}"))
            rows.append(_metadata("thread_sort_index", self.pid, self._tid(lane), sort_index=lane))
        return rows

    def _tid(self, lane: int) -> int:
        return self.pid * _MAX_LANES + lane


class _Slice:
    """At one process: a call until its answer, a device request until its end, or the moment of another message."""

    def __init__(self, event: Event, end_ns: int, answer: Event | None = None) -> None:
        self.event, self.end_ns, self.answer = event, end_ns, answer


def trace_events(events: Iterable[Event]) -> Row:
    """The whole document."""
    ordered = list(events)
    processes = sorted({event.process for event in ordered}, key=process_rank)
    tracks = {process: _Track(process, pid) for pid, process in enumerate(processes, 1)}
    places: dict[int, _Place] = {}
    rows: list[Row] = []
    for part in sorted(_slices(ordered), key=lambda part: part.event.t_ns):
        place = tracks[part.event.process].place(part.event.t_ns, part.end_ns)
        places[id(part.event)] = place
        if part.answer is not None:
            places[id(part.answer)] = place
        rows.append(_complete(part, place))
    rows += _arrows(ordered, places)
    moments = (event for event in ordered if not event.is_message and id(event) not in places)
    rows += [_instant(event, tracks[event.process].pid) for event in moments]
    names = [row for track in tracks.values() for row in track.names()]
    return {"traceEvents": names + rows, "displayTimeUnit": "ns"}


def _metadata(what: str, pid: int, tid: int, **arguments: str | int) -> Row:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


def _slices(events: list[Event]) -> list[_Slice]:
    """Calls, requests, and events; a call or request that never ended lasts until the trace does."""
    last_ns = events[-1].t_ns if events else 0
    slices = []
    unended: dict[tuple[object, ...], _Slice] = {}
    for event in events:
        if (ended := _ended_by(event)) is not None:
            began = unended.pop(ended, None)
            if began is not None:
                began.end_ns, began.answer = event.t_ns, event
        elif (begun := _begun_by(event)) is not None:
            unended[begun] = part = _Slice(event, last_ns)
            slices.append(part)
        elif event.is_message:
            slices.append(_Slice(event, event.t_ns + int(_EVENT_US * _NS_PER_US)))
    return slices


def _begun_by(event: Event) -> tuple[object, ...] | None:
    """What begins with it, as `_ended_by` names it."""
    if event.kind is EventKind.CALL:
        return event.process, event.link, event.outward, event.correlation
    if event.kind is EventKind.REQUEST and event.name == _BEGUN:
        return event.process, event.request
    return None


def _ended_by(event: Event) -> tuple[object, ...] | None:
    if event.ends is not None:
        return event.process, event.link, not event.outward, answered_by(event)
    if event.kind is EventKind.REQUEST and event.name != _BEGUN:
        return event.process, event.request
    return None


def _complete(part: _Slice, place: _Place) -> Row:
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
        "name": event.request or event.name,
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
        "tid": pid * _MAX_LANES,
        "ts": event.t_ns / _NS_PER_US,
        "args": {"cause": f"{event.cause:#x}"},
    }


def _arrows(events: list[Event], places: dict[int, _Place]) -> list[Row]:
    """From each message as it was sent to the same as it came: a link keeps their order."""
    on_the_way: defaultdict[tuple[object, ...], deque[Event]] = defaultdict(deque)
    rows: list[Row] = []
    for event in events:
        if not event.is_message or id(event) not in places:
            continue
        ends = (event.process, event.peer) if event.outward else (event.peer, event.process)
        key = (event.link, *ends, event.kind, event.number, event.correlation, event.cause)
        if event.outward:
            on_the_way[key].append(event)
        elif on_the_way[key]:
            rows += _arrow(on_the_way[key].popleft(), event, places, len(rows) // 2 + 1)
    return rows


def _arrow(sent: Event, came: Event, places: dict[int, _Place], number: int) -> list[Row]:
    ends = (("s", sent), ("f", came))
    return [
        {
            "ph": phase,
            "id": number,
            "name": sent.name,
            "cat": "message",
            "bp": "e",
            "pid": places[id(event)][0],
            "tid": places[id(event)][1],
            "ts": event.t_ns / _NS_PER_US,
        }
        for phase, event in ends
    ]
