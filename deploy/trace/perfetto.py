"""A trace as Perfetto and chrome://tracing read it: a track a process, slices of calls and requests, arrows between.

Format: the JSON Trace Event Format (Google, "Trace Event Format", as read by ui.perfetto.dev). Times are microseconds.
A process may have several calls open at once, and slices of one thread have to nest; so a process's track has lanes,
and a slice goes into the first that is free. A lane is a thread there, whose number belongs to one process only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from deploy.trace.bounded import remember
from deploy.trace.events import Event, EventKind, answered_by, process_rank
from deploy.trace.pairing import MAX_ON_THE_WAY
from protocol.trace import RequestStep

_NS_PER_US = 1000
_BEGUN = RequestStep.BEGUN.name.lower()
_EVENT_NS = 1000
"""An event is drawn as a slice of this length: an arrow needs one to begin and end at."""
_MAX_LANES = 1 << 20
_OPEN_NS = 1 << 64
_Place = tuple[int, int]
"""Process and thread."""

Row = dict[str, Any]


class _Track:
    """A process's lanes: until when each is taken."""

    def __init__(self, process: str, pid: int) -> None:
        self.pid = pid
        self.process = process
        self._until_ns: list[int] = []

    def take(self, start_ns: int, end_ns: int = _OPEN_NS) -> _Place:
        """In a lane that is free from `start_ns`; taken until `end_ns` from now on, or until `free`."""
        for lane, until_ns in enumerate(self._until_ns):
            if until_ns <= start_ns:
                self._until_ns[lane] = end_ns
                return self.pid, self._tid(lane)
        self._until_ns.append(end_ns)
        return self.pid, self._tid(len(self._until_ns) - 1)

    def free(self, place: _Place, end_ns: int) -> None:
        """What was taken ended."""
        self._until_ns[place[1] - self._tid(0)] = end_ns

    def names(self, rank: int) -> Iterator[Row]:
        """What the process and its lanes are called, and their order."""
        yield _metadata("process_name", self.pid, 0, name=self.process)
        yield _metadata("process_sort_index", self.pid, 0, sort_index=rank)
        for lane in range(len(self._until_ns)):
            yield _metadata("thread_name", self.pid, self._tid(lane), name=f"lane {lane + 1}")
            yield _metadata("thread_sort_index", self.pid, self._tid(lane), sort_index=lane)

    def _tid(self, lane: int) -> int:
        return self.pid * _MAX_LANES + lane


class _Open(NamedTuple):
    """A call until its answer, or a device request until its end."""

    event: Event
    place: _Place


class _Drawing:
    """Rows of events as they come; of what is behind only open slices and messages on their way are remembered."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._open: dict[tuple[object, ...], _Open] = {}
        self._sent: dict[int, _Open] = {}
        """By number of the message."""
        self._n_arrows = 0
        self._last_ns = 0

    def rows_of(self, event: Event) -> Iterator[Row]:
        """What is drawn now that `event` happened."""
        self._last_ns = event.t_ns
        track = self._track(event.process)
        place = None
        if (ended := _ended_by(event)) is not None:
            part = self._open.pop(ended, None)
            if part is not None:
                place = part.place
                yield self._ended(part, event)
        elif (begun := _begun_by(event)) is not None:
            earlier = self._open.pop(begun, None)
            if earlier is not None:
                # Its ids are in use again: nothing will end it.
                yield self._ended(earlier, None)
            place = track.take(event.t_ns)
            self._open[begun] = _Open(event, place)
        elif event.is_message:
            place = track.take(event.t_ns, event.t_ns + _EVENT_NS)
            yield _complete(event, event.t_ns + _EVENT_NS, None, place)
        if place is None and not event.is_message:
            yield _instant(event, track.pid)
        if place is not None and event.message is not None:
            yield from self._arrow(event.message, _Open(event, place))

    def rest(self) -> Iterator[Row]:
        """What never ended lasts until the trace does; and what everything is called."""
        for part in self._open.values():
            yield _complete(part.event, self._last_ns, None, part.place)
        tracks = sorted(self._tracks.values(), key=lambda track: process_rank(track.process))
        for rank, track in enumerate(tracks, 1):
            yield from track.names(rank)

    def _track(self, process: str) -> _Track:
        track = self._tracks.get(process)
        if track is None:
            track = self._tracks[process] = _Track(process, len(self._tracks) + 1)
        return track

    def _ended(self, part: _Open, answer: Event | None) -> Row:
        self._track(part.event.process).free(part.place, self._last_ns)
        return _complete(part.event, self._last_ns, answer, part.place)

    def _arrow(self, message: int, end: _Open) -> Iterator[Row]:
        """From each message as it was sent to the same as it came."""
        if end.event.outward:
            remember(self._sent, message, end, MAX_ON_THE_WAY)
        elif (sent := self._sent.pop(message, None)) is not None:
            self._n_arrows += 1
            yield _arrow_end("s", sent, sent.event.name, self._n_arrows)
            yield _arrow_end("f", end, sent.event.name, self._n_arrows)


def trace_rows(events: Iterable[Event]) -> Iterator[Row]:
    """Rows as soon as they are complete; their order means nothing to who reads them."""
    drawing = _Drawing()
    for event in events:
        yield from drawing.rows_of(event)
    yield from drawing.rest()


def document(events: Iterable[Event]) -> Iterator[str]:
    """The whole document in pieces."""
    yield '{"displayTimeUnit": "ns", "traceEvents": ['
    for number, row in enumerate(trace_rows(events)):
        yield f"{',' if number else ''}\n{json.dumps(row)}"
    yield "\n]}\n"


def _metadata(what: str, pid: int, tid: int, **arguments: str | int) -> Row:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


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


def _complete(event: Event, end_ns: int, answer: Event | None, place: _Place) -> Row:
    arguments: Row = {"text": event.text, "cause": f"{event.cause:#x}"}
    if event.vm is not None:
        arguments["vm"] = event.vm
    if event.time_ns is not None:
        arguments["vm_time_ns"] = event.time_ns
    if answer is not None:
        arguments["result"] = answer.text
    return {
        "ph": "X",
        "name": event.request or event.name,
        "cat": event.kind.value,
        "pid": place[0],
        "tid": place[1],
        "ts": event.t_ns / _NS_PER_US,
        "dur": max(end_ns - event.t_ns, 1) / _NS_PER_US,
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


def _arrow_end(phase: str, end: _Open, name: str, number: int) -> Row:
    return {
        "ph": phase,
        "id": number,
        "name": name,
        "cat": "message",
        "bp": "e",
        "pid": end.place[0],
        "tid": end.place[1],
        "ts": end.event.t_ns / _NS_PER_US,
    }
