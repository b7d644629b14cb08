"""The partition-scoped map: guest frame number to host frame, one u64 a GFN in a sealed memfd.

kvm owns the map of a normal VM, the ultravisor that of a secure VM; the guest's processor only reads it.
Entry: bits 0-3 kind, 4-6 rwx, 16-47 frame number (a frame of the RAM segment, or of the VM's secure memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

from protocol.messages import Access
from shared.words import words_u64


class MapKind(IntEnum):
    """Where an entry points."""

    ABSENT = 0
    NORMAL = 1
    SECURE = 2
    SHARED = 3


PERMISSION = {Access.READ: 1 << 4, Access.WRITE: 1 << 5, Access.EXECUTE: 1 << 6}
RWX = sum(PERMISSION.values())
RW = PERMISSION[Access.READ] | PERMISSION[Access.WRITE]
KIND_MASK = 0xF
FRAME_SHIFT = 16
FRAME_MASK = 0xFFFFFFFF
ENTRY_BYTES = 8


def entry(kind: MapKind, frame: int, permissions: int = RWX) -> int:
    """The u64 of one mapping."""
    return int(kind) | permissions | frame << FRAME_SHIFT


def kind_of(value: int) -> MapKind:
    """Where entry `value` points."""
    return MapKind(value & KIND_MASK)


def frame_of(value: int) -> int:
    """The frame number of entry `value`."""
    return value >> FRAME_SHIFT & FRAME_MASK


class PartitionMap:
    """The entries of one VM over a mapped buffer of `n_frames * ENTRY_BYTES` bytes."""

    def __init__(self, buffer: memoryview) -> None:
        self.words = words_u64(buffer)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, gfn: int) -> int:
        value: int = self.words[gfn]
        return value

    def set(self, gfn: int, kind: MapKind, frame: int, permissions: int = RWX) -> None:
        """Map `gfn`."""
        self.words[gfn] = entry(kind, frame, permissions)

    def clear(self, gfn: int) -> None:
        """Unmap `gfn`; the caller invalidates before the frame is used for anything else."""
        self.words[gfn] = 0

    def mapped(self) -> Iterator[int]:
        """Every GFN that has a mapping."""
        return (gfn for gfn, value in enumerate(self.words) if value)
