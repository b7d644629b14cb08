"""A VM as libvirt's domain XML (docs/management.md says what differs from libvirt, and why)."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree.ElementTree import Element

from deploy.host_description import BALLOON, LAUNCH_SECURITY
from deploy.vm_description import DeviceRow, VmDescription
from deploy.xml_text import child, kib, own, to_text, yes_no
from shared.machine_type import NVRAM_REG, REPEATABLE_START_SECONDS, VTY_REG

MODERN = "virtio-non-transitional"
"""As libvirt calls a virtio device without legacy registers."""
RANDOM_SOURCE = "/dev/urandom"
_NOBODY = "null"
"""Text goes to and from the buffers of kvm or qemu, which `pefbox console` reads: no back end that libvirt knows."""


def domain_xml(vm: VmDescription) -> str:
    """The document."""
    root = Element("domain", {"type": "kvm"})
    child(root, "name", vm.name)
    child(root, "uuid", vm.uuid)
    _add_metadata(root, vm)
    kib(root, "memory", vm.memory_bytes)
    kib(root, "currentMemory", vm.memory_bytes)
    backing = child(root, "memoryBacking")
    child(backing, "source", type="file")
    child(backing, "access", mode="shared")
    child(root, "vcpu", vm.vcpus, placement="static")
    _add_os(root, vm)
    cpu = child(root, "cpu", mode="custom", match="exact")
    child(cpu, "model", vm.cpu_model, fallback="forbid")
    _add_clock(root, vm)
    # A VM that is off keeps its processes and its memory until it is reset or restarted.
    for event, action in (("on_poweroff", "preserve"), ("on_reboot", "restart"), ("on_crash", "preserve")):
        child(root, event, action)
    _add_devices(root, vm)
    if vm.may_turn_secure:
        child(root, "launchSecurity", type=LAUNCH_SECURITY)
    return to_text(root)


def _add_metadata(root: Element, vm: VmDescription) -> None:
    facts = child(child(root, "metadata"), own("vm"), cluster=vm.cluster, host=vm.host, lpid=vm.lpid)
    child(facts, own("state"), vm.state, reason=vm.reason or None)
    child(
        facts,
        own("security"),
        "secure" if vm.secure else "normal",
        allowed=yes_no(vm.may_turn_secure),
        memory=vm.secure_memory_mode,
    )
    guest = vm.guest
    child(facts, own("guest"), kernel=guest.kernel, boot=guest.boot, dma=guest.dma, workload=guest.workload)
    if guest.esm_blob is not None:
        child(facts, own("esmBlob"), guest.esm_blob)
    if guest.boot == "disk" and guest.command_line:
        # libvirt knows a command line only together with a kernel.
        child(facts, own("commandLine"), guest.command_line)
    for device in vm.devices:
        if device.kind in _OURS:
            child(facts, own("device"), device.name, kind=device.kind, slot=f"{device.slot:#04x}")
    child(facts, own("pciNodes"), guest.pci_nodes)
    child(facts, own("time"), vm.time)
    for name, row in vm.operations.items():
        reason = row.reason or None
        child(facts, own("operation"), name=name, possible=yes_no(row.possible), reason=reason)


def _add_os(root: Element, vm: VmDescription) -> None:
    guest = vm.guest
    os = child(root, "os")
    child(os, "type", "hvm", arch=vm.arch, machine=vm.machine)
    if guest.firmware is not None:
        child(os, "loader", guest.firmware, readonly="yes", type="rom")
    if guest.boot == "disk":
        child(os, "boot", dev="hd")
        return
    for name, value in (("kernel", guest.image), ("initrd", guest.initrd), ("cmdline", guest.command_line)):
        if value:
            child(os, name, value)


def _add_clock(root: Element, vm: VmDescription) -> None:
    if vm.time == "wall":
        child(root, "clock", offset="utc")
    else:
        child(root, "clock", offset="absolute", start=REPEATABLE_START_SECONDS)


def _add_devices(root: Element, vm: VmDescription) -> None:
    devices = child(root, "devices")
    bridge = child(devices, "controller", type="pci", index=0, model="pci-root")
    child(bridge, "model", name="spapr-pci-host-bridge")
    child(bridge, "target", index=0)
    _add_terminal(devices)
    place = _Place(devices)
    for device in vm.devices:
        if device.kind in _ADDERS:
            _ADDERS[device.kind](place, device)
    child(child(devices, "nvram"), "address", type="spapr-vio", reg=f"{NVRAM_REG:#x}")
    if not any(device.kind == BALLOON for device in vm.devices):
        child(devices, "memballoon", model="none")


def _add_terminal(devices: Element) -> None:
    serial = child(devices, "serial", type=_NOBODY)
    target = child(serial, "target", type="spapr-vio-serial", port=0)
    child(target, "model", name="spapr-vty")
    child(serial, "address", type="spapr-vio", reg=f"{VTY_REG:#x}")
    console = child(devices, "console", type=_NOBODY)
    child(console, "target", type="serial", port=0)


class _Place:
    """Where devices are put, and what libvirt numbers."""

    def __init__(self, devices: Element) -> None:
        self.devices = devices
        self.n_disks = 0
        self.n_consoles = 0

    def next_disk(self) -> str:
        """`vda`, `vdb`, ..."""
        self.n_disks += 1
        return disk_name(self.n_disks - 1)


def disk_name(index: int) -> str:
    """The name that Linux gives a virtio disk: vda to vdz, then vdaa."""
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"vd{letters}"


def _finish(element: Element, device: DeviceRow) -> None:
    """What every device of the bus has: its way to memory and its address."""
    if device.access_platform:
        driver = element.find("driver")
        (child(element, "driver") if driver is None else driver).set("iommu", "on")
    child(
        element,
        "address",
        type="pci",
        domain="0x0000",
        bus="0x00",
        slot=f"{device.slot:#04x}",
        function=f"{device.function:#x}",
    )


def _add_disk(place: _Place, device: DeviceRow) -> None:
    disk = device.disk
    if disk is None:
        return
    kind, source = ("block", "dev") if disk.is_block_device else ("file", "file")
    element = child(place.devices, "disk", type=kind, device="disk", model=MODERN)
    child(element, "driver", name="qemu", type=disk.format)
    child(element, "source", **{source: disk.path})
    child(element, "target", dev=place.next_disk(), bus="virtio")
    if disk.readonly:
        child(element, "readonly")
    child(element, "serial", disk.name)
    _finish(element, device)


def _add_interface(place: _Place, device: DeviceRow) -> None:
    element = child(place.devices, "interface", type="network")
    child(element, "mac", address=device.mac)
    child(element, "source", network=device.network)
    child(element, "model", type=MODERN)
    child(element, "mtu", size=device.mtu)
    _finish(element, device)


def _add_rng(place: _Place, device: DeviceRow) -> None:
    element = child(place.devices, "rng", model=MODERN)
    child(element, "backend", RANDOM_SOURCE, model="random")
    _finish(element, device)


def _add_console(place: _Place, device: DeviceRow) -> None:
    """Each is a bus of its own with one port, so a controller and a console."""
    index = place.n_consoles
    place.n_consoles += 1
    controller = child(place.devices, "controller", type="virtio-serial", index=index, model=MODERN, ports=1)
    _finish(controller, device)
    # The first console of all is the terminal.
    console = child(place.devices, "console", type=_NOBODY)
    child(console, "target", type="virtio", port=index + 1)
    child(console, "alias", name=f"ua-{device.name}")
    child(console, "address", type="virtio-serial", controller=index, bus=0, port=0)


def _add_balloon(place: _Place, device: DeviceRow) -> None:
    element = child(place.devices, "memballoon", model=MODERN)
    _finish(element, device)


_ADDERS: dict[str, Callable[[_Place, DeviceRow], None]] = {
    "virtio-blk": _add_disk,
    "virtio-net": _add_interface,
    "virtio-rng": _add_rng,
    "virtio-console": _add_console,
    BALLOON: _add_balloon,
}
_OURS = frozenset({"edu"})
"""Kinds that libvirt has no element for: they are among the facts of our own."""
DESCRIBED_KINDS = frozenset(_ADDERS) | _OURS
"""The kinds of devices that have an element."""
