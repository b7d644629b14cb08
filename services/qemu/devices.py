"""The devices that a VM may have, made from its start configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from protocol.errors import HostFault, UserError
from protocol.startup import DeviceEntry, VmEntry
from services.qemu.disk_file import DiskFile
from services.qemu.network import Switch
from services.qemu.virtio_access import ACCESS_FEATURES, DeviceMemory
from services.qemu.virtio_blk import VirtioBlk
from services.qemu.virtio_console import VirtioConsole
from services.qemu.virtio_device import FEATURES, VirtioDevice
from services.qemu.virtio_net import VirtioNet
from services.qemu.virtio_pci import VirtioPciFunction
from services.qemu.virtio_rng import VirtioRng
from shared.pci import PciClass
from shared.virtio import feature_names


class DevicePort(Protocol):
    """What the operator hears of a device."""

    def device_fault(self, device: str, reason: str) -> None:
        """A driver broke `device`, or was refused by it."""

    def io_error(self, device: str, reason: str) -> None:
        """The host refused a request of `device`."""


@dataclass(frozen=True, slots=True)
class DeviceMaker:
    """Makes the functions of `vm`. `disks` are open descriptors by disk name, `networks` the VM's ends of them."""

    vm: VmEntry
    memory: DeviceMemory
    port: DevicePort
    disks: Mapping[str, int]
    networks: Mapping[str, Switch]

    def make(self, device: DeviceEntry) -> VirtioPciFunction:
        """A function; raises UserError for what does not exist, HostFault for a disk that cannot be read."""
        kind = DEVICE_KINDS.get(device.kind)
        if kind is None:
            raise UserError(
                f"{self.vm.name}: device {device.kind!r} does not exist; there is: {', '.join(DEVICE_KINDS)}"
            )
        virtio = kind.make(self, device)
        virtio.on_fault = self.port.device_fault
        if self.vm.time == "instructions":
            # Whoever kicks waits until the device is done: there is nothing to look for.
            virtio.poll_ns = 0
        return VirtioPciFunction(virtio, kind.pci_class)

    def _blk(self, device: DeviceEntry) -> VirtioDevice:
        entry = next((disk for disk in self.vm.disks if disk.name == device.disk), None)
        if entry is None or entry.name not in self.disks:
            raise UserError(f"{self.vm.name}: virtio-blk needs a disk of the VM, not {device.disk!r}")
        if entry.format != "raw":
            raise UserError(f"{self.vm.name}: disk {entry.name!r} has format {entry.format!r}; only raw is read")
        try:
            disk = DiskFile(self.disks[entry.name], readonly=entry.readonly)
        except OSError as error:
            raise HostFault(f"disk {entry.name!r}: {error.strerror}") from None
        blk = VirtioBlk(self._name(entry.name), self.memory, disk, serial=entry.name, offer=device.offer)
        blk.on_io_error = self.port.io_error
        return blk

    def _net(self, device: DeviceEntry) -> VirtioDevice:
        switch = self.networks.get(device.network or "")
        if switch is None or device.mac is None:
            raise UserError(f"{self.vm.name}: virtio-net needs a network and an address, not {device.network!r}")
        mac = bytes.fromhex(device.mac.replace(":", ""))
        name = self._name(f"net-{device.mac}")
        return VirtioNet(name, self.memory, switch, mac, offer=device.offer)

    def _rng(self, device: DeviceEntry) -> VirtioDevice:
        return VirtioRng(self._name("rng"), self.memory, offer=device.offer)

    def _console(self, device: DeviceEntry) -> VirtioDevice:
        if device.name is None:
            raise UserError(f"{self.vm.name}: virtio-console needs a name")
        return VirtioConsole(self._name(device.name), self.memory, offer=device.offer)

    def _name(self, device: str) -> str:
        return f"{self.vm.name}/{device}"


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device: its class, what makes one, and what it is on the PCI bus."""

    device: type[VirtioDevice]
    make: Callable[[DeviceMaker, DeviceEntry], VirtioDevice]
    pci_class: PciClass

    def may_offer(self) -> list[str]:
        """The features that one may offer, by name."""
        return feature_names(FEATURES | ACCESS_FEATURES | self.device.MAY_OFFER, self.device.FEATURE_BITS)


DEVICE_KINDS: Mapping[str, DeviceKind] = {
    "virtio-blk": DeviceKind(VirtioBlk, DeviceMaker._blk, PciClass.SCSI),
    "virtio-net": DeviceKind(VirtioNet, DeviceMaker._net, PciClass.ETHERNET),
    "virtio-rng": DeviceKind(VirtioRng, DeviceMaker._rng, PciClass.OTHER),
    "virtio-console": DeviceKind(VirtioConsole, DeviceMaker._console, PciClass.COMMUNICATION),
}
