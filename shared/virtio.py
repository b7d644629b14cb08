"""What every virtio device and driver agree on: device ids, feature bits, status bits.

Source: VIRTIO 1.4, sections 2.1 (status), 5 (device ids), 6 (reserved feature bits).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class DeviceId(IntEnum):
    """Virtio device types (VIRTIO 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    SCSI = 8
    NINE_P = 9
    GPU = 16
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    IOMMU = 23
    MEM = 24
    FS = 26


class Feature(IntEnum):
    """Bit numbers of the device-independent features (VIRTIO 6).

    ACCESS_PLATFORM_NO_TRANSLATION and ACCESS_PLATFORM_IDENTITY_ADDRESS were proposed on the linuxppc and
    virtualization lists and never standardised: their numbers are this project's own, above every assigned bit of
    the reserved range.
    """

    NOTIFY_ON_EMPTY = 24
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43
    ACCESS_PLATFORM_NO_TRANSLATION = 48
    ACCESS_PLATFORM_IDENTITY_ADDRESS = 49


BYPASS_PROPERTY = "pefbox,dma-bypass"
"""In the device-tree node of a PCI function: H_SET_DMA_BYPASS may take it out of the IOMMU. This project's own."""


class DeviceStatus(IntEnum):
    """Bits of the device status byte (VIRTIO 2.1); writing 0 resets the device."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128


def feature_mask(bits: Iterable[int]) -> int:
    """The 64-bit feature word with these bit numbers set."""
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask


def has_feature(features: int, bit: int) -> bool:
    """Whether bit number `bit` is set in the feature word."""
    return bool(features >> bit & 1)


def feature_names(features: int, device_features: type[IntEnum] | None = None) -> list[str]:
    """The set bits by name, lowest first; `device_features` names the device's own, an unknown one is `bit N`."""
    names: dict[int, str] = {bit.value: bit.name for bit in device_features or ()}
    names.update({bit.value: bit.name for bit in Feature})
    return [names.get(bit, f"bit {bit}") for bit in range(features.bit_length()) if features >> bit & 1]
