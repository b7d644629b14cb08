"""A measured run of disk requests: so many, of one size, so many at a time, each timed from submission to its taking.

Positions of a random run follow from a seed, so the same run makes the same requests.
"""

from __future__ import annotations

from enum import StrEnum

from services.guest.model.cpu import Cpu, Step
from services.guest.model.pages import PageAllocator, PageUse, pages_for
from services.guest.model.random_numbers import next_random
from services.guest.model.run_tally import RunTally
from services.guest.model.state import IoRun, Owner, Pool
from services.guest.model.virtio_blk import BlkDriver, Finished, NoRoom
from shared.virtio_blk import SECTOR_BYTES, BlkRequest

MAX_DEPTH = 32
MAX_BUFFER_BYTES = 8 << 20
_SEED = 0x9E3779B97F4A7C15


class IoKind(StrEnum):
    """What a run does. Writes go to the scratch partition, reads to the whole disk."""

    READ = "read"
    WRITE = "write"
    RANDREAD = "randread"


class IoRunner:
    """One run at a time over `state`."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, pool: Pool, blk: BlkDriver, state: IoRun) -> None:
        self._cpu = cpu
        self._pages = pages
        self._blk = blk
        self._state = state
        self._tally = RunTally(cpu, pages, pool, state.tally)

    def start(self, kind: IoKind, first_sector: int, n_sectors: int, block_bytes: int, depth: int, count: int) -> None:
        """Begin `count` requests of `block_bytes` in the given range of the disk, `depth` at a time."""
        state = self._state
        n_buffer_pages = pages_for(depth * block_bytes)
        if state.buffers and state.n_buffer_pages < n_buffer_pages:
            self._pages.free(state.buffers, state.n_buffer_pages)
            state.buffers = 0
        if not state.buffers:
            state.buffers = self._pages.must_alloc(n_buffer_pages, PageUse.BUFFER)
            state.n_buffer_pages = n_buffer_pages
            self._cpu.fill(state.buffers, depth * block_bytes, 0x5A)
        self._tally.begin()
        state.kind, state.first_sector, state.block_bytes = kind, first_sector, block_bytes
        state.n_blocks, state.depth, state.count = n_sectors * SECTOR_BYTES // block_bytes, depth, count
        state.n_issued = 0
        state.random, state.error, state.free = _SEED, "", list(range(depth))
        state.submitted = {}

    @property
    def finished(self) -> bool:
        """Whether all requests have come back, or none will."""
        state = self._state
        return bool(state.count) and not state.submitted and (state.tally.n_done == state.count or bool(state.error))

    def work(self) -> Step[None] | None:
        """Issue what fits."""
        state = self._state
        may_issue = state.n_issued < state.count and state.free and not state.error
        return self._issue() if may_issue else None

    def _issue(self) -> Step[None]:
        state = self._state
        kind = BlkRequest.OUT if state.kind == IoKind.WRITE else BlkRequest.IN
        while state.free and state.n_issued < state.count:
            buffer = state.free[-1]
            block, random = self._next_block()
            sector = state.first_sector + block * state.block_bytes // SECTOR_BYTES
            gpa = state.buffers + buffer * state.block_bytes
            if not (yield from self._blk.submit(kind, sector, gpa, state.block_bytes, Owner.IO_RUN, buffer)):
                if not state.submitted:
                    raise NoRoom(self.fail)
                break
            state.free.pop()
            state.random = random
            state.submitted[buffer] = self._cpu.clock.now_ns()
            state.n_issued += 1
            if self._blk.translated:
                break
        yield from self._blk.kick()

    def _next_block(self) -> tuple[int, int]:
        state = self._state
        if state.kind == IoKind.RANDREAD:
            random = next_random(state.random)
            return (random >> 8) % state.n_blocks, random
        return state.n_issued % state.n_blocks, state.random

    def on_finished(self, finished: Finished) -> None:
        """The outcome of one of its requests."""
        state = self._state
        submitted_ns = state.submitted.pop(finished.cookie, None)
        if submitted_ns is None:
            return
        state.error = state.error or finished.error
        self._tally.done(submitted_ns)
        state.free.append(finished.cookie)
        if state.tally.n_done == state.count:
            self._tally.end()

    def fail(self, error: str) -> None:
        """The queue is broken: nothing more will come."""
        if self._state.count:
            self._state.error = self._state.error or error
            self._state.submitted = {}

    def describe(self) -> str:
        """The result line, as RunTally.describe."""
        return self._tally.describe(self._state.tally.n_done * self._state.block_bytes)
