"""Partition tables of the MBR kind, as firmware reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

SECTOR_BYTES = 512
ALIGN_BYTES = 1 << 20
MAX_PARTITIONS = 4
MAX_DISK_BYTES = SECTOR_BYTES << 32
"""An entry has 32 bits for a sector's number."""
_TABLE_AT = 446
_ENTRY = struct.Struct("<B3sB3sII")
_NO_CYLINDERS = b"\xfe\xff\xff"
_ACTIVE = 0x80


class PartitionType(IntEnum):
    """What a partition is for."""

    PREP_BOOT = 0x41
    LINUX = 0x83
    GPT = 0xEE
    """All that a GUID partition table covers."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Where a partition lies, in bytes; whole sectors."""

    kind: PartitionType
    start: int
    n_bytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.n_bytes


def lay_out(parts: Sequence[tuple[PartitionType, int]]) -> list[Partition]:
    """Partitions for contents of these sizes in bytes, one behind the other, each begun at a whole MiB."""
    placed: list[Partition] = []
    at = ALIGN_BYTES
    for kind, n_bytes in parts:
        placed.append(Partition(kind, at, rounded(n_bytes, SECTOR_BYTES)))
        at += rounded(n_bytes, ALIGN_BYTES)
    return placed


def mbr(partitions: Sequence[Partition]) -> bytes:
    """The first sector of a disk with these partitions, at most MAX_PARTITIONS."""
    entries = b"".join(
        _ENTRY.pack(
            _ACTIVE if part.kind is PartitionType.PREP_BOOT else 0,
            _NO_CYLINDERS,
            part.kind,
            _NO_CYLINDERS,
            part.start // SECTOR_BYTES,
            part.n_bytes // SECTOR_BYTES,
        )
        for part in partitions
    )
    return bytes(_TABLE_AT) + entries.ljust(MAX_PARTITIONS * _ENTRY.size, b"\0") + b"\x55\xaa"


def rounded(n_bytes: int, to: int) -> int:
    """`n_bytes` up to a multiple of `to`."""
    return -(-n_bytes // to) * to
