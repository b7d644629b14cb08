"""Floor of disk reads: read a file, and copy each piece twice: into a bounce buffer, and out of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

CHUNK_BYTES = 256 * 1024
DEPTH = 8


def read_seconds(path: Path, n_bytes: int) -> float:
    """How long the first `n_bytes` of `path` take in order, CHUNK_BYTES at a time."""
    return _seconds(path, CHUNK_BYTES, DEPTH, range(0, n_bytes, CHUNK_BYTES))


def read_blocks_seconds(path: Path, block_bytes: int, depth: int, offsets: list[int]) -> float:
    """How long blocks of `block_bytes` at `offsets` of `path` take."""
    return _seconds(path, block_bytes, depth, offsets)


def _seconds(path: Path, block_bytes: int, depth: int, offsets: Iterable[int]) -> float:
    """With `depth` buffers in turn."""
    own = bytearray(depth * block_bytes)
    bounce = bytearray(depth * block_bytes)
    fd = os.open(path, os.O_RDONLY)
    try:
        started = time.perf_counter()
        for number, offset in enumerate(offsets):
            place = slice(number % depth * block_bytes, (number % depth + 1) * block_bytes)
            bounce[place] = os.pread(fd, block_bytes, offset)
            own[place] = memoryview(bounce)[place]
        return time.perf_counter() - started
    finally:
        os.close(fd)
