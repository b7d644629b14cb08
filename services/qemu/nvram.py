"""Non-volatile memory as a new machine has it: a system partition and free space.

Firmware that finds no partitions makes its own, with an RTAS call for each of the bytes.

Source: CHRP 1.7, section 4.4; QEMU `hw/nvram/chrp_nvram.c`.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

SYSTEM_PARTITION_BYTES = 4096
_UNIT_BYTES = 16
_HEADER = Struct(">BBH12s")
"""Signature, checksum over the others, length in units with the header, name."""


class Signature(IntEnum):
    """Kinds of partitions."""

    SYSTEM = 0x70
    FREE = 0x7F


def fresh_nvram(n_bytes: int) -> bytearray:
    """`n_bytes` (a multiple of 16, more than the system partition) with nothing stored."""
    system = _partition(Signature.SYSTEM, b"common", SYSTEM_PARTITION_BYTES)
    return bytearray(system + _partition(Signature.FREE, b"free", n_bytes - SYSTEM_PARTITION_BYTES))


def _partition(signature: Signature, name: bytes, n_bytes: int) -> bytes:
    n_units = n_bytes // _UNIT_BYTES
    header = _HEADER.pack(signature, 0, n_units, name)
    return _HEADER.pack(signature, checksum(header), n_units, name).ljust(n_bytes, b"\0")


def checksum(header: bytes) -> int:
    """The sum of a header's bytes without its checksum, with the carry added back."""
    total = header[0]
    for byte in header[2:]:
        total += byte
        total = (total & 0xFF) + (total >> 8)
    return total
