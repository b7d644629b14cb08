"""The devices of a VM in a cluster file: `[[vms.NAME.devices]]`, and a virtio-blk for each disk that none names."""

from __future__ import annotations

import hashlib
import re

from deploy.cluster_section import Section
from protocol.ethernet import LOCAL, MAC_BYTES, MULTICAST
from protocol.startup import (
    DEFAULT_DMA_BITS,
    AccessPlatform,
    DeviceEntry,
    DiskEntry,
    DmaOffer,
    GuestEntry,
    IommuDomain,
)
from shared.dma_designs import DESIGNS, DmaDesign
from shared.machine_type import FIRST_SLOT, N_SLOTS

OFFER_KEYS = ("access_platform", "no_translation", "identity_address", "bypass_switch", "iommu_switch")
"""What a virtio device offers as ways to memory; the guest's design says what when the file does not."""
KEYS_OF = {
    "virtio-blk": ("disk", *OFFER_KEYS),
    "virtio-net": ("network", "mac", *OFFER_KEYS),
    "virtio-rng": OFFER_KEYS,
    "virtio-console": ("name", *OFFER_KEYS),
    "virtio-balloon": OFFER_KEYS,
    "edu": ("name", "iommu_domain", "dma_bits"),
}
"""The kinds of devices, and the keys that each has beside `kind`."""
DEVICE_KEYS = ("kind", *dict.fromkeys(key for keys in KEYS_OF.values() for key in keys))
ACCESS_PLATFORM: dict[bool | str, AccessPlatform] = {
    False: AccessPlatform.NO,
    True: AccessPlatform.REQUIRED,
    "optional": AccessPlatform.OPTIONAL,
}
"""What `access_platform` may be."""
MAX_DEVICES = N_SLOTS - FIRST_SLOT
"""Slots of the PCI bus but the first."""
DEFAULT_CONSOLE = "console"
DEFAULT_EDU = "edu"
DMA_BITS = range(12, 65)
"""From one 4 KiB page to all bus addresses."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}", re.ASCII)


class DeviceReader:
    """Reads the devices of one VM. `identity` is what default addresses derive from, `mtus` the networks' MTUs."""

    def __init__(
        self, vm: Section, disks: list[DiskEntry], guest: GuestEntry, identity: str, mtus: dict[str, int]
    ) -> None:
        self._vm = vm
        self._disks = [disk.name for disk in disks]
        self._offer = DESIGNS[DmaDesign(guest.dma)].offer
        self._firmware_finds_devices = guest.pci_nodes == "firmware"
        self._identity = identity
        self._mtus = mtus
        self._used: set[str] = set()
        """Disks that a device was made for, names of devices, kinds of which there is one: each with its key."""

    def read(self) -> list[DeviceEntry]:
        """The disks that no listed device names come first, then the devices as listed."""
        sections = self._vm.listed_tables("devices", DEVICE_KEYS)
        listed = [self._device(index, section) for index, section in enumerate(sections)]
        named = {device.disk for device in listed}
        devices = [
            DeviceEntry(kind="virtio-blk", disk=disk, offer=self._offer) for disk in self._disks if disk not in named
        ] + listed
        if len(devices) > MAX_DEVICES:
            self._vm.document.fail(self._vm.key, f"has {len(devices)} devices; the PCI bus has room for {MAX_DEVICES}")
        return devices

    def _device(self, index: int, section: Section) -> DeviceEntry:
        kind = section.choice("kind", tuple(KEYS_OF))
        allowed = ("kind", *KEYS_OF[kind])
        for key in DEVICE_KEYS:
            if key in section and key not in allowed:
                article = "an" if kind[0] in "aeiou" else "a"
                section.fail(key, f"is no key of {article} {kind}; allowed: {', '.join(allowed)}")
        if kind == "edu":
            return self._edu(section)
        offer = self._offer_of(section)
        match kind:
            case "virtio-blk":
                return DeviceEntry(kind=kind, disk=self._disk(section), offer=offer)
            case "virtio-net":
                network = self._network(section)
                mac = self._mac(index, section)
                return DeviceEntry(kind=kind, network=network, mac=mac, mtu=self._mtus[network], offer=offer)
            case "virtio-console":
                return DeviceEntry(kind=kind, name=self._name(section, DEFAULT_CONSOLE), offer=offer)
            case "virtio-balloon":
                self._once(section, "kind", kind, "is there already; a VM has one virtio-balloon at most")
                return DeviceEntry(kind=kind, offer=offer)
            case _:
                return DeviceEntry(kind=kind, offer=offer)

    def _offer_of(self, section: Section) -> DmaOffer:
        offer = DmaOffer(
            access_platform=section.one_of("access_platform", ACCESS_PLATFORM, self._offer.access_platform),
            no_translation=section.flag("no_translation", self._offer.no_translation),
            identity_address=section.flag("identity_address", self._offer.identity_address),
            bypass_switch=section.flag("bypass_switch", self._offer.bypass_switch),
            iommu_switch=section.flag("iommu_switch", self._offer.iommu_switch),
        )
        for key in ("identity_address", "bypass_switch"):
            if getattr(offer, key) and offer.access_platform is AccessPlatform.NO:
                section.fail(key, 'needs access_platform = true or "optional"')
        return offer

    def _disk(self, section: Section) -> str:
        disk = section.choice("disk", self._disks)
        self._once(section, "disk", disk, f'"{disk}" is on another device already')
        return disk

    def _network(self, section: Section) -> str:
        if not self._mtus:
            section.fail("network", "the file has no network; add [networks.NAME]")
        return section.choice("network", tuple(self._mtus))

    def _mac(self, index: int, section: Section) -> str:
        if "mac" not in section:
            return default_mac(f"{self._identity}:{index}")
        mac = section.text("mac").lower()
        if not _MAC.fullmatch(mac):
            section.fail("mac", f'"{mac}" is no address; allowed: six bytes such as "52:54:00:12:34:56"')
        if int(mac[:2], 16) & MULTICAST:
            section.fail("mac", f'"{mac}" is a group address; the lowest bit of its first byte must be 0')
        return mac

    def _edu(self, section: Section) -> DeviceEntry:
        domain = IommuDomain(section.choice("iommu_domain", tuple(IommuDomain), IommuDomain.BUS))
        if domain is IommuDomain.OWN and self._firmware_finds_devices:
            section.fail(
                "iommu_domain",
                '"own" is in the device\'s node, which firmware would not make so; set pci_nodes = "qemu"',
            )
        dma_bits = section.integer("dma_bits", DEFAULT_DMA_BITS, DMA_BITS[0], DMA_BITS[-1])
        return DeviceEntry(kind="edu", name=self._name(section, DEFAULT_EDU), iommu_domain=domain, dma_bits=dma_bits)

    def _name(self, section: Section, default: str) -> str:
        name = section.text("name", default)
        if not _NAME.fullmatch(name):
            section.fail("name", "a name has lower-case letters, digits and -, begins with a letter, up to 31")
        self._once(section, "name", name, f'"{name}" is another device already')
        return name

    def _once(self, section: Section, key: str, value: str, problem: str) -> None:
        if f"{key} {value}" in self._used:
            section.fail(key, problem)
        self._used.add(f"{key} {value}")


def default_mac(identity: str) -> str:
    """A locally administered address that follows from `identity`."""
    raw = bytearray(hashlib.sha256(identity.encode()).digest()[:MAC_BYTES])
    raw[0] = raw[0] & ~MULTICAST | LOCAL
    return raw.hex(":")
