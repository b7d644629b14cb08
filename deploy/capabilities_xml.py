"""What a host offers as libvirt-style XML: <capabilities>, <domainCapabilities>, and what libvirt has no word for."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree.ElementTree import Element

from deploy.domain_xml import MODERN
from deploy.host_description import BALLOON, HostDescription
from deploy.xml_text import child, own, to_text, yes_no

_WORD_BITS = 64


def capabilities_xml(host: HostDescription) -> str:
    """The three parts below one root, which is ours: libvirt gives the first two in documents of their own."""
    root = Element(own("host"), {"cluster": host.cluster, "name": host.host})
    _add_capabilities(root, host)
    _add_domain_capabilities(root, host)
    _add_own(root, host)
    return to_text(root)


def _add_capabilities(root: Element, host: HostDescription) -> None:
    capabilities = child(root, "capabilities")
    machine = child(capabilities, "host")
    cpu = child(machine, "cpu")
    child(cpu, "arch", host.architectures[0])
    child(cpu, "model", host.cpu_model)
    # Of the host's own devices, none of which can be given to a VM.
    child(machine, "iommu", support="no")
    if host.migration_hosts:
        child(child(machine, "migration_features"), "live")
    for name in host.architectures:
        guest = child(capabilities, "guest")
        child(guest, "os_type", "hvm")
        arch = child(guest, "arch", name=name)
        child(arch, "wordsize", _WORD_BITS)
        child(arch, "emulator", host.emulator)
        child(arch, "machine", host.machine, maxCpus=host.max_vcpus)
        child(arch, "machine", host.machine_alias, canonical=host.machine, maxCpus=host.max_vcpus)
        child(arch, "domain", type="kvm")


def _add_domain_capabilities(root: Element, host: HostDescription) -> None:
    domain = child(root, "domainCapabilities")
    child(domain, "path", host.emulator)
    child(domain, "domain", "kvm")
    child(domain, "machine", host.machine)
    child(domain, "arch", host.architectures[0])
    child(domain, "vcpu", max=host.max_vcpus)
    child(domain, "iothreads", supported="no")
    cpu = child(domain, "cpu")
    for mode in ("host-passthrough", "maximum", "host-model"):
        child(cpu, "mode", name=mode, supported="no")
    custom = child(cpu, "mode", name="custom", supported="yes")
    child(custom, "model", host.cpu_model, usable="yes", vendor="IBM")
    _enum(child(domain, "memoryBacking", supported="yes"), "sourceType", ["file"])
    _add_devices(domain, host)
    features = child(domain, "features")
    security = child(features, "launchSecurity", supported=yes_no(bool(host.launch_security)))
    if host.launch_security:
        _enum(security, "sectype", host.launch_security)


def _add_devices(domain: Element, host: HostDescription) -> None:
    devices = child(domain, "devices")
    disk = _device(devices, "disk", "virtio-blk" in host.devices)
    if disk is not None:
        _enum(disk, "diskDevice", ["disk"])
        _enum(disk, "bus", ["virtio"])
        _enum(disk, "model", [MODERN])
    for name in ("graphics", "video", "hostdev"):
        _device(devices, name, False)
    rng = _device(devices, "rng", "virtio-rng" in host.devices)
    if rng is not None:
        _enum(rng, "model", [MODERN])
        _enum(rng, "backendModel", ["random"])
    for name in ("filesystem", "tpm", "redirdev", "channel"):
        _device(devices, name, False)
    interface = _device(devices, "interface", "virtio-net" in host.devices)
    if interface is not None:
        _enum(interface, "model", [MODERN])
    console = _device(devices, "console", True)
    assert console is not None
    _enum(console, "targetType", ["serial", "virtio"] if "virtio-console" in host.devices else ["serial"])
    memballoon = _device(devices, "memballoon", BALLOON in host.devices)
    if memballoon is not None:
        _enum(memballoon, "model", [MODERN])


def _device(devices: Element, name: str, is_supported: bool) -> Element | None:
    element = child(devices, name, supported=yes_no(is_supported))
    return element if is_supported else None


def _enum(parent: Element, name: str, values: Iterable[str]) -> None:
    enum = child(parent, "enum", name=name)
    for value in values:
        child(enum, "value", value)


def _add_own(root: Element, host: HostDescription) -> None:
    extras = child(root, own("extras"))
    memory = host.secure_memory
    if memory is not None:
        child(
            extras,
            own("secureMemory"),
            unit="bytes",
            total=memory.total_bytes,
            used=memory.used_bytes,
            free=memory.free_bytes,
            mode=memory.mode,
        )
    for other in host.migration_hosts:
        child(extras, own("migration"), to=other)
    child(extras, own("memory"), unit="bytes", min=host.min_memory_bytes, max=host.max_memory_bytes)
    for kind, offer in host.devices.items():
        device = child(extras, own("device"), kind=kind, iommu=yes_no(offer.access_platform))
        for feature in offer.features:
            child(device, own("feature"), feature)
    dma = host.dma
    windows = child(extras, own("dma"), maxWindows=dma.max_windows)
    child(
        windows,
        own("window"),
        base=f"{dma.default_base:#x}",
        size=dma.default_bytes,
        pageSize=dma.default_page_bytes,
        default="yes",
    )
    child(windows, own("window"), base=f"{dma.window64_base:#x}", maxPages=dma.max_window_pages, default="no")
    for page_bytes in dma.page_bytes:
        child(windows, own("pageSize"), page_bytes, unit="bytes")
    _own_enum(extras, "clock", host.clocks)
    _own_enum(extras, "pciNodes", host.pci_nodes)
    _own_enum(extras, "dmaDesign", host.dma_designs)
    _own_enum(extras, "kernel", host.kernels)
    _own_enum(extras, "boot", host.boots)


def _own_enum(extras: Element, name: str, values: Iterable[str]) -> None:
    for value in values:
        child(extras, own(name), value)
