"""The events of several files in the order of their time."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from deploy.trace.events import Event, EventDecoder
from deploy.trace.filters import Filter, check_names
from deploy.trace.link_ends import LinkEnds
from deploy.trace.reader import TraceReader, place_of, trace_files
from protocol import trace as t
from services.runtime.tracer import FLUSH_SECONDS


class Trace:
    """A file, or all files of a directory; `added` may be called again while they grow. `ends` are known already."""

    def __init__(self, files: Iterable[Path] = (), ends: LinkEnds | None = None) -> None:
        self._sources: dict[Path, tuple[TraceReader, EventDecoder]] = {}
        self.ends = LinkEnds() if ends is None else ends
        self.add(files)

    def add(self, files: Iterable[Path]) -> None:
        """Files that are not among them yet."""
        for path in files:
            if path not in self._sources:
                self._sources[path] = (TraceReader(path), EventDecoder(_moved_to(path), self.ends))

    @property
    def processes(self) -> set[str]:
        """Those that recorded, as far as it was read."""
        return {decoder.process for _, decoder in self._sources.values() if decoder.began is not None}

    def events(self) -> Iterator[Event]:
        """All, in order; raises TraceDamaged."""
        return (with_peer(event, self.ends) for event in self.added())

    def added(self) -> Iterator[Event]:
        """What was added since the last time, in order, peers as their files call them; raises TraceDamaged."""
        return heapq.merge(*(_events(*source) for source in self._sources.values()), key=lambda event: event.t_ns)


class Tail:
    """The events of files that grow, in order: one is kept back until no process can have an earlier one to write."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._kept: list[Event] = []
        self._age_ns = int(2 * FLUSH_SECONDS * 1e9)

    def settled(self, now_ns: int) -> list[Event]:
        """Those that were added since the last time and are in order now; `now_ns` is monotonic."""
        events = sorted([*self._kept, *self._trace.added()], key=lambda event: event.t_ns)
        n = bisect_right(events, now_ns - self._age_ns, key=lambda event: event.t_ns)
        self._kept = events[n:]
        return [with_peer(event, self._trace.ends) for event in events[:n]]


class Survey(msgspec.Struct, frozen=True):
    """What a trace is of: processes with how their recording began, their links, VMs with their clock, its last moment.

    `cut` are files that end inside an entry, and how many bytes of it they have.
    """

    began: dict[str, t.Began]
    ends: LinkEnds
    clocks: dict[str, str]
    last_ns: int
    cut: dict[Path, int]


def survey(files: list[Path]) -> Survey:
    """Look through files once, without decoding messages; raises TraceDamaged."""
    began: dict[str, t.Began] = {}
    ends = LinkEnds()
    clocks: dict[str, str] = {}
    cut: dict[Path, int] = {}
    last_ns = 0
    for path in files:
        reader = TraceReader(path)
        process = ""
        for entry in reader.read():
            match entry:
                case t.Began():
                    process = _moved_to(path) or entry.process
                    began[process] = entry
                case t.VmKnown():
                    clocks[entry.name] = entry.time
                case t.LinkOpened():
                    ends.add(entry.id, process)
                case _:
                    last_ns = max(last_ns, entry.t_ns)
        if reader.n_cut_bytes:
            cut[path] = reader.n_cut_bytes
    return Survey(began, ends, clocks, last_ns, cut)


class Selection:
    """The events of a trace that a filter lets through. Raises UserError for a name that the trace does not have."""

    def __init__(self, where: Path, filter_: Filter) -> None:
        self._files = trace_files(where)
        self._filter = filter_
        self.survey = survey(self._files)
        check_names(filter_, self.survey.clocks, self.survey.began)

    def __iter__(self) -> Iterator[Event]:
        since_ns = self._filter.since_ns
        oldest_ns = 0 if since_ns is None else self.survey.last_ns - since_ns
        events = Trace(self._files, self.survey.ends).events()
        return (event for event in events if event.t_ns >= oldest_ns and self._filter.passes(event))


def with_peer(event: Event, ends: LinkEnds) -> Event:
    """The event with its peer as the peer's own file is called, if it has one."""
    peer = ends.peer(event.link, event.process)
    return event if peer in (None, event.peer) else msgspec.structs.replace(event, peer=peer)


def _events(reader: TraceReader, decoder: EventDecoder) -> Iterator[Event]:
    for entry in reader.read():
        event = decoder.event(entry)
        if event is not None:
            yield event


def _moved_to(path: Path) -> str | None:
    """The place of a process that took a VM in: its target alone is that of the other host's, too."""
    place = place_of(path)
    return place if "." in place else None
