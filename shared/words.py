"""Words that several processes read and write at the same time.

Only these helpers touch ring indices, map entries and TCEs. An aligned item assignment through a native
`memoryview.cast` is one store instruction on x86-64, so no reader sees half of it; a slice assignment or a
big-endian `struct.pack_into` is several and tears (measured). x86-64 keeps stores in order; other machines would
need fences here, which is why `doctor` refuses them.
"""

from __future__ import annotations

import sys
import threading

if sys.byteorder != "little":
    raise ImportError("pefbox needs a little-endian x86-64 host")


def words_u64(buffer: memoryview) -> memoryview:
    """`buffer` as an array of native u64; its length is a multiple of 8."""
    return buffer.cast("B").cast("Q")


def words_u16(buffer: memoryview) -> memoryview:
    """`buffer` as an array of native (little-endian) u16; its length is a multiple of 2."""
    return buffer.cast("B").cast("H")


def swap_u64(value: int) -> int:
    """`value` with its eight bytes reversed: for big-endian words stored with one native store."""
    return int.from_bytes(value.to_bytes(8, "little"), "big")


_fence_lock = threading.Lock()


def full_fence() -> None:
    """Let no load after this run ahead of a store before it.

    x86-64 keeps stores in order and loads in order, but a load may pass an older store. Where each side stores an
    index and then looks whether the other side wants to be told, both need this, or both may miss the other. Taking
    a lock is a locked instruction, which is a full barrier.
    """
    with _fence_lock:
        pass
