"""The strict device tree reader, and the writer whose output it and other readers take."""

from __future__ import annotations

import struct

import fdt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import GuestFault
from shared.fdt_reader import BOOT_LIMITS, FdtLimits, FdtNode, FdtTree, fdt_total_bytes, read_fdt
from shared.fdt_writer import write_fdt

_NAMES = st.text("abcdefghijklmnopqrstuvwxyz#,@0123456789-", min_size=1, max_size=40)
_PROPERTIES = st.dictionaries(_NAMES, st.binary(max_size=40), max_size=5)


def _node(name: str, properties: dict[str, bytes], children: list[FdtNode]) -> FdtNode:
    return FdtNode(name, properties, {child.name: child for child in children})


_NODES = st.recursive(
    st.builds(FdtNode, _NAMES, _PROPERTIES),
    lambda inner: st.builds(_node, _NAMES, _PROPERTIES, st.lists(inner, max_size=4)),
    max_leaves=12,
)
_RESERVATIONS = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(1, (1 << 64) - 1)), max_size=5)


@st.composite
def trees(draw: st.DrawFn) -> FdtTree:
    children = draw(st.lists(_NODES, max_size=4))
    root = _node("", draw(_PROPERTIES), children)
    return FdtTree(root, draw(_RESERVATIONS), draw(st.integers(0, (1 << 32) - 1)))


def sample() -> FdtTree:
    chosen = FdtNode("chosen", {"bootargs": b"svm=on\0", "linux,initrd-start": struct.pack(">Q", 0x4000000)})
    memory = FdtNode("memory@0", {"reg": struct.pack(">QQ", 0, 1 << 28), "empty": b""})
    root = FdtNode("", {"compatible": b"qemu,pseries\0", "#address-cells": struct.pack(">I", 2)})
    root.children = {chosen.name: chosen, memory.name: memory}
    return FdtTree(root, [(0x1000, 0x2000)], 7)


@settings(deadline=None)
@given(trees())
def test_a_written_tree_reads_back_as_it_was(tree: FdtTree) -> None:
    assert read_fdt(write_fdt(tree)) == tree


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(GuestFault):
        read_fdt(data)


@settings(deadline=None, max_examples=400)
@given(trees(), st.data())
def test_a_damaged_tree_is_read_or_refused(tree: FdtTree, data: st.DataObject) -> None:
    blob = bytearray(write_fdt(tree))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(8, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_fdt(bytes(blob))
    except GuestFault:
        pass


def test_other_readers_take_what_the_writer_writes() -> None:
    parsed = fdt.parse_dtb(write_fdt(sample()))

    assert parsed.get_property("bootargs", "chosen").value == "svm=on"
    assert list(parsed.get_property("reg", "memory@0")) == [0, 0, 0, 1 << 28]
    assert {"address": 0x1000, "size": 0x2000} in parsed.entries


def test_what_other_writers_write_is_read() -> None:
    made = fdt.FDT(entries=[{"address": 16, "size": 32}])
    made.set_property("compatible", "ibm,esm")
    made.set_property("reg", [1, 2], "cpus/cpu@0")

    tree = read_fdt(made.to_dtb(version=17))

    assert tree.reservations == [(16, 32)]
    assert tree.root.text("compatible") == "ibm,esm"
    assert tree.property("/cpus/cpu@0", "reg") == struct.pack(">II", 1, 2)


def test_a_tree_of_version_16_without_a_structure_size_is_read() -> None:
    blob = bytearray(write_fdt(sample()))
    struct.pack_into(">I", blob, 20, 16)
    struct.pack_into(">I", blob, 36, 0)

    assert read_fdt(bytes(blob)) == sample()


def test_bytes_behind_the_announced_size_are_ignored() -> None:
    assert read_fdt(write_fdt(sample()) + b"rest of the page") == sample()


def test_properties_are_found_by_path_and_type() -> None:
    tree = sample()
    chosen = tree.node("/chosen")

    assert chosen is not None
    assert chosen.text("bootargs") == "svm=on"
    assert chosen.number("linux,initrd-start") == 0x4000000
    assert chosen.number("bootargs") is None
    assert chosen.text("linux,initrd-start") is None
    assert tree.node("/chosen/none") is None
    assert tree.property("/none", "x") is None
    assert tree.node("/") is tree.root


def test_an_announced_size_is_told_before_the_whole_tree_is_there() -> None:
    blob = write_fdt(sample())

    assert fdt_total_bytes(blob[:8]) == len(blob)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (FdtLimits(total_bytes=100, nodes=9, properties=9), "at most 100"),
        (FdtLimits(total_bytes=1 << 20, nodes=2, properties=9), "more than 2 nodes"),
        (FdtLimits(total_bytes=1 << 20, nodes=9, properties=3), "more than 3 properties"),
        (FdtLimits(total_bytes=1 << 20, nodes=9, properties=9, depth=1), "deeper than 1"),
        (FdtLimits(total_bytes=1 << 20, nodes=9, properties=9, reservations=0), "more than 0 memory reservations"),
    ],
)
def test_each_limit_holds(limits: FdtLimits, words: str) -> None:
    with pytest.raises(GuestFault, match=words):
        read_fdt(write_fdt(sample()), limits)


def test_a_deep_tree_does_not_exhaust_the_stack() -> None:
    n_nodes = 10_000
    structs = struct.pack(">II", 1, 0) + struct.pack(">I", 1) + b"a\0\0\0"
    structs += (struct.pack(">I", 1) + b"a\0\0\0") * n_nodes
    header = struct.pack(">10I", 0xD00DFEED, 56 + len(structs), 56, 56, 40, 17, 16, 0, 0, len(structs))

    with pytest.raises(GuestFault, match="deeper"):
        read_fdt(header + bytes(16) + structs)


def test_many_properties_that_share_one_endless_name_are_refused_quickly() -> None:
    prop = struct.pack(">III", 3, 0, 0)
    structs = struct.pack(">II", 1, 0) + prop * 10_000
    strings = b"x" * 500_000
    start = 56 + len(structs)
    header = struct.pack(">10I", 0xD00DFEED, start + len(strings), 56, start, 40, 17, 16, 0, len(strings), len(structs))

    with pytest.raises(GuestFault, match="no end within"):
        read_fdt(header + bytes(16) + structs + strings)


def _raw(*tokens: bytes, strings: bytes = b"p\0") -> bytes:
    structs = b"".join(tokens)
    start = 56 + len(structs)
    total = start + len(strings)
    header = struct.pack(">10I", 0xD00DFEED, total, 56, start, 40, 17, 16, 0, len(strings), len(structs))
    return header + bytes(16) + structs + strings


_ROOT = struct.pack(">II", 1, 0)
_CHILD = struct.pack(">I", 1) + b"a\0\0\0"
_CLOSE = struct.pack(">I", 2)
_END = struct.pack(">I", 9)
_PROP = struct.pack(">III", 3, 0, 0)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (_raw(_ROOT, _PROP, _PROP, _CLOSE, _END), "empty or taken"),
        (_raw(_ROOT, _CHILD, _CLOSE, _CHILD, _CLOSE, _CLOSE, _END), "empty, taken"),
        (_raw(_ROOT, _CHILD, _CLOSE, _PROP, _CLOSE, _END), "after a child"),
        (_raw(_CLOSE, _END), "never began"),
        (_raw(_ROOT, _END), "inside a node"),
        (_raw(_ROOT, _CLOSE, _ROOT, _CLOSE, _END), "follows the root"),
        (_raw(_CHILD, _CLOSE, _END), "root node has a name"),
        (_raw(_ROOT, struct.pack(">I", 77), _CLOSE, _END), "unknown token"),
        (_raw(_ROOT, _CLOSE), "has no end"),
        (_raw(_ROOT, struct.pack(">III", 3, 0xFFFFFFFF, 0), _CLOSE, _END), "cut off"),
        (_raw(_ROOT, struct.pack(">III", 3, 0, 0xFFFFFFFF), _CLOSE, _END), "no end within"),
        (_raw(_ROOT, _PROP, _CLOSE, _END, strings=b"\xff\0"), "not ASCII"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(blob: bytes, words: str) -> None:
    with pytest.raises(GuestFault, match=words):
        read_fdt(blob, BOOT_LIMITS)


def test_empty_tokens_between_nodes_are_skipped() -> None:
    nop = struct.pack(">I", 4)

    assert read_fdt(_raw(nop, _ROOT, nop, _PROP, _CLOSE, nop, _END)).root.properties == {"p": b""}
