"""What a measured run costs: each request's time, the calls made meanwhile, the bytes bounced."""

from __future__ import annotations

import struct

from protocol.hcalls import H_GET_TERM_CHAR, H_PUT_TERM_CHAR
from services.guest.model.cpu import Cpu
from services.guest.model.pages import PageAllocator, PageUse, pages_for
from services.guest.model.state import Pool, Tally

MAX_REQUESTS = 1 << 16
_NOT_OF_THE_RUN = frozenset({H_GET_TERM_CHAR.name, H_PUT_TERM_CHAR.name})
_MAX_NS = (1 << 32) - 1


class RunTally:
    """Over `state`, which belongs to one run at a time."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, pool: Pool, state: Tally) -> None:
        self._cpu = cpu
        self._pages = pages
        self._pool = pool
        self._state = state

    def begin(self) -> None:
        """A run begins."""
        state = self._state
        state.times = state.times or self._pages.must_alloc(pages_for(4 * MAX_REQUESTS), PageUse.BUFFER)
        state.n_done = 0
        state.calls_before, state.bounced_before = dict(self._cpu.calls.counts), self._pool.bytes_bounced
        state.began_ns = state.ended_ns = self._cpu.clock.now_ns()

    def done(self, submitted_ns: int) -> None:
        """A request that was submitted then is done now; at most MAX_REQUESTS are kept."""
        state = self._state
        state.ended_ns = self._cpu.clock.now_ns()
        took_ns = min(state.ended_ns - submitted_ns, _MAX_NS)
        self._cpu.memory.store(state.times + 4 * state.n_done, took_ns.to_bytes(4, "little"))
        state.n_done += 1

    def end(self) -> None:
        """The run is over: add up what it cost; the terminal's calls are not its own."""
        state = self._state
        spent = {name: n - state.calls_before.get(name, 0) for name, n in self._cpu.calls.counts.items()}
        state.calls = {name: n for name, n in sorted(spent.items()) if n and name not in _NOT_OF_THE_RUN}
        state.bounced_bytes = self._pool.bytes_bounced - state.bounced_before

    def describe(self, n_bytes: int) -> str:
        """The result line: requests, bytes, how long it took, the median and the 99th percentile of a request, bytes
        that were bounced, calls by name."""
        state = self._state
        p50, p99 = self.percentiles()
        timing = f"requests {state.n_done} bytes {n_bytes} ns {state.ended_ns - state.began_ns}"
        calls = " ".join(f"{name}={n}" for name, n in state.calls.items())
        return f"{timing} p50_ns {p50} p99_ns {p99} bounced {state.bounced_bytes} calls {calls}"

    def percentiles(self) -> tuple[int, int]:
        """The median and the 99th percentile of a request, in nanoseconds; 0 when none was done."""
        n_done = self._state.n_done
        times = sorted(struct.unpack(f"<{n_done}I", self._cpu.memory.load(self._state.times, 4 * n_done)))
        return (times[len(times) // 2], times[len(times) * 99 // 100]) if times else (0, 0)
