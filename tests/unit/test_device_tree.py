"""The device tree that a guest starts with, read back by an independent parser."""

import os
from collections.abc import Iterator
from struct import unpack

import fdt
import pytest

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from protocol.rtas import RTAS
from protocol.startup import DeviceEntry, DiskEntry, IommuDomain, VmEntry
from services.qemu.board import Board
from services.qemu.device_tree import BootFacts, PciNodes
from services.qemu.testing import TestPort, TestRam, board_entry
from shared.fdt_reader import FdtTree, read_fdt
from shared.pci import Command, Config

PHB = "/pci@800000020000000"
BOOT = BootFacts(
    bootargs="root=/dev/vda svm=on",
    kernel=(0x400000, 0x1000),
    initrd=(0x4000000, 0x5000000),
    rtas_base=0x2000000,
    reservations=((0x2000000, 0x10000),),
)


def entry(devices: list[DeviceEntry] | None = None) -> VmEntry:
    return board_entry(
        [DiskEntry(name="a", path=""), DiskEntry(name="b", path="")], devices or [], memory_bytes=256 << 20, time="wall"
    )


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    fds = {name: os.memfd_create(name) for name in "ab"}
    yield fds
    for fd in fds.values():
        os.close(fd)


def make(fds: dict[str, int], *, assign_bars: bool = False) -> Board:
    return Board(entry(), TestRam(PAGE_BYTES).accessor, fds, TestPort(), assign_bars=assign_bars)


def tree_of(board: Board, pci_nodes: PciNodes = PciNodes.QEMU) -> FdtTree:
    return read_fdt(board.device_tree(BOOT, pci_nodes))


def cells_of(tree: FdtTree, path: str, name: str) -> list[int]:
    value = tree.property(path, name)
    assert value is not None
    return list(unpack(f">{len(value) // 4}I", value))


def test_another_parser_reads_the_tree(fds: dict[str, int]) -> None:
    parsed = fdt.parse_dtb(make(fds).device_tree(BOOT))

    assert parsed.get_property("bootargs", "/chosen").value == BOOT.bootargs
    assert parsed.get_property("device_type", "/memory@0").value == "memory"
    assert parsed.exist_node(f"{PHB}/scsi@1")


def test_memory_boot_and_rtas_are_what_was_given(fds: dict[str, int]) -> None:
    tree = tree_of(make(fds))

    assert cells_of(tree, "/memory@0", "reg") == [0, 0, 0, 256 << 20]
    chosen, rtas = tree.node("/chosen"), tree.node("/rtas")
    assert chosen is not None and rtas is not None
    assert (chosen.number("linux,initrd-start"), chosen.number("linux,initrd-end")) == BOOT.initrd
    assert chosen.text("stdout-path") == "/vdevice/vty@71000000"
    assert tree.node("/vdevice/vty@71000000") is not None
    assert cells_of(tree, "/chosen", "qemu,boot-kernel") == [0, 0x400000, 0, 0x1000]
    assert (rtas.number("linux,rtas-base"), rtas.number("rtas-size")) == (0x2000000, 20)
    assert tree.reservations == [(0x2000000, 0x10000)]


def test_rtas_tokens_are_those_that_somebody_answers(fds: dict[str, int]) -> None:
    board = make(fds)
    rtas = tree_of(board).node("/rtas")
    assert rtas is not None

    named = {name: rtas.number(name) for name in RTAS.by_name if name in rtas.properties}

    assert named["ibm,read-pci-config"] == 0x2016
    assert named["ibm,set-xive"] == 0x200A
    assert "ibm,set-tce-bypass" not in named
    assert all(number == RTAS.by_name[name].number for name, number in named.items())


def test_bridge_tells_windows_and_interrupts(fds: dict[str, int]) -> None:
    tree = tree_of(make(fds))

    assert cells_of(tree, PHB, "reg") == [0x8000000, 0x20000000, 0, 0]
    assert cells_of(tree, PHB, "ibm,dma-window") == [0x80000000, 0, 0, 0, 0x40000000]
    ranges = cells_of(tree, PHB, "ranges")
    assert ranges[7:14] == [0x2000000, 0, 0x80000000, 0x2000, 0x80000000, 0, 0x80000000]
    assert ranges[14:] == [0x3000000, 0x2100, 0, 0x2100, 0, 0x100, 0]


def test_interrupt_map_agrees_with_the_bridge(fds: dict[str, int]) -> None:
    board = make(fds)
    tree = tree_of(board)
    phandle = cells_of(tree, "/interrupt-controller", "phandle")[0]
    words = cells_of(tree, PHB, "interrupt-map")
    entries = [words[at : at + 7] for at in range(0, len(words), 7)]

    assert len(entries) == 128
    assert [2 << 11, 0, 0, 3, phandle, board.bridge.lsi_source(2 << 3, 3), 1] in entries


def test_devices_have_nodes_with_bars_and_vectors(fds: dict[str, int]) -> None:
    tree = tree_of(make(fds))
    path = f"{PHB}/scsi@2"

    assert cells_of(tree, path, "vendor-id") == [0x1AF4]
    assert cells_of(tree, path, "ibm,req#msi-x") == [2]
    reg = cells_of(tree, path, "reg")
    assert reg[:5] == [2 << 11, 0, 0, 0, 0]
    assert reg[5:10] == [0x02000000 | 2 << 11 | 0x14, 0, 0, 0, 0x1000]
    assert reg[10:] == [0x03000000 | 2 << 11 | 0x20, 0, 0, 0, 0x4000]
    node = tree.node(path)
    assert node is not None and "assigned-addresses" not in node.properties


def test_a_device_in_a_domain_of_its_own_has_its_window_on_its_own_node(fds: dict[str, int]) -> None:
    devices = [DeviceEntry(kind="virtio-rng"), DeviceEntry(kind="virtio-rng", iommu_domain=IommuDomain.OWN)]
    tree = tree_of(Board(entry(devices), TestRam(PAGE_BYTES).accessor, fds, TestPort()))
    shared, own = tree.node(f"{PHB}/legacy-device@1"), f"{PHB}/legacy-device@2"

    assert shared is not None and not any("dma" in name or "ddw" in name for name in shared.properties)
    assert cells_of(tree, own, "ibm,dma-window") == [0x80000004, 0, 0, 0, 0x40000000]
    for name in ("ibm,#dma-address-cells", "ibm,#dma-size-cells", "ibm,ddw-applicable", "ibm,ddw-extensions"):
        assert cells_of(tree, own, name) == cells_of(tree, PHB, name)


def test_assigned_bars_are_named(fds: dict[str, int]) -> None:
    board = make(fds, assign_bars=True)
    words = cells_of(tree_of(board), f"{PHB}/scsi@2", "assigned-addresses")
    function = board.functions[1]

    addresses = [words[at + 1] << 32 | words[at + 2] for at in range(0, len(words), 5)]

    assert addresses == [function.bar_address(bar) for bar in function.bars]
    assert words[0] == 0x82000000 | 2 << 11 | 0x14
    assert function.read_config(Config.COMMAND, 2) & Command.MEMORY


def test_firmware_finds_the_bridge_alone(fds: dict[str, int]) -> None:
    bridge = tree_of(make(fds), PciNodes.FIRMWARE).node(PHB)

    assert bridge is not None and not bridge.children
    assert "interrupt-map" in bridge.properties


def test_the_same_vm_has_the_same_tree_at_each_start(fds: dict[str, int]) -> None:
    assert make(fds).device_tree(BOOT) == make(fds).device_tree(BOOT)


@pytest.mark.parametrize(
    "device",
    [DeviceEntry(kind="virtio-gpu"), DeviceEntry(kind="virtio-blk"), DeviceEntry(kind="virtio-blk", disk="c")],
)
def test_a_device_that_cannot_be_built_is_the_user_s_mistake(fds: dict[str, int], device: DeviceEntry) -> None:
    with pytest.raises(UserError):
        Board(entry([device]), TestRam(PAGE_BYTES).accessor, fds, TestPort())
