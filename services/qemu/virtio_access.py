"""How a virtio device reaches memory: what it offers, which choice of the driver it refuses, what follows from it.

| the driver accepted                 | the device uses                                                        |
|-------------------------------------|------------------------------------------------------------------------|
| nothing of these                    | guest physical addresses, whatever the IOMMU says                       |
| ACCESS_PLATFORM                     | bus addresses, unless H_SET_DMA_BYPASS took the device out of the IOMMU |
| ACCESS_PLATFORM_NO_TRANSLATION      | guest physical addresses                                                |
| and ACCESS_PLATFORM_IDENTITY_ADDRESS | guest physical addresses, once the driver's promise was found to hold  |

Two things put a device behind the IOMMU for good, until the machine is reset: the driver writes its switch register
(`iommu_switch`), or the machine does so because the VM turned secure. It then demands ACCESS_PLATFORM.

Source: VIRTIO 1.4, section 6.1 (ACCESS_PLATFORM); the discussion named in `shared.dma_designs` for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from protocol.startup import AccessPlatform, DmaOffer
from services.qemu.dma import BypassSpace, DmaSpace, IommuSpace
from shared.virtio import Feature, feature_mask, has_feature

ACCESS_FEATURES = feature_mask(
    (Feature.ACCESS_PLATFORM, Feature.ACCESS_PLATFORM_NO_TRANSLATION, Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS)
)
"""What a device may offer as ways to memory."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The two ways in which a device may reach memory."""

    bypass: BypassSpace
    platform: IommuSpace


class AccessState(msgspec.Struct):
    """Where the device is put. `bypassed` ends with a reset of the device, `behind_iommu` with one of the machine."""

    behind_iommu: bool = False
    bypassed: bool = False


class MemoryAccess:
    """The rules of one device."""

    def __init__(self, memory: DeviceMemory, offer: DmaOffer) -> None:
        self._memory = memory
        self.offer = offer
        self.state = AccessState()

    @property
    def features(self) -> int:
        """The feature bits that the device offers for its access to memory."""
        offer = self.offer
        platform = self.state.behind_iommu or offer.access_platform is not AccessPlatform.NO
        return (
            platform << Feature.ACCESS_PLATFORM
            | offer.no_translation << Feature.ACCESS_PLATFORM_NO_TRANSLATION
            | offer.identity_address << Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS
        )

    def refusal(self, chosen: int) -> str | None:
        """Why the device does not serve a driver that accepted `chosen`; None when it does."""
        platform = has_feature(chosen, Feature.ACCESS_PLATFORM)
        untranslated = has_feature(chosen, Feature.ACCESS_PLATFORM_NO_TRANSLATION)
        if platform and untranslated:
            return "the driver accepts both ACCESS_PLATFORM and ACCESS_PLATFORM_NO_TRANSLATION"
        if has_feature(chosen, Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS) and not platform:
            return "the driver accepts ACCESS_PLATFORM_IDENTITY_ADDRESS without ACCESS_PLATFORM"
        if platform or (untranslated and not self.state.behind_iommu):
            return None
        if self.state.behind_iommu or self.offer.access_platform is AccessPlatform.REQUIRED:
            return "the driver does not accept VIRTIO_F_ACCESS_PLATFORM"
        return None

    def broken_promise(self, chosen: int) -> str | None:
        """What a driver that accepted `chosen` promised and does not hold, to be asked as the device starts and then
        alone: what the guest maps afterwards is its own affair."""
        if (
            has_feature(chosen, Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS)
            and not self._memory.platform.maps_ram_to_itself()
        ):
            return "ACCESS_PLATFORM_IDENTITY_ADDRESS was promised, and RAM is not mapped to itself"
        return None

    def space(self, chosen: int) -> DmaSpace:
        """The memory of a device whose driver accepted `chosen`, and keeps its promise."""
        if not has_feature(chosen, Feature.ACCESS_PLATFORM):
            return self._memory.bypass
        past = self.state.bypassed or has_feature(chosen, Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS)
        return self._memory.bypass if past else self._memory.platform

    def put_behind_iommu(self) -> None:
        """From now on the device uses bus addresses alone."""
        self.state = AccessState(behind_iommu=True)

    def set_bypass(self, on: bool) -> bool:
        """Take the device out of the IOMMU, or put it back; False when it has no such switch."""
        if not self.offer.bypass_switch or self.state.behind_iommu:
            return False
        self.state.bypassed = on
        return True

    def device_reset(self) -> None:
        """The driver is done with the device; the next may be of a kernel that knows nothing of the bypass."""
        self.state.bypassed = False

    def power_on(self) -> None:
        """The machine was reset."""
        self.state = AccessState()
