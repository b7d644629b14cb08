"""The plain SHA-256 of the whole disk, read through the DMA layer.

hashlib cannot export a running digest, so the digest object is a cache that belongs to `position`, the number of bytes
consumed, and is no part of the state. After a load the cache is missing and is made again: from the page cache, when
every byte read stays in guest RAM (the default while half of the free memory is enough; makes no exit and costs no
guest time), else by reading the disk from its beginning (`restarts` counts that).
"""

from __future__ import annotations

import hashlib

from protocol.geometry import PAGE_SHIFT
from services.guest.model.bulk import CHUNK_BYTES, DEPTH, BulkReader
from services.guest.model.cpu import Cpu, Step
from services.guest.model.pages import PageAllocator, PageUse, pages_for
from services.guest.model.state import Bulk, DiskHash
from shared.virtio_blk import SECTOR_BYTES

REBUILD_BYTES_A_STEP = 2 << 20


class DiskHasher:
    """Hashes a disk range over `state`."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, reader: BulkReader, bulk: Bulk, state: DiskHash) -> None:
        self._cpu = cpu
        self._pages = pages
        self._reader = reader
        self._bulk = bulk
        self._state = state
        self._digest = hashlib.sha256()
        self._digest_at = 0

    def start(self, n_bytes: int, max_bytes: int, n_free_pages: int, *, page_cache: bool, asked: bool) -> None:
        """Hash the first `n_bytes` (a multiple of 512) of the disk; `work` until it is no longer active."""
        chunk_bytes = min(CHUNK_BYTES, max_bytes // SECTOR_BYTES * SECTOR_BYTES)
        n_chunks = max(1, -(-n_bytes // chunk_bytes))
        n_pages = pages_for(n_chunks * chunk_bytes)
        cached = page_cache and n_pages <= n_free_pages // 2
        buffers = self._pages.alloc(n_pages, PageUse.BUFFER) if cached else None
        n_buffers = n_chunks
        if buffers is None:
            cached, n_buffers = False, min(n_chunks, DEPTH)
            n_pages = pages_for(n_buffers * chunk_bytes)
            buffers = self._pages.must_alloc(n_pages, PageUse.BUFFER)
        state = self._state
        state.active, state.asked, state.position, state.cached, state.n_pages = True, asked, 0, cached, n_pages
        state.result = state.error = ""
        self._digest, self._digest_at = hashlib.sha256(), 0
        self._reader.start(0, n_bytes, buffers, n_buffers, chunk_bytes)

    @property
    def rebuilding(self) -> bool:
        """Whether the digest cache lags behind: host work that the guest's clock does not see."""
        return self._state.active and self._digest_at != self._state.position

    def work(self) -> Step[None] | None:
        """Consume what has arrived."""
        state = self._state
        if not state.active:
            return None
        if self._digest_at != state.position:
            return self._rebuild() if state.cached else self._again()
        if self._bulk.error or self._reader.finished:
            return self._finish() if self._reader.finished else None
        return self._consume() if self._reader.has_chunk() else None

    def _consume(self) -> Step[None]:
        gpa, n_bytes = self._reader.chunk(self._bulk.consumed)
        self._digest.update(self._cpu.load(gpa, n_bytes))
        self._state.position += n_bytes
        self._digest_at = self._state.position
        self._reader.consume()
        return
        yield

    def _rebuild(self) -> Step[None]:
        if self._digest_at > self._state.position:
            self._digest, self._digest_at = hashlib.sha256(), 0
        n_bytes = min(REBUILD_BYTES_A_STEP, self._state.position - self._digest_at)
        # The buffers of a page cache lie one after another, so the position is an offset.
        self._digest.update(self._cpu.memory.load(self._bulk.buffers + self._digest_at, n_bytes))
        self._digest_at += n_bytes
        return
        yield

    def _again(self) -> Step[None]:
        self._digest, self._digest_at = hashlib.sha256(), 0
        self._state.position = 0
        self._state.restarts += 1
        self._reader.restart()
        return
        yield

    def _finish(self) -> Step[None]:
        state = self._state
        state.active = self._bulk.active = False
        state.error = self._bulk.error
        state.result = "" if state.error else self._digest.hexdigest()
        self._pages.free(self._bulk.buffers, state.n_pages)
        return
        yield

    def statistics(self) -> str:
        """For the operator."""
        state = self._state
        return f"position={state.position} cached={state.cached} pages={state.n_pages << PAGE_SHIFT >> 20} MiB"
