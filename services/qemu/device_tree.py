"""The device tree that a guest starts with, as QEMU's pseries machine describes itself.

Everything that a guest must not assume is in it: memory, RTAS tokens, interrupt sources, windows of the PCI host
bridge. Cells are big-endian; `/memory@0`, `/rtas` and `/chosen` are also what the ultravisor reads at ESM.

Source: PAPR appendix B (LoPAPR device tree bindings); QEMU 7.2 `hw/ppc/spapr.c`, `hw/intc/xics_spapr.c`,
`hw/ppc/spapr_vio.c`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from services.qemu.device_tree_pci import bridge_node
from services.qemu.phb import PciHostBridge
from services.qemu.rtas import NVRAM_BYTES
from shared.esm_digest import RTAS_TEXT
from shared.fdt_reader import FdtNode, FdtTree
from shared.fdt_values import add_node, cells, quads, strings
from shared.fdt_writer import write_fdt
from shared.interrupt_sources import EPOW_SOURCE, HOTPLUG_SOURCE, NVRAM_SOURCE, VTY_SOURCE
from shared.machine_type import CPU_MODEL, MACHINE, NVRAM_REG, VTY_REG

XICP_PHANDLE = 0x1111
TIMEBASE_HZ = 512_000_000
CLOCK_HZ = 1_000_000_000
CPU_VERSION = 0x0F000005
"""The architected POWER9: what a POWER9 or newer gives guests that are to see no more than that."""
STDOUT_PATH = f"/vdevice/vty@{VTY_REG:x}"

EDGE = 0
LEVEL = 1
"""Second cell of an interrupt specifier."""

_CACHE_BYTES = 0x8000
_CACHE_LINE_BYTES = 128
_RADIX_AP = ((12, 0), (16, 5), (21, 1), (30, 2))
"""Page shift and AP encoding of each radix page size: 4 KiB, 64 KiB, 2 MiB, 1 GiB."""
_SEGMENT_PAGE_SIZES = ((12, 0x000, ((12, 0x0),)), (16, 0x110, ((16, 0x1),)))
"""Base page shift, SLB encoding, and (shift, encoding) of the page sizes in such a segment."""

_SEGMENT_SHIFTS = (28, 40)
"""Segments of 256 MiB and 1 TiB."""

HYPERTAS = (
    "hcall-term",
    "hcall-interrupt",
    "hcall-tce",
    "hcall-vio",
    "hcall-splpar",
    "hcall-join",
    "hcall-set-mode",
    "hcall-debug",
    "hcall-multi-tce",
)
"""Groups of hypercalls that are answered."""
_QEMU_HYPERTAS = ("hcall-memop1",)

_LRDR_BLOCK_BYTES = 256 << 20
"""By how much memory would grow; as QEMU says also when nothing can be added."""

_PLATFORM_SUPPORT = bytes((23, 0x00, 24, 0x40, 25, 0x00, 26, 0x40))
"""Option vector 5: XICS only, radix only, no hash table options, guest translation shootdown."""
_NOTHING_AGREED = bytes(2)
"""Option vector 5 before anybody asked: one byte, empty."""


def _option_vector(values: bytes) -> bytes:
    """The whole option vector with these (byte, value) pairs set; the first byte is the number of bytes, less one."""
    vector = bytearray(max(values[::2]) + 1)
    vector[0] = len(vector) - 2
    for byte, value in zip(values[::2], values[1::2], strict=True):
        vector[byte] = value
    return bytes(vector)


_NEGOTIATED = _option_vector(_PLATFORM_SUPPORT)


class PciNodes(Enum):
    """Who describes the PCI devices."""

    QEMU = "qemu"
    """The tree has a node for each device."""
    FIRMWARE = "firmware"
    """The tree has the bridge alone; firmware probes the bus and adds nodes, as in 2018."""


@dataclass(frozen=True, slots=True)
class BootFacts:
    """What the machine was loaded with.

    `kernel` (start, bytes) and `initrd` (start, end) are in guest memory, `rtas_base` is where RTAS_TEXT lies.
    """

    bootargs: str = ""
    kernel: tuple[int, int] | None = None
    kernel_little_endian: bool = False
    initrd: tuple[int, int] | None = None
    rtas_base: int | None = None
    reservations: tuple[tuple[int, int], ...] = ()
    negotiated: bool = False
    """Nobody will call ibm,client-architecture-support: the tree has its outcome."""


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """The machine around the devices. `rtas_tokens` are the services that somebody answers."""

    vm_name: str
    uuid: bytes
    memory_bytes: int
    n_cpus: int
    rtas_tokens: Mapping[str, int]
    pci_nodes: PciNodes = PciNodes.QEMU
    boot: BootFacts = field(default_factory=BootFacts)


def build_device_tree(facts: TreeFacts, bridge: PciHostBridge) -> bytes:
    """The flattened tree, version 17."""
    root = _root(facts)
    _add_cpus(root, facts.n_cpus)
    _add_memory(root, facts.memory_bytes)
    _add_rtas(root, facts)
    _add_chosen(root, facts.boot)
    _add_event_sources(root)
    _add_interrupt_controller(root, facts.n_cpus)
    _add_vdevice(root)
    devices = facts.pci_nodes is PciNodes.QEMU
    node = bridge_node(bridge, XICP_PHANDLE, devices=devices)
    root.children[node.name] = node
    add_node(root, "hypervisor", {"compatible": strings("linux,kvm")})
    return write_fdt(FdtTree(root, list(facts.boot.reservations)))


def _root(facts: TreeFacts) -> FdtNode:
    uuid = facts.uuid.hex()
    text = "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))
    return FdtNode(
        "",
        {
            "#address-cells": cells(2),
            "#size-cells": cells(2),
            "device_type": strings("chrp"),
            "model": strings("IBM pSeries (emulated by pefbox)"),
            "compatible": strings(f"qemu,{MACHINE}"),
            "vm,uuid": strings(text),
            "system-id": strings(text),
            "ibm,partition-name": strings(facts.vm_name),
        },
    )


def _add_cpus(root: FdtNode, n_cpus: int) -> None:
    cpus = add_node(root, "cpus", {"#address-cells": cells(1), "#size-cells": cells(0)})
    for cpu in range(n_cpus):
        add_node(cpus, f"PowerPC,{CPU_MODEL}@{cpu:x}", _cpu_properties(cpu))


def _cpu_properties(cpu: int) -> dict[str, bytes]:
    cache = {f"{kind}-cache-{what}": cells(value) for kind in "di" for what, value in _cache_sizes().items()}
    return {
        "device_type": strings("cpu"),
        "reg": cells(cpu),
        "status": strings("okay"),
        "cpu-version": cells(CPU_VERSION),
        "64-bit": b"",
        "timebase-frequency": cells(TIMEBASE_HZ),
        "clock-frequency": cells(CLOCK_HZ),
        **cache,
        "slb-size": cells(32),
        "ibm,slb-size": cells(32),
        "ibm,vmx": cells(2),
        "ibm,dfp": cells(1),
        "ibm,purr": cells(1),
        "ibm,spurr": cells(1),
        "ibm,pa-features": _pa_features(),
        "ibm,processor-radix-AP-encodings": cells(*(ap << 29 | shift for shift, ap in _RADIX_AP)),
        "ibm,segment-page-sizes": _segment_page_sizes(),
        "ibm,processor-segment-sizes": cells(*_SEGMENT_SHIFTS, *(0xFFFFFFFF,) * (4 - len(_SEGMENT_SHIFTS))),
        "ibm,ppc-interrupt-server#s": cells(cpu),
        "ibm,ppc-interrupt-gserver#s": cells(cpu, 0),
        "ibm,chip-id": cells(0),
    }


def _cache_sizes() -> dict[str, int]:
    return {"size": _CACHE_BYTES, "line-size": _CACHE_LINE_BYTES, "block-size": _CACHE_LINE_BYTES}


_PA_FEATURE_BITS: Mapping[int, int] = {
    0: 0xF6,  # MMU, FPU, SLB, RUN, DABR, NX
    1: 0x3F,
    2: 0xC7,
    3: 0xC0,
    4: 0x80,
    5: 0xF0,  # LE, CFAR, EB, LSQ
    6: 0x80,
    16: 0x80,  # vector
    18: 0x80,  # vector scalar
    20: 0x80,  # vector XOR
    24: 0x80,  # extended decrementer
    26: 0x80,
    28: 0x80,
    30: 0x80,
    32: 0x80,  # little-endian atomics
    34: 0xC0,  # event-based branches
    36: 0x80,
    38: 0x80,
    40: 0x80,  # radix MMU
    42: 0x80,
    44: 0x80,
    46: 0x80,
    48: 0x80,
    50: 0x80,
    52: 0x80,
    54: 0x80,  # decimal floating point
    56: 0x80,
    58: 0x80,
    60: 0x80,
    62: 0x80,  # random numbers
}
_PA_FEATURE_BYTES = 66


def _pa_features() -> bytes:
    """Attribute bytes of a POWER9 (ISA 3.0), after their length and type."""
    return bytes((_PA_FEATURE_BYTES, 0, *(_PA_FEATURE_BITS.get(byte, 0) for byte in range(_PA_FEATURE_BYTES))))


def _segment_page_sizes() -> bytes:
    words: list[int] = []
    for shift, encoding, pages in _SEGMENT_PAGE_SIZES:
        words += [shift, encoding, len(pages)]
        for page in pages:
            words += page
    return cells(*words)


def _add_memory(root: FdtNode, memory_bytes: int) -> None:
    properties = {
        "device_type": strings("memory"),
        "reg": quads(0, memory_bytes),
        "ibm,associativity": cells(4, 0, 0, 0, 0),
    }
    add_node(root, "memory@0", properties)


def _add_rtas(root: FdtNode, facts: TreeFacts) -> None:
    properties = {
        "rtas-size": cells(len(RTAS_TEXT)),
        "rtas-event-scan-rate": cells(1),
        "rtas-error-log-max": cells(2048),
        "ibm,change-msix-capable": b"",
        # ibm,os-term comes back to its caller, without which Linux does not call it.
        "ibm,extended-os-term": b"",
        "ibm,hypertas-functions": strings(*HYPERTAS),
        "qemu,hypertas-functions": strings(*_QEMU_HYPERTAS),
        "ibm,lrdr-capacity": cells(0, 0, 0, _LRDR_BLOCK_BYTES, facts.n_cpus),
        "ibm,max-associativity-domains": cells(4, 0, 0, 0, 1),
        "ibm,associativity-reference-points": cells(4, 4, 2),
        **{name: cells(token) for name, token in facts.rtas_tokens.items()},
    }
    base = facts.boot.rtas_base
    if base is not None:
        properties["linux,rtas-base"] = properties["linux,rtas-entry"] = cells(base)
    add_node(root, "rtas", properties)


def _add_chosen(root: FdtNode, boot: BootFacts) -> None:
    properties = {
        "bootargs": strings(boot.bootargs),
        "stdout-path": strings(STDOUT_PATH),
        "linux,stdout-path": strings(STDOUT_PATH),
        "linux,pci-probe-only": cells(0),
        "ibm,arch-vec-5-platform-support": _PLATFORM_SUPPORT,
        "ibm,architecture-vec-5": _NEGOTIATED if boot.negotiated else _NOTHING_AGREED,
    }
    if boot.kernel is not None:
        properties["qemu,boot-kernel"] = quads(*boot.kernel)
        if boot.kernel_little_endian:
            properties["qemu,boot-kernel-le"] = b""
    if boot.initrd is not None:
        # One cell each: firmware reads no more.
        properties["linux,initrd-start"] = cells(boot.initrd[0])
        properties["linux,initrd-end"] = cells(boot.initrd[1])
    add_node(root, "chosen", properties)


def _add_event_sources(root: FdtNode) -> None:
    node = add_node(
        root,
        "event-sources",
        {
            "interrupt-controller": b"",
            "#interrupt-cells": cells(2),
            "interrupt-ranges": cells(EPOW_SOURCE, 1, HOTPLUG_SOURCE, 1),
        },
    )
    add_node(node, "epow-events", {"interrupts": cells(EPOW_SOURCE, EDGE)})
    add_node(node, "hot-plug-events", {"interrupts": cells(HOTPLUG_SOURCE, EDGE)})


def _add_interrupt_controller(root: FdtNode, n_cpus: int) -> None:
    add_node(
        root,
        "interrupt-controller",
        {
            "device_type": strings("PowerPC-External-Interrupt-Presentation"),
            "compatible": strings("IBM,ppc-xicp"),
            "interrupt-controller": b"",
            "ibm,interrupt-server-ranges": cells(0, n_cpus),
            "#interrupt-cells": cells(2),
            "linux,phandle": cells(XICP_PHANDLE),
            "phandle": cells(XICP_PHANDLE),
        },
    )


def _add_vdevice(root: FdtNode) -> None:
    vdevice = add_node(
        root,
        "vdevice",
        {
            "device_type": strings("vdevice"),
            "compatible": strings("IBM,vdevice"),
            "#address-cells": cells(1),
            "#size-cells": cells(0),
            "#interrupt-cells": cells(2),
            "interrupt-controller": b"",
        },
    )
    vty = {
        "device_type": strings("serial"),
        "compatible": strings("hvterm1"),
        "reg": cells(VTY_REG),
        "interrupts": cells(VTY_SOURCE, EDGE),
    }
    add_node(vdevice, f"vty@{VTY_REG:x}", vty)
    nvram = {
        "device_type": strings("nvram"),
        "compatible": strings("qemu,spapr-nvram"),
        "reg": cells(NVRAM_REG),
        "interrupts": cells(NVRAM_SOURCE, EDGE),
        "#bytes": cells(NVRAM_BYTES),
    }
    add_node(vdevice, f"nvram@{NVRAM_REG:x}", nvram)
