"""Writing a region of the scratch partition and flushing it.

The buffer begins and ends in the middle of a page, so that other private bytes lie beside it.
"""

from __future__ import annotations

import hashlib

from services.guest.model.cpu import Cpu, Step
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.state import Owner, Writer
from services.guest.model.virtio_blk import BlkDriver, Finished, NoRoom
from shared.virtio_blk import ID_BYTES, SECTOR_BYTES, BlkRequest

REGION_BYTES = 64 * 1024
BUFFER_OFFSET = 0x1000
_BUFFER_PAGES = 2


def region_pattern(generation: int, n_bytes: int) -> bytes:
    """What write number `generation` puts on the disk: SHA-256 of a counter, block after block."""
    blocks = (b"pefbox region %d %d" % (generation, n) for n in range(-(-n_bytes // 32)))
    return b"".join(hashlib.sha256(block).digest() for block in blocks)[:n_bytes]


class RegionWriter:
    """One write and flush at a time over `state`."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, blk: BlkDriver, state: Writer) -> None:
        self._cpu = cpu
        self._pages = pages
        self._blk = blk
        self._state = state

    def prepare(self) -> int:
        """The gpa of the two pages around the region's bytes; they are kept for good."""
        if not self._state.buffer:
            self._state.buffer = self._pages.must_alloc(_BUFFER_PAGES, PageUse.BUFFER)
            self._cpu.fill(self._state.buffer, _BUFFER_PAGES << 16)
        return self._state.buffer

    def start(self, sector: int, n_bytes: int, *, kind: BlkRequest = BlkRequest.OUT, asked: bool) -> None:
        """Write `n_bytes` (at most REGION_BYTES) at `sector`: a new pattern, zeros, or nothing that is kept."""
        state = self._state
        gpa = self.prepare() + BUFFER_OFFSET
        n_bytes = ID_BYTES if kind is BlkRequest.GET_ID else min(n_bytes, REGION_BYTES, self._blk.max_bytes)
        data = bytes(n_bytes)
        if kind is BlkRequest.OUT:
            state.generation += 1
            data = region_pattern(state.generation, n_bytes)
        self._cpu.store(gpa, data)
        state.sha256 = hashlib.sha256(data).hexdigest()
        state.stage, state.asked, state.kind, state.sector = 1, asked, kind, sector
        state.n_bytes, state.error = n_bytes, ""

    def work(self) -> Step[None] | None:
        """Submit what is next."""
        return self._submit() if self._state.stage in (1, 3) else None

    def _submit(self) -> Step[None]:
        state = self._state
        kind = BlkRequest(state.kind) if state.stage == 1 else BlkRequest.FLUSH
        gpa = state.buffer + BUFFER_OFFSET
        if not (yield from self._blk.submit(kind, state.sector, gpa, state.n_bytes, Owner.WRITER, state.stage)):
            raise NoRoom(self.fail)
        state.stage += 1
        yield from self._blk.kick()

    def on_finished(self, finished: Finished) -> None:
        """The outcome of one of its requests."""
        if finished.error:
            self.fail(finished.error)
        elif self._state.stage == 2:
            flushes = self._blk.state.flush and self._state.kind != BlkRequest.GET_ID
            self._state.stage = 3 if flushes else 5
        else:
            self._state.stage = 5

    def fail(self, error: str) -> None:
        """End with an error."""
        if self._state.stage in (1, 2, 3, 4):
            self._state.stage, self._state.error = 5, error

    def describe(self) -> str:
        """The result line."""
        state = self._state
        if state.kind == BlkRequest.GET_ID:
            text = self._cpu.load(state.buffer + BUFFER_OFFSET, ID_BYTES).split(b"\0")[0]
            return "".join(char if char.isprintable() else "?" for char in text.decode("ascii", "replace"))
        return f"{state.sector} {state.n_bytes // SECTOR_BYTES} sha256 {state.sha256}"
