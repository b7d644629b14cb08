"""Memory that GDB has read just now: it looks at the same code some fifty times a step, a word at a time."""

from __future__ import annotations

import time

from services.runtime.gdb.target import SMALLEST_PAGE_BYTES, Target

FRESH_SECONDS = 0.1
"""Devices write while the processor stands still: whoever looks again shall see it."""


class BlockCache:
    """Of one target; `forget` has to be called whenever it may have changed its memory or the way to it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._blocks: dict[int, bytes] = {}
        self._read_s = 0.0

    def forget(self) -> None:
        """What was read is old."""
        self._blocks.clear()

    async def read(self, address: int, n_bytes: int) -> bytes:
        """Up to `n_bytes` from `address`, at least one; raises Refused."""
        if time.monotonic() - self._read_s > FRESH_SECONDS:
            self.forget()
        first = address & -SMALLEST_PAGE_BYTES
        block = self._blocks.get(first)
        if block is None:
            if not self._blocks:
                self._read_s = time.monotonic()
            block = await self._target.read(first, SMALLEST_PAGE_BYTES)
            if len(block) == SMALLEST_PAGE_BYTES:
                self._blocks[first] = block
        part = block[address - first : address - first + n_bytes]
        return part or await self._target.read(address, n_bytes)
