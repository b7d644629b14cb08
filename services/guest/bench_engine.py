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
from typing import Any, Protocol

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.hcalls import H_CPPR
from services.guest.address_space import AddressSpace
from services.guest.exits import Exit, Hypercall, Idle, Pause
from services.guest.model import xics
from services.guest.model.cpu import Clock
from services.guest.model.engine import ModelEngine

MAX_CALLS = 20_000
MAX_PAGES = 8192
PAGES_A_TURN = 8
POLL_NS = 50_000_000
"""An idle bench kernel looks for a job this often."""

Done = Callable[[Any], None]


class Job(Protocol):
    """Something to do at a safe point of the model kernel. `done` is told the outcome, once."""

    def run(self) -> Exit | None:
        """The next exit, or None when the job is over."""

    def resume(self, result: list[int]) -> None:
        """The outcome of that exit."""


class HypercallJob:
    """`n_calls` hypercalls that do nothing (H_CPPR), back to back. Outcome: nanoseconds of each."""

    def __init__(self, n_calls: int, done: Done) -> None:
        if not 1 <= n_calls <= MAX_CALLS:
            raise UserError(f"n must be 1 to {MAX_CALLS}")
        self._n_calls = n_calls
        self._done = done
        self._exit = Hypercall(H_CPPR.number, (xics.ALLOW_ALL,))
        self._times_ns: list[int] = []
        self._last_ns = 0

    def run(self) -> Exit | None:
        """From one exit to the next is one call: with all that the processor does in between."""
        now_ns = time.perf_counter_ns()
        if self._last_ns:
            self._times_ns.append(now_ns - self._last_ns)
        if len(self._times_ns) == self._n_calls:
            self._done(self._times_ns)
            return None
        self._last_ns = now_ns
        return self._exit

    def resume(self, result: list[int]) -> None:
        """A refused call would be a figure of something else."""
        if result[0]:
            raise RuntimeError(f"the null hypercall ended with {result[0]}")


class MemoryJob:
    """Loads or stores over `n_pages` from `gfn`, one page a turn. Outcome: what `work` gave for each page."""

    def __init__(self, work: Callable[[int], Any], gfn: int, n_pages: int, done: Done) -> None:
        if not (gfn >= 0 and 1 <= n_pages <= MAX_PAGES):
            raise UserError(f"n must be 1 to {MAX_PAGES}")
        self._work = work
        self._pages = iter(range(gfn, gfn + n_pages))
        self._results: list[Any] = []
        self._done = done

    def run(self) -> Exit | None:
        """The next pages; a fault is resolved inside the access."""
        pages = list(itertools.islice(self._pages, PAGES_A_TURN))
        if not pages:
            self._done(self._results)
            return None
        self._results += [self._work(gfn) for gfn in pages]
        return Pause.SLICE_END

    def resume(self, result: list[int]) -> None:
        """Never called: there are no exits."""


class BenchEngine(ModelEngine):
    """The model kernel with jobs."""

    def __init__(self, memory: AddressSpace, clock: Clock) -> None:
        super().__init__(memory, clock)
        self._ram = memory
        self._time = clock
        self._job: Job | None = None
        self._job_called = False

    def job(self, what: str, arguments: dict[str, Any], done: Done) -> Job:
        """A new job: `hypercalls {n}`; `fill`, `digest` or `touch {gfn, n}`. Raises UserError, KeyError."""
        n = int(arguments.get("n", 1))
        if what == "hypercalls":
            return HypercallJob(n, done)
        work = {"fill": self._fill, "digest": self._digest, "touch": self._touch}[what]
        return MemoryJob(work, int(arguments["gfn"]), n, done)

    def take(self, job: Job) -> None:
        """Do `job` next; one that is under way is dropped. In the processor's thread."""
        if not self._job_called:
            self._job = job

    def run(self, slice_ns: int) -> Exit:
        """As ModelEngine; a job goes first wherever the kernel is at a safe point."""
        if self._job is not None and self.at_safe_point:
            exit_ = self._job.run()
            if exit_ is not None:
                self._job_called = exit_ is not Pause.SLICE_END
                return exit_
            self._job = None
        exit_ = super().run(slice_ns)
        if isinstance(exit_, Idle):
            look_ns = self._time.now_ns() + POLL_NS
            return Idle(min(exit_.until_ns or look_ns, look_ns), exit_.device_open)
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

    def _fill(self, gfn: int) -> None:
        self._ram.store(gfn << PAGE_SHIFT, os.urandom(PAGE_BYTES))

    def _digest(self, gfn: int) -> bytes:
        return hashlib.blake2b(self._ram.load(gfn << PAGE_SHIFT, PAGE_BYTES), digest_size=8).digest()

    def _touch(self, gfn: int) -> int:
        """Nanoseconds from the load to its value: of a page that is out, one fault."""
        before_ns = time.perf_counter_ns()
        self._ram.load_u8(gfn << PAGE_SHIFT)
        return time.perf_counter_ns() - before_ns
