"""The disk workload: random reads and writes of the scratch partition, each read checked against what was written."""

from __future__ import annotations

import hashlib
import zlib

from services.guest.model.cpu import Busy, Cpu, Step
from services.guest.model.pages import PageAllocator, PageUse, pages_for
from services.guest.model.random_numbers import next_random
from services.guest.model.state import DiskLoad, Owner
from services.guest.model.virtio_blk import BlkDriver, Finished, NoRoom
from shared.virtio_blk import SECTOR_BYTES, BlkRequest

BLOCK_BYTES = 32 * 1024
BLOCK_SECTORS = BLOCK_BYTES // SECTOR_BYTES
N_BUFFERS = 4
FLUSH_EVERY = 64
MAX_BLOCKS = 8192
_FLUSH_COOKIE = N_BUFFERS
_WRITTEN = 1 << 32
_MASK = (1 << 64) - 1


def block_content(generation: int) -> bytes:
    """The content of write number `generation`."""
    seed = hashlib.sha256(b"pefbox block %d" % generation).digest()
    return seed * (BLOCK_BYTES // len(seed))


class DiskWorkload:
    """Over `state`; an entry of the table is 0 until its block is written, then 2**32 + CRC-32."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, blk: BlkDriver, state: DiskLoad) -> None:
        self._cpu = cpu
        self._pages = pages
        self._blk = blk
        self._state = state

    def start(self, n_sectors: int, seed: int) -> bool:
        """Begin on a partition of `n_sectors`; False when it holds no block."""
        state = self._state
        state.n_blocks = min(n_sectors // BLOCK_SECTORS, MAX_BLOCKS)
        if not state.n_blocks:
            return False
        state.table = self._pages.must_alloc(pages_for(8 * state.n_blocks), PageUse.KERNEL)
        state.buffers = self._pages.must_alloc(pages_for(N_BUFFERS * BLOCK_BYTES), PageUse.BUFFER)
        self._cpu.fill(state.table, 8 * state.n_blocks)
        state.random, state.started = seed & _MASK or 1, True
        return True

    def work(self, first_sector: int, limit: int) -> Step[None] | None:
        """Issue the next request; `limit` requests in all, 0 for no end."""
        state = self._state
        if not state.started or state.error or state.finished or state.flushing:
            return None
        if limit and state.n_issued >= limit:
            state.finished = not state.busy
            return None
        if state.n_issued and state.n_issued % FLUSH_EVERY == 0 and self._blk.state.flush:
            return None if state.busy else self._flush()
        return self._issue(first_sector) if len(state.busy) < min(N_BUFFERS, state.n_blocks) else None

    def _issue(self, first_sector: int) -> Step[None]:
        state = self._state
        value = next_random(state.random)
        block, writes = (value >> 8) % state.n_blocks, bool(value & 1) and not self._blk.state.read_only
        if any(block == other for other, _ in state.busy.values()):
            # Two requests of one block have no order while both are in flight.
            state.random = value
            return
        buffer = next(n for n in range(N_BUFFERS) if n not in state.busy)
        gpa = state.buffers + buffer * BLOCK_BYTES
        if writes:
            data = block_content(state.generation + 1)
            self._cpu.store(gpa, data)
        kind = BlkRequest.OUT if writes else BlkRequest.IN
        sector = first_sector + block * BLOCK_SECTORS
        if not (yield from self._blk.submit(kind, sector, gpa, BLOCK_BYTES, Owner.DISK, buffer)):
            raise Busy("the disk") if state.busy else NoRoom(self.fail)
        if writes:
            state.generation += 1
            self._cpu.store(state.table + 8 * block, (_WRITTEN | zlib.crc32(data)).to_bytes(8, "little"))
        state.busy[buffer] = (block, writes)
        state.random = value
        state.n_issued += 1
        yield from self._blk.kick()

    def _flush(self) -> Step[None]:
        if not (yield from self._blk.submit(BlkRequest.FLUSH, 0, 0, 0, Owner.DISK, _FLUSH_COOKIE)):
            raise Busy("the queue")
        self._state.flushing = True
        yield from self._blk.kick()

    def on_finished(self, finished: Finished) -> None:
        """The outcome of one of its requests; a read that differs from what was written is an error."""
        state = self._state
        if finished.cookie == _FLUSH_COOKIE:
            state.flushing = False
            state.n_issued += 1
        block, written = state.busy.pop(finished.cookie, (0, True))
        if finished.error:
            self.fail(finished.error)
        elif finished.cookie == _FLUSH_COOKIE or written:
            state.n_writes += finished.cookie != _FLUSH_COOKIE
        else:
            state.n_reads += 1
            self._check(block, state.buffers + finished.cookie * BLOCK_BYTES)

    def _check(self, block: int, gpa: int) -> None:
        entry = int.from_bytes(self._cpu.load(self._state.table + 8 * block, 8), "little")
        crc = zlib.crc32(self._cpu.load(gpa, BLOCK_BYTES))
        if not entry:
            self._cpu.store(self._state.table + 8 * block, (_WRITTEN | crc).to_bytes(8, "little"))
        elif entry != _WRITTEN | crc:
            self.fail(f"block {block} does not hold what was written")

    def fail(self, error: str) -> None:
        """End the workload with an error."""
        if self._state.started:
            self._state.error = self._state.error or error

    def describe(self) -> str:
        """Progress for the operator."""
        state = self._state
        return f"reads={state.n_reads} writes={state.n_writes}"
