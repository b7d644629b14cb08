"""A bootable disk: MBR, a boot partition with image, initramfs and command line, data, and a scratch partition.

| partition | MBR type | holds                                                                            |
|-----------|----------|----------------------------------------------------------------------------------|
| boot      | 0x41     | PReP-like: a header sector, then image, initramfs (blob in front), command line   |
| data      | 0x83     | a file system or archive; a guest reads it                                       |
| scratch   | 0xDA     | no file system: what a guest may overwrite                                       |

The boot header is big-endian, see `HEADER`. It is not authenticated here: what is loaded is measured by the
ultravisor at UV_ESM. The MBR follows the usual layout (four entries of 16 bytes at 446, 0x55AA at 510).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO

from protocol.errors import ImageRefused

SECTOR_BYTES = 512
ALIGN_BYTES = 1 << 20
"""Partitions begin at multiples of this."""
MAX_PART_BYTES = 256 << 20
"""No image or initramfs is larger."""
MAX_COMMAND_LINE_BYTES = 2048

MAGIC = b"PEFBOOT\0"
VERSION = 1
HEADER = struct.Struct(">8sII QQ QQ QQ")
"""magic, version, header bytes, then offset and length of image, initramfs and command line, in bytes from the
beginning of the partition."""
HEADER_BYTES = SECTOR_BYTES

_MBR_TABLE = 446
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_MBR_SIGNATURE = b"\x55\xaa"


def command_line_fault(text: str) -> str | None:
    """None, or why a guest cannot be given this command line."""
    if not (text.isascii() and text.isprintable()):
        return "must have printable ASCII characters only"
    if len(text) > MAX_COMMAND_LINE_BYTES:
        return f"has {len(text)} characters; allowed: up to {MAX_COMMAND_LINE_BYTES}"
    return None


class PartitionType(IntEnum):
    """MBR partition types used here."""

    BOOT = 0x41
    DATA = 0x83
    SCRATCH = 0xDA


@dataclass(frozen=True, slots=True)
class Partition:
    """One MBR entry, in 512-byte sectors."""

    type: int
    first_sector: int
    n_sectors: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of the boot partition."""

    offset_bytes: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class BootHeader:
    """Where the three files of a boot partition lie."""

    image: Extent
    initrd: Extent
    command_line: Extent


def parse_mbr(sector: bytes) -> list[Partition]:
    """The used entries of a master boot record; raises ImageRefused when it is none."""
    if len(sector) < SECTOR_BYTES or sector[510:512] != _MBR_SIGNATURE:
        raise ImageRefused("the disk has no partition table")
    partitions = []
    for index in range(4):
        _, _, kind, _, first, n_sectors = _MBR_ENTRY.unpack_from(sector, _MBR_TABLE + 16 * index)
        if kind and n_sectors:
            partitions.append(Partition(kind, first, n_sectors))
    return partitions


def parse_header(sector: bytes, partition_bytes: int) -> BootHeader:
    """The header of a boot partition of `partition_bytes`; raises ImageRefused when it does not hold."""
    if len(sector) < HEADER.size:
        raise ImageRefused("the boot partition has no header")
    magic, version, header_bytes, *words = HEADER.unpack_from(sector)
    if magic != MAGIC or version != VERSION or header_bytes != HEADER_BYTES:
        raise ImageRefused("the boot partition has no header of this version")
    image, initrd, command_line = (Extent(words[i], words[i + 1]) for i in (0, 2, 4))
    for extent, limit in ((image, MAX_PART_BYTES), (initrd, MAX_PART_BYTES), (command_line, MAX_COMMAND_LINE_BYTES)):
        if extent.offset_bytes % SECTOR_BYTES or extent.n_bytes > limit:
            raise ImageRefused("an extent of the boot partition is misaligned or too large")
        if extent.offset_bytes + extent.n_bytes > partition_bytes:
            raise ImageRefused("an extent of the boot partition lies outside it")
    if not image.n_bytes:
        raise ImageRefused("the boot partition has no image")
    return BootHeader(image, initrd, command_line)


def build_boot_partition(image: bytes, initrd: bytes, command_line: str) -> bytes:
    """The content of a boot partition, a whole number of sectors."""
    parts = (image, initrd, command_line.encode("ascii"))
    words: list[int] = []
    offset = HEADER_BYTES
    for part in parts:
        words += [offset, len(part)]
        offset += _round_up(len(part), SECTOR_BYTES)
    header = HEADER.pack(MAGIC, VERSION, HEADER_BYTES, *words)
    body = b"".join(part.ljust(_round_up(len(part), SECTOR_BYTES), b"\0") for part in parts)
    built = header.ljust(HEADER_BYTES, b"\0") + body
    parse_header(built, len(built))
    return built


@dataclass(frozen=True, slots=True)
class DiskLayout:
    """Where `write_disk` put things, in bytes of the disk file."""

    boot: Extent
    data: Extent
    scratch: Extent
    size_bytes: int


def write_disk(
    disk: BinaryIO, boot: bytes, *, data: BinaryIO | None = None, data_bytes: int = 0, scratch_bytes: int = ALIGN_BYTES
) -> DiskLayout:
    """Write a bootable disk to `disk` (an empty file that `truncate` can extend) and return its layout.

    The data partition is `data_bytes` long, at least as long as the file `data`, which is copied to its beginning.
    Partitions of zero bytes are left out. Everything not written stays a hole.
    """
    if data is not None:
        data_bytes = max(data_bytes, data.seek(0, 2))
        data.seek(0)
    extents = []
    offset = ALIGN_BYTES
    for n_bytes in (len(boot), data_bytes, scratch_bytes):
        n_bytes = _round_up(n_bytes, SECTOR_BYTES)
        extents.append(Extent(offset, n_bytes))
        offset = _round_up(offset + n_bytes, ALIGN_BYTES)
    boot_extent, data_extent, scratch_extent = extents
    layout = DiskLayout(boot_extent, data_extent, scratch_extent, offset)
    disk.truncate(layout.size_bytes)
    disk.seek(0)
    disk.write(_mbr(layout))
    disk.seek(layout.boot.offset_bytes)
    disk.write(boot)
    if data is not None:
        disk.seek(layout.data.offset_bytes)
        while chunk := data.read(ALIGN_BYTES):
            disk.write(chunk)
    disk.flush()
    return layout


def _mbr(layout: DiskLayout) -> bytes:
    sector = bytearray(SECTOR_BYTES)
    sector[510:512] = _MBR_SIGNATURE
    kinds = (PartitionType.BOOT, PartitionType.DATA, PartitionType.SCRATCH)
    index = 0
    for kind, extent in zip(kinds, (layout.boot, layout.data, layout.scratch), strict=True):
        if not extent.n_bytes:
            continue
        active = 0x80 if kind is PartitionType.BOOT else 0
        chs = b"\xfe\xff\xff"  # beyond what cylinder, head and sector can say: use the sector numbers
        first, n_sectors = extent.offset_bytes // SECTOR_BYTES, extent.n_bytes // SECTOR_BYTES
        _MBR_ENTRY.pack_into(sector, _MBR_TABLE + 16 * index, active, chs, kind, chs, first, n_sectors)
        index += 1
    return bytes(sector)


def _round_up(value: int, unit: int) -> int:
    return (value + unit - 1) // unit * unit
