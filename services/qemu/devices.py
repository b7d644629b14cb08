"""The devices that a VM may have, made from its start configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from protocol.errors import HostFault, UserError
from protocol.startup import DeviceEntry, VmEntry
from services.qemu.device_function import DeviceFunction
from services.qemu.disk_file import DiskFile
from services.qemu.edu import Edu, EduFunction, EduPciState
from services.qemu.network import Switch
from services.qemu.virtio_access import ACCESS_FEATURES, DeviceMemory
from services.qemu.virtio_balloon import BalloonPort, VirtioBalloon
from services.qemu.virtio_blk import VirtioBlk
from services.qemu.virtio_console import VirtioConsole
from services.qemu.virtio_device import FEATURES, VirtioDevice
from services.qemu.virtio_net import VirtioNet
from services.qemu.virtio_pci import VirtioPciFunction, VirtioPciState
from services.qemu.virtio_rng import VirtioRng
from shared.pci import PciClass
from shared.virtio import feature_names

FunctionState = VirtioPciState | EduPciState
"""The states of all kinds of functions."""


class DevicePort(BalloonPort, Protocol):
    """What the operator hears of a device, and what a balloon asks of kvm."""

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

    def make(self, device: DeviceEntry) -> DeviceFunction[Any]:
        """A function; raises UserError for what does not exist, HostFault for a disk that cannot be read."""
        kind = DEVICE_KINDS.get(device.kind)
        if kind is None:
            known = ", ".join(DEVICE_KINDS)
            raise UserError(f"{self.vm.name}: device {device.kind!r} does not exist; there is: {known}")
        return kind.make(self, device)

    def edu(self, device: DeviceEntry) -> EduFunction:
        """The educational device."""
        if device.name is None:
            raise UserError(f"{self.vm.name}: edu needs a name")
        edu = Edu(self._name(device.name), self.memory.platform, device.dma_bits)
        edu.on_fault = self.port.device_fault
        return EduFunction(edu)

    def virtio(self, make: MakeVirtio, pci_class: PciClass, device: DeviceEntry) -> VirtioPciFunction:
        """A virtio device on PCI."""
        virtio = make(self, device)
        virtio.on_fault = self.port.device_fault
        if self.vm.time == "instructions":
            # Whoever kicks waits until the device is done: there is nothing to look for.
            virtio.poll_ns = 0
        return VirtioPciFunction(virtio, pci_class)

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

    def _balloon(self, device: DeviceEntry) -> VirtioDevice:
        name = self._name("balloon")
        return VirtioBalloon(name, self.memory, self.port, self.vm.memory_bytes, offer=device.offer)

    def _name(self, device: str) -> str:
        return f"{self.vm.name}/{device}"


MakeVirtio = Callable[[DeviceMaker, DeviceEntry], VirtioDevice]


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device: its class, and what makes one with its PCI function."""

    device: type[VirtioDevice] | type[Edu]
    make: Callable[[DeviceMaker, DeviceEntry], DeviceFunction[Any]]

    def may_offer(self) -> list[str]:
        """The virtio features that one may offer, by name."""
        if not issubclass(self.device, VirtioDevice):
            return []
        return feature_names(FEATURES | ACCESS_FEATURES | self.device.MAY_OFFER, self.device.FEATURE_BITS)


def _virtio(device: type[VirtioDevice], make: MakeVirtio, pci_class: PciClass) -> DeviceKind:
    return DeviceKind(device, lambda maker, entry: maker.virtio(make, pci_class, entry))


DEVICE_KINDS: Mapping[str, DeviceKind] = {
    "virtio-blk": _virtio(VirtioBlk, DeviceMaker._blk, PciClass.SCSI),
    "virtio-net": _virtio(VirtioNet, DeviceMaker._net, PciClass.ETHERNET),
    "virtio-rng": _virtio(VirtioRng, DeviceMaker._rng, PciClass.OTHER),
    "virtio-console": _virtio(VirtioConsole, DeviceMaker._console, PciClass.COMMUNICATION),
    "virtio-balloon": _virtio(VirtioBalloon, DeviceMaker._balloon, PciClass.OTHER),
    "edu": DeviceKind(Edu, DeviceMaker.edu),
}
