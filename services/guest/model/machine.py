"""What the kernel takes from the device tree, and what the boot stage writes into it.

Read: /memory@*/reg, /chosen (bootargs, linux,initrd-start, linux,initrd-end, qemu,boot-kernel), /rtas (every one-cell
property is a token; linux,rtas-base), /vdevice/vty (reg, interrupts), the node with device_type "pci" (reg = BUID,
ranges, ibm,dma-window) and its children (reg, ibm,dma-window), and the memory reservations. Source: LoPAR; QEMU
hw/ppc/spapr.c; Linux prom_init.c.
"""

from __future__ import annotations

from itertools import islice
from struct import Struct

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES
from services.guest.model.cpu import RTAS_AREA_BYTES, Cpu, Panic
from services.guest.model.state import BusWindow, Machine
from shared.esm_digest import RTAS_TEXT
from shared.fdt_reader import BOOT_LIMITS, FdtNode, FdtTree, fdt_total_bytes, read_fdt
from shared.fdt_values import add_node, cells, quads
from shared.pci import OfSpace
from shared.virtio import BYPASS_PROPERTY

MIN_MEMORY_BYTES = 16 << 20
MAX_FUNCTIONS = 32
"""A bus has no more slots."""
_NO_RTAS_TOKEN = frozenset({"rtas-size", "linux,rtas-base", "linux,rtas-entry", "phandle", "linux,phandle"})


def load_tree(cpu: Cpu, gpa: int) -> tuple[FdtTree, int]:
    """The tree at `gpa` and its length in bytes; raises Panic."""
    try:
        n_bytes = fdt_total_bytes(cpu.load(gpa, 8))
        if n_bytes > BOOT_LIMITS.total_bytes:
            raise GuestFault(f"{n_bytes} bytes are too many")
        return read_fdt(cpu.load(gpa, n_bytes)), n_bytes
    except GuestFault as error:
        raise Panic(f"device tree at {gpa:#x}: {error}") from None


def child(node: FdtNode, name: str) -> FdtNode | None:
    """The first child of this name, with whatever unit address."""
    return next((found for found in node.children.values() if found.name.split("@")[0] == name), None)


def property_cells(node: FdtNode, name: str) -> list[int]:
    """A property as u32 cells; empty when it is missing."""
    data = node.properties.get(name, b"")
    return list(Struct(f">{len(data) // 4}I").unpack_from(data))


def read_machine(tree: FdtTree, machine: Machine, ram_bytes: int) -> None:
    """Fill `machine` from the tree; raises Panic when the VM cannot run."""
    machine.memory_bytes = min(_memory_bytes(tree.root), ram_bytes)
    if machine.memory_bytes < MIN_MEMORY_BYTES:
        raise Panic(f"{machine.memory_bytes} bytes of memory, {MIN_MEMORY_BYTES} needed")
    _read_chosen(child(tree.root, "chosen") or FdtNode("chosen"), machine)
    rtas = child(tree.root, "rtas") or FdtNode("rtas")
    machine.rtas_tokens = {
        name: int.from_bytes(data, "big")
        for name, data in rtas.properties.items()
        if len(data) == 4 and name not in _NO_RTAS_TOKEN
    }
    machine.rtas_base = rtas.number("linux,rtas-base") or 0
    _read_console(tree.root, machine)
    _read_bridge(tree.root, machine)
    machine.reserved = [*tree.reservations, (machine.fdt, machine.fdt_bytes)]
    for gpa, n_bytes in ((machine.kernel, machine.kernel_bytes), (machine.initrd, machine.initrd_bytes)):
        if n_bytes:
            machine.reserved.append((gpa, n_bytes))
    if machine.rtas_base:
        machine.reserved.append((machine.rtas_base, RTAS_AREA_BYTES))


def _memory_bytes(root: FdtNode) -> int:
    """The length of the memory that begins at 0 and has no gap."""
    ranges = []
    for node in root.children.values():
        if node.name.split("@")[0] == "memory" and len(property_cells(node, "reg")) == 4:
            high, low, size_high, size_low = property_cells(node, "reg")
            ranges.append((high << 32 | low, size_high << 32 | size_low))
    end = 0
    for base, n_bytes in sorted(ranges):
        if base != end:
            break
        end += n_bytes
    return end


def _read_chosen(chosen: FdtNode, machine: Machine) -> None:
    machine.boot_args = (chosen.text("bootargs") or "")[:2048]
    machine.initrd = chosen.number("linux,initrd-start") or 0
    machine.initrd_bytes = max(0, (chosen.number("linux,initrd-end") or 0) - machine.initrd)
    kernel = property_cells(chosen, "qemu,boot-kernel")
    if len(kernel) == 4:
        machine.kernel = kernel[0] << 32 | kernel[1]
        machine.kernel_bytes = kernel[2] << 32 | kernel[3]


def _read_console(root: FdtNode, machine: Machine) -> None:
    vdevice = child(root, "vdevice")
    vty = child(vdevice, "vty") if vdevice else None
    if vty is None:
        return
    machine.console_unit = (property_cells(vty, "reg") or [0])[0]
    machine.console_irq = (property_cells(vty, "interrupts") or [0])[0]


def _read_bridge(root: FdtNode, machine: Machine) -> None:
    bridge = next((node for node in root.children.values() if node.text("device_type") == "pci"), None)
    if bridge is None:
        return
    reg = property_cells(bridge, "reg")
    if len(reg) < 2:
        return
    machine.has_bridge = True
    machine.buid = reg[0] << 32 | reg[1]
    machine.window = _dma_window(bridge) or BusWindow()
    windows = ((_config_addr(node), _dma_window(node)) for node in bridge.children.values())
    own = ((config_addr, window) for config_addr, window in windows if window is not None)
    machine.own_windows = dict(islice(own, MAX_FUNCTIONS))
    machine.mmio = _mmio_windows(property_cells(bridge, "ranges"))
    bypassable = (_config_addr(node) for node in bridge.children.values() if BYPASS_PROPERTY in node.properties)
    machine.bypassable = list(islice(bypassable, MAX_FUNCTIONS))


def _dma_window(node: FdtNode) -> BusWindow | None:
    """What a node's `ibm,dma-window` says; None when it has none."""
    window = property_cells(node, "ibm,dma-window")
    if len(window) != 5:
        return None
    return BusWindow(liobn=window[0], base=window[1] << 32 | window[2], n_bytes=window[3] << 32 | window[4])


def _config_addr(node: FdtNode) -> int:
    """Of a PCI function: bus and devfn out of the first cell of its `reg`."""
    return (property_cells(node, "reg") or [0])[0] & 0xFFFF00


def _mmio_windows(words: list[int]) -> list[tuple[int, int, int]]:
    """The memory entries of a bridge's `ranges`: 3 PCI cells, 2 parent cells, 2 size cells."""
    windows = []
    for at in range(0, len(words) - 6, 7):
        high, pci_high, pci_low, gpa_high, gpa_low, size_high, size_low = words[at : at + 7]
        if high >> 24 & 3 in (OfSpace.MEM32, OfSpace.MEM64):
            windows.append((pci_high << 32 | pci_low, gpa_high << 32 | gpa_low, size_high << 32 | size_low))
    return windows[:8]


def write_bypass(tree: FdtTree, config_addr: int) -> None:
    """Say in the tree that a function may be taken out of the IOMMU; a node is made where the tree has none of it."""
    bridge = next((node for node in tree.root.children.values() if node.text("device_type") == "pci"), None)
    if bridge is None:
        return
    node = next((node for node in bridge.children.values() if _config_addr(node) == config_addr), None)
    if node is None:
        node = add_node(bridge, f"virtio@{config_addr >> 11:x}", {"reg": cells(config_addr, 0, 0, 0, 0)})
    node.properties[BYPASS_PROPERTY] = b""


def write_chosen(tree: FdtTree, machine: Machine) -> None:
    """Put into the tree what the boot stage did: RTAS, kernel, initramfs, command line."""
    rtas = child(tree.root, "rtas")
    if rtas is not None and machine.rtas_base:
        rtas.properties["linux,rtas-base"] = rtas.properties["linux,rtas-entry"] = cells(machine.rtas_base)
        rtas.properties["rtas-size"] = cells(len(RTAS_TEXT))
    chosen = child(tree.root, "chosen") or add_node(tree.root, "chosen", {})
    chosen.properties["bootargs"] = machine.boot_args.encode("ascii", "replace") + b"\0"
    if machine.initrd_bytes:
        chosen.properties["linux,initrd-start"] = quads(machine.initrd)
        chosen.properties["linux,initrd-end"] = quads(machine.initrd + machine.initrd_bytes)


def place(machine: Machine, n_bytes: int, *, from_bytes: int = PAGE_BYTES) -> int:
    """Room for `n_bytes` outside all reserved ranges, 64 KiB aligned, lowest first, and reserve it; raises Panic."""
    gpa = from_bytes
    for start, length in sorted(machine.reserved):
        if gpa + n_bytes <= start:
            break
        if start + length > gpa:
            gpa = (start + length + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    if gpa + n_bytes > machine.memory_bytes:
        raise Panic(f"no room for {n_bytes} bytes")
    machine.reserved.append((gpa, n_bytes))
    return gpa


def has_boot_arg(machine: Machine, *wanted: str) -> bool:
    """Whether the command line has one of these words."""
    return not set(wanted).isdisjoint(machine.boot_args.split())
