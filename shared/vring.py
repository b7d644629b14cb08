"""The split virtqueue as it lies in memory, little-endian, and the arithmetic both sides do on it.

| part  | align | bytes  | layout                                                         |
|-------|-------|--------|----------------------------------------------------------------|
| desc  | 16    | 16 N   | addr u64 @0, len u32 @8, flags u16 @12, next u16 @14            |
| avail | 2     | 6 + 2N | flags u16, idx u16, ring[N] u16, used_event u16                 |
| used  | 4     | 6 + 8N | flags u16, idx u16, ring[N] {id u32, len u32}, avail_event u16  |

Indices run freely modulo 65536. Words that both sides touch at once (flags, idx, ring entries of avail, the event
words) are read and written through `shared.words`; descriptors and used elements are owned by one side at a time.

Source: VIRTIO 1.4, section 2.7.
"""

from __future__ import annotations

import struct
from enum import IntEnum

MAX_QUEUE_SIZE = 32768
MAX_CHAIN_BYTES = 1 << 32
"""A chain describes fewer bytes than this."""

DESC_ALIGN = 16
AVAIL_ALIGN = 2
USED_ALIGN = 4

DESC = struct.Struct("<QIHH")
"""One descriptor: addr, len, flags, next."""
DESC_BYTES = DESC.size

USED_ELEM = struct.Struct("<II")
"""One used element: head id, bytes written."""
USED_ELEM_BYTES = USED_ELEM.size

RING_FLAGS = 0
RING_IDX = 2
RING_ENTRIES = 4
"""Offsets in avail and used: flags, idx, first entry."""


class DescFlag(IntEnum):
    """Bits of a descriptor's flags."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


AVAIL_NO_INTERRUPT = 1
"""Bit of avail.flags: the driver wants no interrupt (ignored with EVENT_IDX)."""
USED_NO_NOTIFY = 1
"""Bit of used.flags: the device wants no notification (ignored with EVENT_IDX)."""


def desc_bytes(queue_size: int) -> int:
    """Length of the descriptor table."""
    return DESC_BYTES * queue_size


def avail_bytes(queue_size: int) -> int:
    """Length of the available ring, used_event included."""
    return 6 + 2 * queue_size


def used_bytes(queue_size: int) -> int:
    """Length of the used ring, avail_event included."""
    return 6 + USED_ELEM_BYTES * queue_size


def avail_entry(slot: int) -> int:
    """Offset of avail.ring[slot]."""
    return RING_ENTRIES + 2 * slot


def used_event(queue_size: int) -> int:
    """Offset of used_event in the available ring: the driver's wish for its next interrupt."""
    return RING_ENTRIES + 2 * queue_size


def used_entry(slot: int) -> int:
    """Offset of used.ring[slot]."""
    return RING_ENTRIES + USED_ELEM_BYTES * slot


def avail_event(queue_size: int) -> int:
    """Offset of avail_event in the used ring: the device's wish for its next notification."""
    return RING_ENTRIES + USED_ELEM_BYTES * queue_size


def valid_queue_size(size: int) -> bool:
    """Whether a split queue may have `size` entries: a power of two up to 32768."""
    return 0 < size <= MAX_QUEUE_SIZE and size & (size - 1) == 0


def need_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from `old` to `new` passes `event`, so that the other side is told (VIRTIO 2.7.7.2).

    All three are free-running u16.
    """
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
