"""Disk images with a partition table, MBR or GPT, as an installer leaves them."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.linux.partitions import ALIGN_BYTES, SECTOR_BYTES, Partition, PartitionType, lay_out, mbr, rounded

_GPT_SECTORS = 34
"""Protective MBR, header, 128 entries of 128 bytes; header and entries once more at the end of the disk."""
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_ENTRIES = 128
_GPT_TYPES = {
    PartitionType.PREP_BOOT: uuid.UUID("9e1a2d38-c612-4316-aa26-8b49521e5a8b"),
    PartitionType.LINUX: uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A partition with its content."""

    kind: PartitionType
    content: bytes


def write_mbr_disk(path: Path, parts: Sequence[Part]) -> None:
    """A disk of at most four primary partitions."""
    placed = _write_contents(path, parts, 0)
    _write(path, 0, mbr(placed))


def write_gpt_disk(path: Path, parts: Sequence[Part]) -> None:
    """As `write_mbr_disk`, with a GUID partition table and its copy at the end."""
    placed = _write_contents(path, parts, _GPT_SECTORS)
    entries = b"".join(
        _GPT_ENTRY.pack(
            _GPT_TYPES[part.kind].bytes_le,
            uuid.uuid5(_GPT_TYPES[part.kind], str(part.start)).bytes_le,
            part.start // SECTOR_BYTES,
            part.end // SECTOR_BYTES - 1,
            0,
            part.kind.name.encode("utf-16-le"),
        )
        for part in placed
    ).ljust(_GPT_ENTRIES * _GPT_ENTRY.size, b"\0")
    n_sectors = path.stat().st_size // SECTOR_BYTES
    last = n_sectors - 1
    table_sectors = len(entries) // SECTOR_BYTES
    _write(path, 0, mbr([Partition(PartitionType.GPT, SECTOR_BYTES, last * SECTOR_BYTES)]))
    _write(path, 1, _gpt_header(1, last, 2, entries, n_sectors) + entries)
    _write(path, last - table_sectors, entries + _gpt_header(last, 1, last - table_sectors, entries, n_sectors))


def _write_contents(path: Path, parts: Sequence[Part], n_sectors_behind: int) -> list[Partition]:
    """Write the contents; where each lies."""
    placed = lay_out([(part.kind, len(part.content)) for part in parts])
    with path.open("wb") as disk:
        for part, place in zip(parts, placed, strict=True):
            disk.seek(place.start)
            disk.write(part.content)
        disk.truncate(rounded(placed[-1].end, ALIGN_BYTES) + n_sectors_behind * SECTOR_BYTES)
    return placed


def _gpt_header(at: int, other: int, table: int, entries: bytes, n_sectors: int) -> bytes:
    def header(crc: int) -> bytes:
        return _GPT_HEADER.pack(
            b"EFI PART",
            0x10000,
            _GPT_HEADER.size,
            crc,
            0,
            at,
            other,
            _GPT_SECTORS,
            n_sectors - _GPT_SECTORS,
            uuid.uuid5(uuid.NAMESPACE_OID, "disk").bytes_le,
            table,
            _GPT_ENTRIES,
            _GPT_ENTRY.size,
            zlib.crc32(entries),
        )

    return header(zlib.crc32(header(0))).ljust(SECTOR_BYTES, b"\0")


def _write(path: Path, sector: int, data: bytes) -> None:
    with path.open("r+b") as disk:
        disk.seek(sector * SECTOR_BYTES)
        disk.write(data)
