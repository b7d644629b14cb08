"""The virtio block device: configuration space, requests, status.

A request is a readable header, data, and one writable status byte at the very end of the chain.

Source: VIRTIO 1.4, section 5.2.
"""

from __future__ import annotations

import struct
from enum import IntEnum

SECTOR_SHIFT = 9
SECTOR_BYTES = 1 << SECTOR_SHIFT
"""Capacity and request sectors always count 512-byte units, whatever blk_size says."""


class BlkFeature(IntEnum):
    """Bit numbers of the block device's features."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    LIFETIME = 15
    SECURE_ERASE = 16
    ZONED = 17


class BlkConfig(IntEnum):
    """Offsets in the device configuration space."""

    CAPACITY = 0
    """u64, sectors."""
    SIZE_MAX = 8
    """u32, largest segment in bytes."""
    SEG_MAX = 12
    """u32, most data segments a request."""
    GEOMETRY = 16
    BLK_SIZE = 20
    """u32, bytes."""
    TOPOLOGY = 24
    WRITEBACK = 32
    NUM_QUEUES = 34
    """u16."""
    MAX_DISCARD_SECTORS = 36
    MAX_DISCARD_SEG = 40
    DISCARD_SECTOR_ALIGNMENT = 44
    MAX_WRITE_ZEROES_SECTORS = 48
    MAX_WRITE_ZEROES_SEG = 52
    WRITE_ZEROES_MAY_UNMAP = 56
    """u8."""


BLK_CONFIG_BYTES = 60

BLK_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
"""The whole of it: capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp,
alignment_offset, min_io_size, opt_io_size, writeback, num_queues, then the discard and write-zeroes fields."""


class BlkRequest(IntEnum):
    """Request types."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


BARRIER = 1 << 31
"""Set beside the type by drivers that follow the drafts before VIRTIO 1.0, as SLOF's do; it orders nothing here."""


class BlkStatus(IntEnum):
    """The status byte of a finished request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


REQUEST_HEADER = struct.Struct("<IIQ")
"""type, reserved, sector."""
REQUEST_HEADER_BYTES = REQUEST_HEADER.size

RANGE = struct.Struct("<QII")
"""One segment of DISCARD or WRITE_ZEROES: sector, number of sectors, flags."""
RANGE_BYTES = RANGE.size
RANGE_UNMAP = 1
"""Flag of a WRITE_ZEROES segment: the device may deallocate. Reserved (0) in a DISCARD segment."""

STATUS_BYTES = 1
ID_BYTES = 20
"""GET_ID writes a string of at most this length, zero padded, without a terminator when it is full."""
