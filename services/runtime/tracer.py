"""The tracer of a process: what happens in it, noted where it happens and written to the trace file elsewhere.

To note an entry is to append it to a queue. The queue is written by `flush`, which the process calls in a thread that
serves no message. Whoever notes never waits: what does not fit into the queue is counted as lost, and the file says so.

A tap is what a link end calls for each message; while recording is off a link end has none and compares once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from protocol import trace as t
from protocol.startup import LinkEntry, ProcessConfig, VmEntry
from protocol.trace_rules import CONFIDENTIAL_LINKS, written_form

FLUSH_SECONDS = 0.25
MAX_QUEUED = 1 << 16
LARGE_BYTES = 256
"""From here on frames are counted by their bytes: MAX_QUEUED smaller ones take 16 MiB at most. Calls are smaller."""
MAX_LARGE_BYTES = 16 << 20
"""What all queued frames from LARGE_BYTES on may take together: a peer may send no other."""
MAX_FILE_BYTES = 1 << 30
"""A trace that nobody ends does not fill the disk."""
_ENTRIES_A_WRITE = 128
"""Encoded in one go; between two goes others get the interpreter."""

Tap = Callable[[bool, Sequence[bytes]], None]
"""Told of a message: whether it goes outward, and its frames."""
Clock = Callable[[], int]
"""The VM's own time in nanoseconds."""


class Tapped(Protocol):
    """An end of a link."""

    tap: Tap | None


class _End(NamedTuple):
    end: Tapped
    entry: LinkEntry
    clock: Clock | None


class Tracer:
    """`on` says whether anything is to be noted; who notes looks at it first, in whatever thread.

    Everything but noting and `flush` is for the thread of the process's links.
    """

    def __init__(self, fd: int | None, config: ProcessConfig | None) -> None:
        self.on = False
        self._fd = fd
        self._config = config
        self._queue: deque[t.AnyEntry] = deque()
        self._ends: dict[str, _End] = {}
        self._vms: dict[str, VmEntry] = {}
        self._n_links = 0
        self._large_bytes = 0
        self._large_lock = threading.Lock()
        self._n_lost = 0
        self._n_lost_told = 0
        self._writing = threading.Lock()
        self._unwritten = b""
        self._n_bytes = 0 if fd is None else os.fstat(fd).st_size
        """Of the file, with what earlier incarnations left in it."""
        self.is_full = self._n_bytes >= MAX_FILE_BYTES
        """The file has reached MAX_FILE_BYTES: nothing more is written to it."""
        self._confidential: set[int] = set()

    # -- what there is to trace -------------------------------------------------------------------------------

    def add_vm(self, vm: VmEntry) -> None:
        """A VM that this process has to do with from now on."""
        self._vms[vm.name] = vm
        if self.on:
            self._note_vm(vm)

    def add_end(self, end: Tapped, entry: LinkEntry, clock: Clock | None = None) -> None:
        """A link end; `clock` is that of its VM, where the process has it."""
        self._ends[entry.id] = it = _End(end, entry, clock)
        if self.on:
            end.tap = self._make_tap(it)

    def forget_end(self, link_id: str, end: Tapped) -> None:
        """The end is closed."""
        known = self._ends.get(link_id)
        if known is not None and known.end is end:
            del self._ends[link_id]

    # -- on and off -------------------------------------------------------------------------------------------

    def switch(self, *, on: bool) -> None:
        """Begin to record, or end; nothing when it is so already, or `is_full`."""
        if on is self.on or self._fd is None or self._config is None or (on and self.is_full):
            return
        if on:
            self._begin(self._config)
        self.on = on
        for it in self._ends.values():
            it.end.tap = self._make_tap(it) if on else None

    def _begin(self, config: ProcessConfig) -> None:
        now_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        who = (config.cluster, config.host, config.target, config.role)
        self._queue.append(t.Began(t.FORMAT, t.VERSION, now_ns, wall_ns, *who, os.getpid(), config.seed))
        for vm in self._vms.values():
            self._note_vm(vm)

    def _note_vm(self, vm: VmEntry) -> None:
        self._queue.append(t.VmKnown(vm.lpid, vm.name, vm.incarnation, vm.time))

    def _make_tap(self, it: _End) -> Tap:
        """What notes the messages of one end: as little as will do, since it is on the path of each of them."""
        entry, clock = it.entry, it.clock
        index = self._n_links
        self._n_links += 1
        if entry.kind in CONFIDENTIAL_LINKS:
            self._confidential.add(index)
        self._queue.append(t.LinkOpened(index, entry.id, entry.kind, entry.vm, entry.peer))
        queue, append, now_ns, seen = self._queue, self._queue.append, time.monotonic_ns, t.MessageSeen

        def tap(outward: bool, frames: Sequence[bytes]) -> None:
            frame = frames[0]
            if len(queue) < MAX_QUEUED and (len(frame) < LARGE_BYTES or self._takes_large(len(frame))):
                append(seen(now_ns(), index, outward, frame, None if clock is None else clock()))
            else:
                self._n_lost += 1

        return tap

    def _takes_large(self, n_bytes: int) -> bool:
        with self._large_lock:
            if self._large_bytes + n_bytes > MAX_LARGE_BYTES:
                return False
            self._large_bytes += n_bytes
            return True

    # -- what happens besides messages: only while `on` ----------------------------------------------------------

    def page_changed(self, lpid: int, gfn: int, before: str, event: str, after: str, cause: int) -> None:
        """A frame of a secure VM is in another state."""
        self._note(t.PageChanged(time.monotonic_ns(), lpid, gfn, before, event, after, cause))

    def interrupt_moved(self, lpid: int, source: int, step: t.InterruptStep, cause: int) -> None:
        """An interrupt was raised or accepted."""
        self._note(t.InterruptMoved(time.monotonic_ns(), lpid, source, step, cause))

    def request_moved(self, request: t.RequestMoved) -> None:
        """A device begins or has ended a request."""
        self._note(request)

    def migration_stepped(self, lpid: int, side: str, status: str, cause: int) -> None:
        """A migration is in another status."""
        self._note(t.MigrationStepped(time.monotonic_ns(), lpid, side, status, cause))

    def _note(self, entry: t.AnyEntry) -> None:
        if len(self._queue) < MAX_QUEUED:
            self._queue.append(entry)
        else:
            self._n_lost += 1

    # -- writing ----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `flush` has something to do."""
        return bool(self._queue or self._unwritten or (self._n_lost > self._n_lost_told and not self.is_full))

    def flush(self) -> None:
        """Write what is queued. On a full disk it stays queued, then is lost and counted; the process goes on.

        Afterwards the file may be full (`is_full`): whoever flushes then switches off, in the thread of the links.
        """
        with self._writing:
            while self._write_out() and self._queue:
                n = min(len(self._queue), _ENTRIES_A_WRITE)
                encoded = b"".join([self._encoded(self._queue.popleft()) for _ in range(n)])
                if self.is_full:
                    continue
                self._unwritten = encoded
                if self._n_bytes + len(encoded) > MAX_FILE_BYTES:
                    self.is_full = True
                    self._unwritten += _lost(0, "the file is full: recording has ended")
                time.sleep(0)
            if not self._unwritten and not self.is_full and self._n_lost > self._n_lost_told:
                n_lost, self._n_lost_told = self._n_lost - self._n_lost_told, self._n_lost
                self._unwritten = _lost(n_lost, "the queue was full")
                self._write_out()

    def _encoded(self, entry: t.AnyEntry) -> bytes:
        if isinstance(entry, t.MessageSeen):
            if len(entry.frame) >= LARGE_BYTES:
                with self._large_lock:
                    self._large_bytes -= len(entry.frame)
            if entry.link in self._confidential:
                frame, withheld = written_form(entry.frame)
                if withheld:
                    entry = msgspec.structs.replace(entry, frame=frame, withheld=True)
        return t.encode_entry(entry)

    def _write_out(self) -> bool:
        """Whether all that was encoded is in the file: no entry begins behind a piece of another."""
        assert self._fd is not None or not self._unwritten
        while self._unwritten and self._fd is not None:
            try:
                n = os.write(self._fd, self._unwritten)
            except OSError:
                return False
            self._n_bytes += n
            self._unwritten = self._unwritten[n:]
        return True


def _lost(n_entries: int, reason: str) -> bytes:
    return t.encode_entry(t.Lost(time.monotonic_ns(), n_entries, reason))


UNTRACED = Tracer(None, None)
"""For what belongs to no process that records."""
