"""Sequential reading of a disk range, several requests deep; chunks are consumed in order."""

from __future__ import annotations

from services.guest.model.cpu import Step
from services.guest.model.state import Bulk, Owner
from services.guest.model.virtio_blk import BlkDriver, Finished, NoRoom
from shared.virtio_blk import SECTOR_BYTES, BlkRequest

CHUNK_BYTES = 256 * 1024
DEPTH = 8
MAX_AHEAD = 64
"""Chunks that may have arrived and are not consumed: each is a bit of a number that is saved."""


class BulkReader:
    """One sequential read at a time over `state`. Whoever started it consumes the chunks."""

    def __init__(self, blk: BlkDriver, state: Bulk) -> None:
        self._blk = blk
        self._state = state

    def start(self, first_sector: int, n_bytes: int, buffers: int, n_buffers: int, chunk_bytes: int) -> None:
        """Begin to read `n_bytes` (a multiple of 512) into `n_buffers` buffers of `chunk_bytes` at `buffers`."""
        state = self._state
        state.active, state.error, state.draining = True, "", False
        state.first_sector, state.n_bytes, state.chunk_bytes = first_sector, n_bytes, chunk_bytes
        state.buffers, state.n_buffers = buffers, n_buffers
        state.issued = state.done = state.consumed = state.in_flight = 0

    def restart(self) -> None:
        """Read all of it again, when what is in flight has come."""
        self._state.draining = True

    @property
    def n_chunks(self) -> int:
        """Chunks of this read."""
        state = self._state
        return -(-state.n_bytes // state.chunk_bytes)

    def chunk(self, index: int) -> tuple[int, int]:
        """(gpa, bytes) of a chunk."""
        state = self._state
        n_bytes = min(state.chunk_bytes, state.n_bytes - index * state.chunk_bytes)
        return state.buffers + index % state.n_buffers * state.chunk_bytes, n_bytes

    @property
    def finished(self) -> bool:
        """All consumed, or ended by an error with nothing in flight."""
        state = self._state
        return (state.consumed == self.n_chunks or bool(state.error)) and not state.in_flight

    def has_chunk(self) -> bool:
        """Whether the next chunk in order has arrived."""
        return bool(self._state.done & 1) and not self._state.draining

    def consume(self) -> None:
        """Give the next chunk's buffer back."""
        self._state.consumed += 1
        self._state.done >>= 1

    def work(self) -> Step[None] | None:
        """Issue what fits."""
        state = self._state
        if not state.active or state.error:
            return None
        if state.draining:
            if state.in_flight:
                return None
            args = (state.first_sector, state.n_bytes, state.buffers, state.n_buffers, state.chunk_bytes)
            self.start(*args)
        return self._issue() if self._may_issue() else None

    def _may_issue(self) -> bool:
        state = self._state
        limit = min(self.n_chunks, state.consumed + min(state.n_buffers, MAX_AHEAD))
        return state.in_flight < DEPTH and state.issued < limit

    def _issue(self) -> Step[None]:
        state = self._state
        while self._may_issue():
            gpa, n_bytes = self.chunk(state.issued)
            sector = state.first_sector + state.issued * state.chunk_bytes // SECTOR_BYTES
            if not (yield from self._blk.submit(BlkRequest.IN, sector, gpa, n_bytes, Owner.BULK, state.issued)):
                if not state.in_flight:
                    raise NoRoom(self.fail)
                break
            state.issued += 1
            state.in_flight += 1
            if self._blk.translated:
                break
        yield from self._blk.kick()

    def on_finished(self, finished: Finished) -> None:
        """The outcome of one of its requests."""
        state = self._state
        state.in_flight = max(0, state.in_flight - 1)
        if finished.error:
            state.error = state.error or finished.error
        elif finished.cookie >= state.consumed:
            state.done |= 1 << finished.cookie - state.consumed

    def fail(self, error: str) -> None:
        """The queue is broken: nothing more will come."""
        self._state.error = self._state.error or error
        self._state.in_flight = 0
