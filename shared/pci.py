"""PCI configuration space (type 0 header), BAR bits, capabilities, MSI-X table, OF `reg` encoding.

Source: PCI Local Bus 3.0 chapter 6; PCI Bus Binding to IEEE 1275 (phys.hi).
"""

from __future__ import annotations

from enum import IntEnum

CONFIG_BYTES = 256
EXTENDED_CONFIG_BYTES = 4096
N_BARS = 6


class PciClass(IntEnum):
    """Class codes: class, subclass, programming interface."""

    OTHER = 0x00FF00
    SCSI = 0x010000
    ETHERNET = 0x020000
    COMMUNICATION = 0x078000


class Config(IntEnum):
    """Offsets in a type 0 header."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    PROG_IF = 0x09
    SUBCLASS = 0x0A
    CLASS = 0x0B
    CACHE_LINE_SIZE = 0x0C
    LATENCY_TIMER = 0x0D
    HEADER_TYPE = 0x0E
    BIST = 0x0F
    BAR0 = 0x10
    CARDBUS_CIS = 0x28
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    EXPANSION_ROM = 0x30
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D
    MIN_GRANT = 0x3E
    MAX_LATENCY = 0x3F


class Command(IntEnum):
    """Bits of the command register."""

    IO = 1 << 0
    MEMORY = 1 << 1
    MASTER = 1 << 2
    PARITY = 1 << 6
    SERR = 1 << 8
    INTX_DISABLE = 1 << 10


STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES = 1 << 4

BAR_IO = 1 << 0
BAR_TYPE_64 = 2 << 1
BAR_PREFETCHABLE = 1 << 3
BAR_MEMORY_FLAGS = 0xF
BAR_IO_FLAGS = 0x3

ABSENT_VENDOR = 0xFFFF
"""What a read of the vendor id gives where no function answers."""


class Capability(IntEnum):
    """Capability ids."""

    MSI = 0x05
    VENDOR = 0x09
    MSIX = 0x11


class MsiField(IntEnum):
    """Offsets in the capability of one message with a 64-bit address, and its length."""

    CONTROL = 2
    ADDRESS = 4
    DATA = 12
    LENGTH = 14


MSI_ENABLE = 1 << 0
MSI_64BIT = 1 << 7
"""Bits of the MSI control word."""


class Msix(IntEnum):
    """Offsets in the MSI-X capability, and its length."""

    CONTROL = 2
    TABLE = 4
    PBA = 8
    LENGTH = 12


MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_TABLE_SIZE_MASK = 0x7FF
"""Bits of the MSI-X control word; the table size field holds the number of vectors minus one."""
MSIX_BIR_MASK = 0x7
"""Low bits of the table and PBA words: which BAR."""


class MsixEntry(IntEnum):
    """Offsets in one MSI-X table entry, and its length."""

    ADDRESS_LOW = 0
    ADDRESS_HIGH = 4
    DATA = 8
    CONTROL = 12
    LENGTH = 16


MSIX_ENTRY_MASKED = 1
"""Bit of an entry's control word."""


class OfSpace(IntEnum):
    """Address space code in bits 24-25 of phys.hi."""

    CONFIG = 0
    IO = 1
    MEM32 = 2
    MEM64 = 3


OF_RELOCATABLE = 1 << 31
OF_PREFETCHABLE = 1 << 30


def of_phys_hi(space: OfSpace, bus: int, devfn: int, register: int = 0, flags: int = 0) -> int:
    """The first cell of a PCI address in the device tree."""
    return flags | space << 24 | bus << 16 | devfn << 8 | register


def devfn_of(slot: int, function: int = 0) -> int:
    """The 8-bit device and function number."""
    return slot << 3 | function


def slot_and_function(devfn: int) -> tuple[int, int]:
    """What `devfn_of` was made of."""
    return devfn >> 3, devfn & 7
