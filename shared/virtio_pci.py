"""The modern virtio-pci transport: identity, vendor capabilities, the common configuration region.

Source: VIRTIO 1.4, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

VENDOR_ID = 0x1AF4
MODERN_DEVICE_BASE = 0x1040
"""PCI device id of a modern device is this plus its virtio device id."""
MODERN_REVISION = 1
SUBSYSTEM_ID = 0x1100
"""As QEMU gives every virtio function; drivers do not look at it."""

PCI_CAP_VENDOR = 0x09
CAP_BYTES = 16
NOTIFY_CAP_BYTES = 20
"""The notify capability is followed by its u32 multiplier."""
NOTIFY_BYTES = 2
"""A kick stores the queue's index, a u16."""
PCI_CFG_CAP_BYTES = 20
"""The pci-cfg capability is followed by its 4-byte data window."""


class CapField(IntEnum):
    """Offsets in a vendor capability: u8 fields, then u32 offset and length."""

    CAP_VNDR = 0
    CAP_NEXT = 1
    CAP_LEN = 2
    CFG_TYPE = 3
    BAR = 4
    ID = 5
    OFFSET = 8
    LENGTH = 12
    NOTIFY_MULTIPLIER = 16
    PCI_CFG_DATA = 16


class CfgType(IntEnum):
    """What the region of a vendor capability is."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_CFG = 5
    SHARED_MEMORY = 8
    VENDOR = 9


@dataclass(frozen=True, slots=True)
class Register:
    """One field of the common configuration region."""

    offset: int
    size_bytes: int
    writable: bool


class CommonCfg:
    """The common configuration region, by field (VIRTIO 4.1.4.3); little-endian."""

    DEVICE_FEATURE_SELECT = Register(0, 4, True)
    DEVICE_FEATURE = Register(4, 4, False)
    DRIVER_FEATURE_SELECT = Register(8, 4, True)
    DRIVER_FEATURE = Register(12, 4, True)
    CONFIG_MSIX_VECTOR = Register(16, 2, True)
    NUM_QUEUES = Register(18, 2, False)
    DEVICE_STATUS = Register(20, 1, True)
    CONFIG_GENERATION = Register(21, 1, False)
    QUEUE_SELECT = Register(22, 2, True)
    QUEUE_SIZE = Register(24, 2, True)
    QUEUE_MSIX_VECTOR = Register(26, 2, True)
    QUEUE_ENABLE = Register(28, 2, True)
    QUEUE_NOTIFY_OFF = Register(30, 2, False)
    QUEUE_DESC = Register(32, 8, True)
    QUEUE_DRIVER = Register(40, 8, True)
    QUEUE_DEVICE = Register(48, 8, True)


COMMON_CFG_BYTES = 56

IOMMU_SWITCH = Register(0x80, 4, True)
"""Behind the common configuration, in its page: 1 puts the device behind the IOMMU until the machine is reset. No
standard has it; where it does not exist it reads 0 and ignores stores, as a device model of 2018 does there."""

NO_VECTOR = 0xFFFF
"""Reads back from a vector register when no MSI-X vector is mapped."""

ISR_QUEUE = 1
ISR_CONFIG = 2
"""Bits of the ISR byte; reading it clears it and lowers the line."""
