"""The engine of `kernel = "bench"`: the model kernel, and jobs that an operator gives it between two of its steps.

A job uses the processor as any kernel does: it leaves `run` with a hypercall, it loads and stores through the address
space. So what it times is the real path through processor, links, kvm and ultravisor. The model kernel boots the VM,
turns it secure and goes on when a job is done.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.hcalls import H_IPOLL
from services.guest.address_space import AddressSpace
from services.guest.exits import Exit, Hypercall, Idle, Pause
from services.guest.model.bulk import CHUNK_BYTES, DEPTH
from services.guest.model.cpu import Clock
from services.guest.model.engine import ModelEngine
from services.guest.model.pages import PageUse
from services.guest.model.parts import Parts

MAX_CALLS = 20_000
MAX_PAGES = 8192
MAX_WALK_MS = 10_000
MAX_READ_BYTES = 1 << 30
PAGES_A_TURN = 8
POLL_NS = 50_000_000
"""An idle bench kernel looks for a job this often."""
_NS_PER_MS = 1_000_000
_READ_BUFFERS = 2 * DEPTH
_READ_PAGES = _READ_BUFFERS * CHUNK_BYTES // PAGE_BYTES

Done = Callable[[Any], None]


class Turn(Enum):
    """What a job wants when it has no exit to make."""

    KERNEL = "the kernel goes on"
    OVER = "the job is over"


class Job(Protocol):
    """Something to do at safe points of the model kernel; it tells its outcome once, to the `done` it was made with."""

    def run(self) -> Exit | Turn:
        """The next exit, or what should happen instead."""

    def resume(self, result: list[int]) -> None:
        """The outcome of a hypercall that `run` gave."""

    def is_ready(self) -> bool:
        """Whether there is something to do before the processor may idle."""


class HypercallJob:
    """`n_calls` hypercalls that change nothing (H_IPOLL), back to back. Outcome: nanoseconds of each."""

    def __init__(self, n_calls: int, done: Done) -> None:
        if not 1 <= n_calls <= MAX_CALLS:
            raise UserError(f"n must be 1 to {MAX_CALLS}")
        self._n_calls = n_calls
        self._done = done
        self._exit = Hypercall(H_IPOLL.number, (0,))
        self._times_ns: list[int] = []
        self._last_ns = 0

    def run(self) -> Exit | Turn:
        """From one exit to the next is one call: with all that the processor does in between."""
        now_ns = time.perf_counter_ns()
        if self._last_ns:
            self._times_ns.append(now_ns - self._last_ns)
        if len(self._times_ns) == self._n_calls:
            self._done(self._times_ns)
            return Turn.OVER
        self._last_ns = now_ns
        return self._exit

    def resume(self, result: list[int]) -> None:
        """A refused call would be a figure of something else."""
        if result[0]:
            raise RuntimeError(f"the null hypercall ended with {result[0]}")

    def is_ready(self) -> bool:
        """Always: the next call."""
        return True


class MemoryJob:
    """Loads or stores over `n_pages` from `gfn`, one page a turn. Outcome: what `work` gave for each page."""

    def __init__(self, work: Callable[[int], Any], gfn: int, n_pages: int, done: Done) -> None:
        if not (gfn >= 0 and 1 <= n_pages <= MAX_PAGES):
            raise UserError(f"n must be 1 to {MAX_PAGES}")
        self._work = work
        self._pages = iter(range(gfn, gfn + n_pages))
        self._results: list[Any] = []
        self._done = done

    def run(self) -> Exit | Turn:
        """The next pages; a fault is resolved inside the access."""
        pages = list(itertools.islice(self._pages, PAGES_A_TURN))
        if not pages:
            self._done(self._results)
            return Turn.OVER
        self._results += [self._work(gfn) for gfn in pages]
        return Pause.SLICE_END

    def resume(self, result: list[int]) -> None:
        """Never called: there are no hypercalls."""

    def is_ready(self) -> bool:
        """Always: the next pages."""
        return True


class WalkJob:
    """Loads from `n_pages` from `gfn` over and over for `ms`: a guest that is never idle. Outcome: how many loads."""

    def __init__(self, load: Callable[[int], Any], gfns: range, ms: int, done: Done) -> None:
        if not (gfns.start >= 0 and 1 <= len(gfns) <= MAX_PAGES and 1 <= ms <= MAX_WALK_MS):
            raise UserError(f"n must be 1 to {MAX_PAGES}, ms 1 to {MAX_WALK_MS}")
        self._load = load
        self._pages = itertools.cycle(gfns)
        self._end_ns = time.perf_counter_ns() + ms * _NS_PER_MS
        self._n_loads = 0
        self._done = done

    def run(self) -> Exit | Turn:
        """The next pages."""
        if time.perf_counter_ns() >= self._end_ns:
            self._done(self._n_loads)
            return Turn.OVER
        for gfn in itertools.islice(self._pages, PAGES_A_TURN):
            self._load(gfn)
        self._n_loads += PAGES_A_TURN
        return Pause.SLICE_END

    def resume(self, result: list[int]) -> None:
        """Never called: there are no hypercalls."""

    def is_ready(self) -> bool:
        """Always: the next pages."""
        return True


class DiskReadJob:
    """Read the first `n_bytes` of the disk through the kernel's driver and DMA layer, several requests deep.

    Outcome: nanoseconds until the last byte lay in a buffer of the guest's own, and the calls made meanwhile by name.
    """

    def __init__(self, parts: Parts, n_bytes: int, done: Done) -> None:
        if not parts.state.blk.ready or parts.state.bulk.active:
            raise UserError("there is no disk that could be read now")
        if not 0 < n_bytes <= MAX_READ_BYTES or n_bytes % CHUNK_BYTES:
            raise UserError(f"n must be a multiple of {CHUNK_BYTES} up to {MAX_READ_BYTES}")
        self._parts = parts
        self._n_bytes = n_bytes
        self._done = done
        self._buffers: int | None = None
        self._started_ns = 0
        self._calls_before: dict[str, int] = {}

    def run(self) -> Exit | Turn:
        """Take what has arrived; the kernel's own steps issue the requests."""
        if self._buffers is None:
            self._start()
        reader, bulk = self._parts.reader, self._parts.state.bulk
        while reader.has_chunk():
            reader.consume()
        if not reader.finished:
            return Turn.KERNEL
        took_ns = time.perf_counter_ns() - self._started_ns
        bulk.active = False
        self._parts.pages.free(bulk.buffers, _READ_PAGES)
        self._done({"ns": took_ns, "error": bulk.error, "calls": self._calls()})
        return Turn.OVER

    def _start(self) -> None:
        self._buffers = self._parts.pages.must_alloc(_READ_PAGES, PageUse.BUFFER)
        self._calls_before = dict(self._parts.state.calls.counts)
        self._started_ns = time.perf_counter_ns()
        self._parts.reader.start(0, self._n_bytes, self._buffers, _READ_BUFFERS, CHUNK_BYTES)

    def _calls(self) -> dict[str, int]:
        counts = self._parts.state.calls.counts
        deltas = {name: count - self._calls_before.get(name, 0) for name, count in counts.items()}
        return {name: delta for name, delta in deltas.items() if delta}

    def resume(self, result: list[int]) -> None:
        """Never called: the kernel makes the calls."""

    def is_ready(self) -> bool:
        """Whether a chunk waits to be taken."""
        return self._parts.reader.has_chunk() or self._parts.reader.finished


class AllocJob:
    """Take `n_pages` in a row from the kernel's allocator, for good. Outcome: the first GFN; None: no such run."""

    def __init__(self, parts: Parts, n_pages: int, done: Done) -> None:
        self._parts, self._n_pages, self._done = parts, n_pages, done

    def run(self) -> Exit | Turn:
        """All at once."""
        gpa = self._parts.pages.alloc(self._n_pages, PageUse.BUFFER)
        self._done(None if gpa is None else gpa >> PAGE_SHIFT)
        return Turn.OVER

    def resume(self, result: list[int]) -> None:
        """Never called: there are no hypercalls."""

    def is_ready(self) -> bool:
        """Always."""
        return True


class BenchEngine(ModelEngine):
    """The model kernel with jobs."""

    def __init__(self, memory: AddressSpace, clock: Clock) -> None:
        super().__init__(memory, clock)
        self._ram = memory
        self._time = clock
        self._job: Job | None = None
        self._job_called = False

    def job(self, what: str, arguments: dict[str, Any], done: Done) -> Job:
        """A new job: `hypercalls {n}`; `fill`, `digest` or `touch {gfn, n}`; `walk {gfn, n, ms}`; `read {n}` bytes;
        `alloc {n}` pages.

        Raises UserError, KeyError.
        """
        n = int(arguments.get("n", 1))
        if what == "hypercalls":
            return HypercallJob(n, done)
        if what == "read":
            return DiskReadJob(self._kernel._parts, n, done)
        if what == "alloc":
            return AllocJob(self._kernel._parts, n, done)
        gfn = int(arguments["gfn"])
        if what == "walk":
            return WalkJob(self._touch, range(gfn, gfn + n), int(arguments["ms"]), done)
        work = {"fill": self._fill, "digest": self._digest, "touch": self._touch}[what]
        return MemoryJob(work, gfn, n, done)

    def take(self, job: Job) -> None:
        """Do `job` next; one that is under way is dropped. In the processor's thread."""
        if not self._job_called:
            self._job = job

    def run(self, slice_ns: int) -> Exit:
        """As ModelEngine; a job goes first wherever the kernel is at a safe point."""
        end_ns = 0
        while True:
            if self._job is not None and self.at_safe_point:
                exit_ = self._run_job(self._job)
                if exit_ is not None:
                    return exit_
            end_ns = end_ns or self._time.now_ns() + slice_ns
            exit_ = super().run(slice_ns if self._job is None else 0)
            if exit_ is Pause.SLICE_END and self._job is not None and self._time.now_ns() < end_ns:
                continue
            if not isinstance(exit_, Idle):
                return exit_
            if self._job is None or not self._job.is_ready():
                look_ns = self._time.now_ns() + POLL_NS
                return Idle(min(exit_.until_ns or look_ns, look_ns), exit_.device_open)

    def _run_job(self, job: Job) -> Exit | None:
        exit_ = job.run()
        if exit_ is Turn.OVER:
            self._job = None
        if isinstance(exit_, Turn):
            return None
        self._job_called = exit_ is not Pause.SLICE_END
        return exit_

    def resume(self, result: list[int]) -> None:
        """As ModelEngine, for whoever made the call."""
        if not self._job_called:
            super().resume(result)
            return
        self._job_called = False
        assert self._job is not None
        self._job.resume(result)

    def start(self, pc: int, gprs: dict[int, int], *, secure: bool) -> None:
        """As ModelEngine; a job does not survive it."""
        self._job, self._job_called = None, False
        super().start(pc, gprs, secure=secure)

    def load(self, state: bytes) -> None:
        """As ModelEngine. A job is no part of a state: it stays where it was begun, and goes on there or not at all."""
        self._job, self._job_called = None, False
        super().load(state)

    def _fill(self, gfn: int) -> None:
        self._ram.store(gfn << PAGE_SHIFT, os.urandom(PAGE_BYTES))

    def _digest(self, gfn: int) -> bytes:
        return hashlib.blake2b(self._ram.load(gfn << PAGE_SHIFT, PAGE_BYTES), digest_size=8).digest()

    def _touch(self, gfn: int) -> int:
        """Nanoseconds from the load to its value: of a page that is out, one fault."""
        before_ns = time.perf_counter_ns()
        self._ram.load_u8(gfn << PAGE_SHIFT)
        return time.perf_counter_ns() - before_ns
