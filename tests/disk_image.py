"""Disk images with a partition table, MBR or GPT, as an installer leaves them."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

SECTOR_BYTES = 512
ALIGN_SECTORS = 2048
_MBR_TABLE = 446
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_NO_CYLINDERS = b"\xfe\xff\xff"
_PROTECTIVE = 0xEE
_GPT_SECTORS = 34
"""Protective MBR, header, 128 entries of 128 bytes; header and entries once more at the end of the disk."""
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_ENTRIES = 128


class Kind(Enum):
    """What a partition is for: its type in an MBR, and in a GPT."""

    PREP_BOOT = (0x41, uuid.UUID("9e1a2d38-c612-4316-aa26-8b49521e5a8b"))
    LINUX = (0x83, uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"))


@dataclass(frozen=True, slots=True)
class Part:
    """A partition with its content."""

    kind: Kind
    content: bytes


def write_mbr_disk(path: Path, parts: Sequence[Part]) -> list[int]:
    """A disk of at most four primary partitions; returns where each begins, in bytes."""
    starts, _ = _place(path, parts, 0)
    entries = b"".join(
        _mbr_entry(0x80 if part.kind is Kind.PREP_BOOT else 0, part.kind.value[0], start, _sectors(part.content))
        for part, start in zip(parts, starts, strict=True)
    )
    _write(path, 0, _mbr(entries))
    return [start * SECTOR_BYTES for start in starts]


def write_gpt_disk(path: Path, parts: Sequence[Part]) -> list[int]:
    """As `write_mbr_disk`, with a GUID partition table and its copy at the end."""
    starts, n_sectors = _place(path, parts, _GPT_SECTORS)
    entries = b"".join(
        _GPT_ENTRY.pack(
            part.kind.value[1].bytes_le,
            uuid.uuid5(part.kind.value[1], str(start)).bytes_le,
            start,
            start + _sectors(part.content) - 1,
            0,
            part.kind.name.encode("utf-16-le"),
        )
        for part, start in zip(parts, starts, strict=True)
    ).ljust(_GPT_ENTRIES * _GPT_ENTRY.size, b"\0")
    last = n_sectors - 1
    table_sectors = len(entries) // SECTOR_BYTES
    _write(path, 0, _mbr(_mbr_entry(0, _PROTECTIVE, 1, last)))
    _write(path, 1, _gpt_header(1, last, 2, entries, n_sectors) + entries)
    _write(path, last - table_sectors, entries + _gpt_header(last, 1, last - table_sectors, entries, n_sectors))
    return [start * SECTOR_BYTES for start in starts]


def _place(path: Path, parts: Sequence[Part], n_sectors_behind: int) -> tuple[list[int], int]:
    """Write the contents; first sector of each, and how many sectors the disk has."""
    starts, at = [], ALIGN_SECTORS
    with path.open("wb") as disk:
        for part in parts:
            starts.append(at)
            disk.seek(at * SECTOR_BYTES)
            disk.write(part.content)
            at += -(-_sectors(part.content) // ALIGN_SECTORS) * ALIGN_SECTORS
        disk.truncate((at + n_sectors_behind) * SECTOR_BYTES)
    return starts, at + n_sectors_behind


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


def _mbr(entries: bytes) -> bytes:
    return bytes(_MBR_TABLE) + entries.ljust(4 * _MBR_ENTRY.size, b"\0") + b"\x55\xaa"


def _mbr_entry(active: int, kind: int, start: int, n_sectors: int) -> bytes:
    return _MBR_ENTRY.pack(active, _NO_CYLINDERS, kind, _NO_CYLINDERS, start, n_sectors)


def _sectors(content: bytes) -> int:
    return -(-len(content) // SECTOR_BYTES)


def _write(path: Path, sector: int, data: bytes) -> None:
    with path.open("r+b") as disk:
        disk.seek(sector * SECTOR_BYTES)
        disk.write(data)
