"""QEMU's educational PCI device `edu`: identity, registers of its BAR 0, its buffer.

Registers below 0x80 are 32 bits wide, those from there 64 bits, which a 32-bit access reads and writes the low half of.

Source: QEMU `docs/specs/edu.rst`, `hw/misc/edu.c`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

VENDOR_ID = 0x1234
DEVICE_ID = 0x11E8
REVISION = 0x10
SUBSYSTEM_VENDOR_ID = 0x1AF4
SUBSYSTEM_ID = 0x1100
"""What QEMU gives each function that says nothing else."""

BAR_BYTES = 1 << 20
IDENTIFICATION = 0x010000ED
"""Version 1.0 of `ed`."""
BUFFER_ADDRESS = 0x40000
"""Where the buffer lies for the device's DMA; the processor does not reach it there."""
BUFFER_BYTES = 4096


class EduRegister(IntEnum):
    """Offsets in BAR 0."""

    IDENTIFICATION = 0x00
    LIVENESS = 0x04
    FACTORIAL = 0x08
    STATUS = 0x20
    IRQ_STATUS = 0x24
    IRQ_RAISE = 0x60
    IRQ_ACKNOWLEDGE = 0x64
    DMA_SOURCE = 0x80
    DMA_DESTINATION = 0x88
    DMA_COUNT = 0x90
    DMA_COMMAND = 0x98


FIRST_WIDE = EduRegister.DMA_SOURCE
"""The registers from here take accesses of 8 bytes too."""


class EduStatus(IntFlag):
    """Bits of STATUS; COMPUTING is read-only."""

    COMPUTING = 0x01
    IRQ_WHEN_DONE = 0x80


class EduDma(IntFlag):
    """Bits of DMA_COMMAND; the device clears RUN."""

    RUN = 0x1
    TO_RAM = 0x2
    IRQ_WHEN_DONE = 0x4


class EduIrq(IntFlag):
    """Causes in IRQ_STATUS that the device has; a driver may raise any."""

    FACTORIAL = 0x001
    DMA = 0x100
