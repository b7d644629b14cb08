"""The ways in which virtio may reach the memory of a VM that turns itself secure at run time, one declaration each.

A design is followed by the guest's drivers (`guest.dma` of a cluster file); what it wants of devices, device model and
kvm is its `offer` and `machine`, which a cluster file may override to see what a design does on a machine that is not
made for it. `docs/dma-designs.md` explains each design.

Source: the discussion on the linuxppc and virtualization lists, 2018 and 2019 ("Virtio uses DMA API for all devices",
"virtio_ring: Use DMA API if guest memory is encrypted").
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from protocol.startup import PLATFORM_OFFER, AccessPlatform, DmaMachine, DmaOffer


class DmaDesign(StrEnum):
    """What the guest's drivers do."""

    QUIRK = "quirk"
    IOMMU_ALWAYS = "iommu-always"
    BYPASS_PROPERTY = "bypass-property"
    NO_TRANSLATION = "no-translation"
    IDENTITY_ADDRESS = "identity-address"
    DMA_LIMIT = "dma-limit"
    DMA_POOL = "dma-pool"
    DDW_IDENTITY = "ddw-identity"
    RUNTIME_SWITCH = "runtime-switch"
    GUEST_POKE = "guest-poke"
    ARCH_HOOK = "arch-hook"
    OPTIONAL_PLATFORM = "optional-platform"
    RESTRICTED_MEMORY = "restricted-memory"
    NOTHING = "nothing"


class Part(StrEnum):
    """What had to be changed for a design."""

    GUEST = "guest"
    QEMU = "qemu"
    KVM = "kvm"
    FIRMWARE = "firmware"
    MANAGEMENT = "management"


class DesignFacts(Struct, frozen=True):
    """What a design is. `number` is its place in the discussion, variants share it; `changes` is what it changes."""

    number: int
    title: str
    changes: frozenset[Part]
    offer: DmaOffer = DmaOffer()
    machine: DmaMachine = DmaMachine()


_OPTIONAL = DmaOffer(access_platform=AccessPlatform.OPTIONAL)


def _parts(*parts: Part) -> frozenset[Part]:
    return frozenset(parts)


DESIGNS: dict[DmaDesign, DesignFacts] = {
    DmaDesign.QUIRK: DesignFacts(1, "the guest's virtio core uses the DMA API in a secure VM", _parts(Part.GUEST)),
    DmaDesign.IOMMU_ALWAYS: DesignFacts(
        2,
        "every device demands ACCESS_PLATFORM; all DMA goes through the 32-bit window",
        _parts(Part.QEMU, Part.FIRMWARE, Part.MANAGEMENT),
        PLATFORM_OFFER,
    ),
    DmaDesign.BYPASS_PROPERTY: DesignFacts(
        3,
        "a device-tree property and a hypercall take single devices out of the IOMMU",
        _parts(Part.GUEST, Part.QEMU, Part.FIRMWARE, Part.MANAGEMENT),
        DmaOffer(access_platform=AccessPlatform.REQUIRED, bypass_switch=True),
    ),
    DmaDesign.NO_TRANSLATION: DesignFacts(
        4,
        "a feature bit that promises that addresses are not translated",
        _parts(Part.GUEST, Part.QEMU),
        DmaOffer(no_translation=True),
    ),
    DmaDesign.IDENTITY_ADDRESS: DesignFacts(
        4,
        "the stricter bit: ACCESS_PLATFORM, and the guest promises an identity mapping",
        _parts(Part.GUEST, Part.QEMU, Part.FIRMWARE, Part.MANAGEMENT),
        DmaOffer(access_platform=AccessPlatform.REQUIRED, identity_address=True),
    ),
    DmaDesign.DMA_LIMIT: DesignFacts(5, "a limit: addresses above it are bounced", _parts(Part.GUEST)),
    DmaDesign.DMA_POOL: DesignFacts(5, "a range: everything is bounced through one pool", _parts(Part.GUEST)),
    DmaDesign.DDW_IDENTITY: DesignFacts(
        6,
        "a 64-bit DMA window that maps all RAM, and swiotlb",
        _parts(Part.QEMU, Part.FIRMWARE, Part.MANAGEMENT),
        PLATFORM_OFFER,
    ),
    DmaDesign.RUNTIME_SWITCH: DesignFacts(
        7,
        "kvm tells qemu of the switch, and qemu moves its devices behind the IOMMU",
        _parts(Part.KVM, Part.QEMU, Part.GUEST),
        machine=DmaMachine(tell_secure=True),
    ),
    DmaDesign.GUEST_POKE: DesignFacts(
        8,
        "the driver of a secure VM forces its device behind the IOMMU by a register",
        _parts(Part.GUEST, Part.QEMU),
        DmaOffer(iommu_switch=True),
    ),
    DmaDesign.ARCH_HOOK: DesignFacts(9, "a hook of the architecture makes virtio use the DMA API", _parts(Part.GUEST)),
    DmaDesign.OPTIONAL_PLATFORM: DesignFacts(
        10, "ACCESS_PLATFORM is optional, and taken by a secure VM", _parts(Part.GUEST, Part.QEMU), _OPTIONAL
    ),
    DmaDesign.RESTRICTED_MEMORY: DesignFacts(
        10,
        "as optional-platform, and a secure VM refuses a device without it",
        _parts(Part.GUEST, Part.QEMU),
        _OPTIONAL,
    ),
    DmaDesign.NOTHING: DesignFacts(11, "a driver that knows nothing of secure VMs", _parts()),
}
