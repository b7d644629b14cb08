"""The PCI host bridge and its devices in the device tree.

A PCI address is three cells, phys.hi (space, bus, devfn, register) first; a size is two. The interrupt map sends each
slot's pin to one of the bridge's four level sources.

Source: PCI Bus Binding to IEEE 1275; QEMU 7.2 `hw/ppc/spapr_pci.c`.
"""

from __future__ import annotations

from protocol.rtas import (
    CREATE_PE_DMA_WINDOW,
    QUERY_PE_DMA_WINDOW,
    REMOVE_PE_DMA_WINDOW,
    RESET_PE_DMA_WINDOW,
)
from services.qemu.dma_domain import DEFAULT_BASE, DEFAULT_BYTES, DmaDomain
from services.qemu.pci_bus import Bar, PciFunction
from services.qemu.phb import N_PINS, PciHostBridge, Window
from shared.fdt_reader import FdtNode
from shared.fdt_values import add_node, cells, quads, strings
from shared.interrupt_sources import MSI_BASE, SOURCES_END
from shared.pci import (
    OF_PREFETCHABLE,
    OF_RELOCATABLE,
    Capability,
    Config,
    OfSpace,
    PciClass,
    devfn_of,
    of_phys_hi,
)

N_SLOTS = 32
LEVEL = 1
_SLOT_MASK = 0xF800
_PIN_MASK = 0xFFFFFFFF
_NAMES: dict[int, str] = {
    PciClass.SCSI: "scsi",
    PciClass.ETHERNET: "ethernet",
    PciClass.COMMUNICATION: "communication-controller",
    PciClass.OTHER: "legacy-device",
}
"""Node names by class, as the PCI binding's generic names."""
_MESSAGE_COUNTS = {Capability.MSI: "ibm,req#msi", Capability.MSIX: "ibm,req#msi-x"}
"""The property that says how many messages a function can send."""


def bridge_node(bridge: PciHostBridge, interrupt_parent: int, *, devices: bool) -> FdtNode:
    """The node of `bridge`; with a child for each function if `devices`."""
    node = FdtNode(f"pci@{bridge.buid:x}", _bridge_properties(bridge, interrupt_parent))
    if devices:
        # Firmware that reads this takes the nodes as they are and only gives the BARs addresses.
        node.properties["qemu,phb-enumerated"] = cells(1)
        for _, function in sorted(bridge.bus.functions.items()):
            domain = bridge.domain_of(function.devfn)
            own = {} if domain is bridge.bus_domain else _dma_properties(bridge, domain)
            add_node(node, _name(function), _function_properties(function) | own)
    return node


def _bridge_properties(bridge: PciHostBridge, interrupt_parent: int) -> dict[str, bytes]:
    return {
        "device_type": strings("pci"),
        "compatible": strings("IBM,Logical_PHB"),
        "reg": quads(bridge.buid, 0),
        "#address-cells": cells(3),
        "#size-cells": cells(2),
        "#interrupt-cells": cells(1),
        "used-by-rtas": b"",
        "bus-range": cells(0, 0xFF),
        "ranges": b"".join(_range(window) for window in (bridge.io, bridge.mem32, bridge.mem64)),
        "ibm,pci-config-space-type": cells(1),
        "ibm,pe-total-#msi": cells(SOURCES_END - MSI_BASE),
        "interrupt-map-mask": cells(_SLOT_MASK, 0, 0, _PIN_MASK),
        "interrupt-map": _interrupt_map(bridge, interrupt_parent),
        **_dma_properties(bridge, bridge.bus_domain),
    }


def _dma_properties(bridge: PciHostBridge, domain: DmaDomain) -> dict[str, bytes]:
    """The window of a node and of all below it that have none: a guest looks from the device up."""
    properties = {
        "ibm,dma-window": cells(domain.liobns[0]) + quads(DEFAULT_BASE, DEFAULT_BYTES),
        "ibm,#dma-address-cells": cells(2),
        "ibm,#dma-size-cells": cells(2),
    }
    if bridge.ddw:
        tokens = (QUERY_PE_DMA_WINDOW, CREATE_PE_DMA_WINDOW, REMOVE_PE_DMA_WINDOW)
        properties["ibm,ddw-applicable"] = cells(*tokens)
        properties["ibm,ddw-extensions"] = cells(1, RESET_PE_DMA_WINDOW)
    return properties


def _range(window: Window) -> bytes:
    return cells(of_phys_hi(window.space, 0, 0)) + quads(window.bus, window.gpa, window.size_bytes)


def _interrupt_map(bridge: PciHostBridge, interrupt_parent: int) -> bytes:
    return b"".join(
        cells(devfn_of(slot) << 8, 0, 0, pin, interrupt_parent, bridge.lsi_source(devfn_of(slot), pin), LEVEL)
        for slot in range(N_SLOTS)
        for pin in range(1, N_PINS + 1)
    )


def _name(function: PciFunction) -> str:
    identity = function.identity
    name = _NAMES.get(identity.class_code, f"pci{identity.vendor:x},{identity.device:x}")
    slot, number = function.devfn >> 3, function.devfn & 7
    return f"{name}@{slot:x},{number:x}" if number else f"{name}@{slot:x}"


def _function_properties(function: PciFunction) -> dict[str, bytes]:
    identity = function.identity
    properties = {
        "vendor-id": cells(identity.vendor),
        "device-id": cells(identity.device),
        "revision-id": cells(identity.revision),
        "class-code": cells(identity.class_code),
        "subsystem-vendor-id": cells(identity.subsystem_vendor),
        "subsystem-id": cells(identity.subsystem),
        "min-grant": cells(function.read_config(Config.MIN_GRANT, 1)),
        "max-latency": cells(function.read_config(Config.MAX_LATENCY, 1)),
        "cache-line-size": cells(function.read_config(Config.CACHE_LINE_SIZE, 1)),
        "devsel-speed": cells(0),
        "ibm,loc-code": strings(f"pefbox_pci@{function.devfn >> 3:x}.{function.devfn & 7:x}"),
        "reg": _registers(function, assigned=False),
    }
    if identity.interrupt_pin:
        properties["interrupts"] = cells(identity.interrupt_pin)
    if function.messages is not None:
        properties[_MESSAGE_COUNTS[function.messages.capability]] = cells(function.messages.n_vectors)
    assigned = _registers(function, assigned=True)
    if assigned:
        properties["assigned-addresses"] = assigned
    return properties


def _registers(function: PciFunction, *, assigned: bool) -> bytes:
    """`reg`: configuration space, then the sizes of the BARs. `assigned-addresses`: the BARs that have an address."""
    entry = b"" if assigned else cells(of_phys_hi(OfSpace.CONFIG, 0, function.devfn), 0, 0, 0, 0)
    for bar in function.bars:
        address = function.bar_address(bar)
        if assigned and not address:
            continue
        # Only an assigned address says that it may be prefetched, as in QEMU's tree and firmware's.
        flags = OF_RELOCATABLE | (OF_PREFETCHABLE if bar.prefetchable else 0) if assigned else 0
        entry += _bar(function, bar, address if assigned else 0, flags)
    return entry


def _bar(function: PciFunction, bar: Bar, address: int, flags: int) -> bytes:
    high = of_phys_hi(bar.space, 0, function.devfn, bar.register, flags)
    return cells(high) + quads(address, bar.region.size_bytes)
