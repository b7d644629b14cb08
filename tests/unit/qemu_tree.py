"""The device tree of QEMU's pseries machine, and ours of the same machine, as an independent parser reads them.

`python -m tests.unit.qemu_tree > tests/unit/qemu_device_tree.json` writes what the installed qemu-system-ppc64 gives.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import fdt

from protocol.ethernet import DEFAULT_MTU
from protocol.geometry import PAGE_BYTES
from protocol.startup import DeviceEntry, DiskEntry
from services.qemu.board import Board
from services.qemu.device_tree import BootFacts
from services.qemu.network import Switch
from services.qemu.testing import TestPort, TestRam, board_entry

FACTS = Path(__file__).with_name("qemu_device_tree.json")
PROGRAM = "qemu-system-ppc64"
MEMORY_BYTES = 256 << 20
VM_NAME = "vm1"
BOOT = BootFacts(bootargs="root=/dev/vda", kernel=(0x400000, 0x1000), initrd=(0x420000, 0x420006))

Value = list[Any] | None
"""The cells, strings or bytes of a property; None for a node."""
Tree = dict[tuple[str, str], Value]
"""(path, property) to its value, and (path, "") for the node itself."""

_MACHINE = (
    "pseries,ic-mode=xics,max-cpu-compat=power9,cap-large-decr=off"
    # What a processor in software cannot offer.
    ",cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"
)
_MAC = "52:54:00:12:34:56"
_DEVICES = (
    "virtio-blk-pci,drive=a,disable-legacy=on,addr=1",
    f"virtio-net-pci,netdev=n,mac={_MAC},disable-legacy=on,addr=2,romfile=",
    "virtio-rng-pci,disable-legacy=on,addr=3",
    "virtio-serial-pci,disable-legacy=on,addr=4,max_ports=1",
    "edu,addr=5",
    "virtio-balloon-pci,disable-legacy=on,addr=6",
)
_OUR_DEVICES = (
    DeviceEntry(kind="virtio-blk", disk="a"),
    DeviceEntry(kind="virtio-net", network="lan", mac=_MAC),
    DeviceEntry(kind="virtio-rng"),
    DeviceEntry(kind="virtio-console", name="console"),
    DeviceEntry(kind="edu", name="edu"),
    DeviceEntry(kind="virtio-balloon"),
)


def our_tree() -> Tree:
    """As `services/qemu` builds it."""
    fd = os.memfd_create("disk")
    try:
        vm = board_entry([DiskEntry(name="a", path="")], _OUR_DEVICES, memory_bytes=MEMORY_BYTES)
        networks = {"lan": Switch(DEFAULT_MTU)}
        board = Board(vm, TestRam(PAGE_BYTES).accessor, {"a": fd}, TestPort(), networks=networks)
        return parsed(board.device_tree(BOOT))
    finally:
        os.close(fd)


def committed_tree() -> Tree:
    """What QEMU 7.2 gives, from the file."""
    facts = json.loads(FACTS.read_text())
    return {(path, name): value for path, properties in facts.items() for name, value in properties.items()}


def installed_tree() -> Tree:
    """What the QEMU of this machine gives."""
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        (here / "kernel").write_bytes(_kernel())
        (here / "initrd").write_bytes(b"initrd")
        (here / "disk").write_bytes(bytes(512))
        subprocess.run(_command(here), check=True, capture_output=True, timeout=60)
        return parsed((here / "tree").read_bytes())


def parsed(tree: bytes) -> Tree:
    """A flattened tree."""
    found: Tree = {}
    _collect(fdt.parse_dtb(tree).root, "", found)
    return found


def _collect(node: fdt.Node, path: str, found: Tree) -> None:
    found[path or "/", ""] = None
    for prop in node.props:
        found[path or "/", prop.name] = list(getattr(prop, "data", []))
    for child in node.nodes:
        _collect(child, f"{path}/{child.name}", found)


def _command(here: Path) -> list[str]:
    name = uuid.uuid5(uuid.NAMESPACE_URL, f"pefbox:{VM_NAME}:1")
    return [
        *(PROGRAM, "-M", f"{_MACHINE},dumpdtb={here / 'tree'}", "-cpu", "power9", "-smp", "1"),
        *("-m", f"{MEMORY_BYTES >> 20}M", "-nodefaults", "-display", "none", "-serial", "null"),
        *("-drive", f"if=none,id=a,format=raw,file={here / 'disk'}"),
        *("-netdev", "hubport,id=n,hubid=0"),
        *(word for device in _DEVICES for word in ("-device", device)),
        *("-uuid", str(name), "-name", VM_NAME, "-append", BOOT.bootargs),
        *("-kernel", str(here / "kernel"), "-initrd", str(here / "initrd")),
    ]


def _kernel() -> bytes:
    """The smallest that QEMU takes: one segment of a page at 0."""
    head = b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HHIQQQIHHHHHH", 2, 21, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack(">IIQQQQQQ", 1, 7, 0x1000, 0, 0, 4, 0x1000, 0x1000)
    return (head + segment).ljust(0x1000, b"\0") + b"\x48\0\0\0"


def _write_facts() -> None:
    ours = our_tree()
    nodes: dict[str, dict[str, Value]] = {}
    for (path, name), value in sorted(installed_tree().items()):
        # What we have not is there by its name alone.
        nodes.setdefault(path, {})[name] = value if (path, name) in ours else None
    json.dump(nodes, sys.stdout, separators=(",", ":"))


if __name__ == "__main__":
    _write_facts()
