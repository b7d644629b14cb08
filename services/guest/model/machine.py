"""What the kernel takes from the device tree, and what the boot stage writes into it.

Read: /memory@*/reg, /chosen (bootargs, linux,initrd-start, linux,initrd-end, qemu,boot-kernel), /rtas (every one-cell
property is a token; linux,rtas-base), /vdevice/vty (reg, interrupts), the node with device_type "pci" (reg = BUID,
ranges, ibm,dma-window), and the memory reservations. Source: LoPAR; QEMU hw/ppc/spapr.c; Linux prom_init.c.
"""

from __future__ import annotations

from protocol.geometry import PAGE_BYTES
from services.guest.model import flat_tree
from services.guest.model.cpu import RTAS_AREA_BYTES, Cpu, Panic
from services.guest.model.flat_tree import Node, Tree
from services.guest.model.state import Machine
from shared.pci import OfSpace

MIN_MEMORY_BYTES = 16 << 20
RTAS_CODE = bytes.fromhex("7c641b783c6000006063f000440000224e800020")
"""mr r4,r3; r3 = H_RTAS; sc 1; blr: what every pseries firmware instantiates, and what ESM blobs have the hash of."""
_NO_RTAS_TOKEN = frozenset({"rtas-size", "linux,rtas-base", "linux,rtas-entry", "phandle", "linux,phandle"})


def load_tree(cpu: Cpu, gpa: int) -> tuple[Tree, int]:
    """The tree at `gpa` and its length in bytes; raises Panic."""
    try:
        n_bytes = flat_tree.total_bytes(cpu.load(gpa, flat_tree.HEADER.size))
        return flat_tree.parse(cpu.load(gpa, n_bytes)), n_bytes
    except flat_tree.TreeError as error:
        raise Panic(f"device tree at {gpa:#x}: {error}") from None


def read_machine(tree: Tree, machine: Machine, ram_bytes: int) -> None:
    """Fill `machine` from the tree; raises Panic when the VM cannot run."""
    machine.memory_bytes = min(_memory_bytes(tree.root), ram_bytes)
    if machine.memory_bytes < MIN_MEMORY_BYTES:
        raise Panic(f"{machine.memory_bytes} bytes of memory, {MIN_MEMORY_BYTES} needed")
    _read_chosen(tree.root.child("chosen") or Node("chosen"), machine)
    rtas = tree.root.child("rtas") or Node("rtas")
    machine.rtas_tokens = {
        name: int.from_bytes(data, "big")
        for name, data in rtas.properties.items()
        if len(data) == 4 and name not in _NO_RTAS_TOKEN
    }
    machine.rtas_base = rtas.number("linux,rtas-base")
    _read_console(tree.root, machine)
    _read_bridge(tree.root, machine)
    machine.reserved = [*tree.reserved, (machine.fdt, flat_tree.MAX_TREE_BYTES if not machine.fdt_bytes else
                                         machine.fdt_bytes)]  # fmt: skip
    for gpa, n_bytes in ((machine.kernel, machine.kernel_bytes), (machine.initrd, machine.initrd_bytes)):
        if n_bytes:
            machine.reserved.append((gpa, n_bytes))
    if machine.rtas_base:
        machine.reserved.append((machine.rtas_base, RTAS_AREA_BYTES))


def _memory_bytes(root: Node) -> int:
    """The length of the memory that begins at 0 and has no gap."""
    ranges = []
    for node in root.children:
        if node.name.split("@")[0] == "memory" and len(node.cells("reg")) == 4:
            high, low, size_high, size_low = node.cells("reg")
            ranges.append((high << 32 | low, size_high << 32 | size_low))
    end = 0
    for base, n_bytes in sorted(ranges):
        if base != end:
            break
        end += n_bytes
    return end


def _read_chosen(chosen: Node, machine: Machine) -> None:
    machine.boot_args = chosen.text("bootargs")[:2048]
    machine.initrd = chosen.number("linux,initrd-start")
    machine.initrd_bytes = max(0, chosen.number("linux,initrd-end") - machine.initrd)
    kernel = chosen.cells("qemu,boot-kernel")
    if len(kernel) == 4:
        machine.kernel = kernel[0] << 32 | kernel[1]
        machine.kernel_bytes = kernel[2] << 32 | kernel[3]


def _read_console(root: Node, machine: Machine) -> None:
    vdevice = root.child("vdevice")
    vty = vdevice.child("vty") if vdevice else None
    if vty is None:
        return
    machine.console_unit = (vty.cells("reg") or [0])[0]
    machine.console_irq = (vty.cells("interrupts") or [0])[0]


def _read_bridge(root: Node, machine: Machine) -> None:
    bridge = next((node for node in root.children if node.text("device_type") == "pci"), None)
    if bridge is None:
        return
    reg, window = bridge.cells("reg"), bridge.cells("ibm,dma-window")
    if len(reg) < 2:
        return
    machine.has_bridge = True
    machine.buid = reg[0] << 32 | reg[1]
    if len(window) == 5:
        machine.liobn = window[0]
        machine.window_base = window[1] << 32 | window[2]
        machine.window_bytes = window[3] << 32 | window[4]
    machine.mmio = _mmio_windows(bridge.cells("ranges"))


def _mmio_windows(cells: list[int]) -> list[tuple[int, int, int]]:
    """The memory entries of a bridge's `ranges`: 3 PCI cells, 2 parent cells, 2 size cells."""
    windows = []
    for at in range(0, len(cells) - 6, 7):
        high, pci_high, pci_low, gpa_high, gpa_low, size_high, size_low = cells[at : at + 7]
        if high >> 24 & 3 in (OfSpace.MEM32, OfSpace.MEM64):
            windows.append((pci_high << 32 | pci_low, gpa_high << 32 | gpa_low, size_high << 32 | size_low))
    return windows[:8]


def write_chosen(tree: Tree, machine: Machine) -> None:
    """Put into the tree what the boot stage did: RTAS, kernel, initramfs, command line."""
    rtas = tree.root.child("rtas")
    if rtas is not None and machine.rtas_base:
        rtas.properties["linux,rtas-base"] = machine.rtas_base.to_bytes(4, "big")
        rtas.properties["linux,rtas-entry"] = machine.rtas_base.to_bytes(4, "big")
        rtas.properties["rtas-size"] = len(RTAS_CODE).to_bytes(4, "big")
    chosen = tree.root.child("chosen")
    if chosen is None:
        chosen = Node("chosen")
        tree.root.children.append(chosen)
    chosen.properties["bootargs"] = machine.boot_args.encode("ascii", "replace") + b"\0"
    if machine.initrd_bytes:
        chosen.properties["linux,initrd-start"] = machine.initrd.to_bytes(8, "big")
        chosen.properties["linux,initrd-end"] = (machine.initrd + machine.initrd_bytes).to_bytes(8, "big")


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
