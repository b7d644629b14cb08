"""Floor of `blk_read`: read a file in order, and copy each piece twice: into a bounce buffer, and out of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

CHUNK_BYTES = 256 * 1024
DEPTH = 8


def read_seconds(path: Path, n_bytes: int) -> float:
    """How long the first `n_bytes` of `path` take, with DEPTH buffers in turn."""
    own = bytearray(DEPTH * CHUNK_BYTES)
    bounce = bytearray(DEPTH * CHUNK_BYTES)
    fd = os.open(path, os.O_RDONLY)
    try:
        started = time.perf_counter()
        for number in range(n_bytes // CHUNK_BYTES):
            place = slice(number % DEPTH * CHUNK_BYTES, (number % DEPTH + 1) * CHUNK_BYTES)
            bounce[place] = os.pread(fd, CHUNK_BYTES, number * CHUNK_BYTES)
            own[place] = memoryview(bounce)[place]
        return time.perf_counter() - started
    finally:
        os.close(fd)
