"""The events of several files in the order of their time."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from deploy.trace.events import Event, EventDecoder
from deploy.trace.filters import Filter, check_names
from deploy.trace.link_ends import LinkEnds
from deploy.trace.pairing import WINDOW_NS, Pairing, paired
from deploy.trace.reader import TraceReader, TraceUnreadable, place_of, trace_files
from protocol import trace as t
from services.runtime.tracer import FLUSH_SECONDS


class Trace:
    """A file, or all files of a directory; `added` may be called again while they grow. `ends` are known already.

    Of a file that is damaged there is what stands before.
    """

    def __init__(self, files: Iterable[Path] = (), ends: LinkEnds | None = None) -> None:
        self._sources: dict[Path, tuple[TraceReader, EventDecoder]] = {}
        self.ends = LinkEnds() if ends is None else ends
        self._unreadable: set[Path] = set()
        self._untold: list[TraceUnreadable] = []
        self.add(files)

    def add(self, files: Iterable[Path]) -> None:
        """Files that are not among them yet."""
        for path in files:
            if path not in self._sources:
                self._sources[path] = (TraceReader(path), EventDecoder(_moved_to(path), self.ends))

    def events(self) -> Iterator[Event]:
        """All, in order."""
        return paired(self.added(), self.ends)

    def added(self) -> Iterator[Event]:
        """What was added since the last time, in order, peers as the process itself calls them."""
        readable = (source for path, source in self._sources.items() if path not in self._unreadable)
        return heapq.merge(*(self._events_of(*source) for source in readable), key=lambda event: event.t_ns)

    def _events_of(self, reader: TraceReader, decoder: EventDecoder) -> Iterator[Event]:
        try:
            for entry in reader.read():
                event = decoder.event(entry)
                if event is not None:
                    yield event
        except TraceUnreadable as error:
            self._unreadable.add(reader.path)
            self._untold.append(error)

    def newly_unreadable(self) -> list[TraceUnreadable]:
        """Files that turned out to be damaged since the last time, and where."""
        untold, self._untold = self._untold, []
        return untold


_NEVER_NS = 1 << 63


class Tail:
    """The events of files that grow, in order: one is kept back until no process can have an earlier one to write."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._kept: list[Event] = []
        self._pairing = Pairing(trace.ends)
        self._age_ns = int(2 * FLUSH_SECONDS * 1e9)

    def settled(self, now_ns: int) -> list[Event]:
        """Those that were added since the last time and are in order now; `now_ns` is monotonic."""
        events = sorted([*self._kept, *self._trace.added()], key=lambda event: event.t_ns)
        n = bisect_right(events, now_ns - self._age_ns, key=lambda event: event.t_ns)
        self._kept = events[n:]
        for event in events[:n]:
            self._pairing.take(event)
        return list(self._pairing.settled(now_ns - self._age_ns - WINDOW_NS))

    def rest(self) -> list[Event]:
        """All that is left, once no process writes any more."""
        return self.settled(_NEVER_NS)


class Survey:
    """What a trace is of, from one look through its files without decoding messages.

    Raises TraceUnreadable when none of them can be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self.began: dict[str, t.Began] = {}
        """How the recording of each process began last."""
        self.ends = LinkEnds()
        self.clocks: dict[str, str] = {}
        """`time` of each VM by name."""
        self.last_ns = 0
        self.cut: dict[Path, int] = {}
        """Files that end inside an entry, and how many bytes of it they have."""
        self.unreadable: dict[Path, TraceUnreadable] = {}
        """Files that are damaged; what stands before is in the trace."""
        for path in files:
            try:
                self._look_through(path)
            except TraceUnreadable as error:
                self.unreadable[path] = error
        if not self.began and self.unreadable:
            raise next(iter(self.unreadable.values()))

    def _look_through(self, path: Path) -> None:
        reader = TraceReader(path)
        process = ""
        for entry in reader.read():
            match entry:
                case t.Began():
                    process = _moved_to(path) or entry.process
                    self.began[process] = entry
                case t.VmKnown():
                    self.clocks[entry.name] = entry.time
                case t.LinkOpened():
                    self.ends.add(entry.id, process)
                case _:
                    self.last_ns = max(self.last_ns, entry.t_ns)
        if reader.n_cut_bytes:
            self.cut[path] = reader.n_cut_bytes


class Selection:
    """The events of a trace that a filter lets through. Raises UserError for a name that the trace does not have."""

    def __init__(self, where: Path, filter_: Filter) -> None:
        self._files = trace_files(where)
        self._filter = filter_
        self.survey = Survey(self._files)
        check_names(filter_, self.survey.clocks, self.survey.began)

    def __iter__(self) -> Iterator[Event]:
        since_ns = self._filter.since_ns
        oldest_ns = 0 if since_ns is None else self.survey.last_ns - since_ns
        events = Trace(self._files, self.survey.ends).events()
        return (event for event in events if event.t_ns >= oldest_ns and self._filter.passes(event))


def _moved_to(path: Path) -> str | None:
    """The place of a process that took a VM in: its target alone is that of the other host's, too."""
    place = place_of(path)
    return place if "." in place else None
