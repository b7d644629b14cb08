"""Writes a device tree exactly as it stands in memory: version 17, compatible with 16.

Property bytes stay what they are, which is why a tree that the reader accepted can be edited and written back.
"""

from __future__ import annotations

from struct import Struct

from shared.fdt_reader import FDT_BEGIN_NODE, FDT_END, FDT_END_NODE, FDT_MAGIC, FDT_PROP, FdtNode, FdtTree

_HEADER = Struct(">10I")
_RESERVATION = Struct(">QQ")
_PROPERTY = Struct(">III")
_BEGIN = FDT_BEGIN_NODE.to_bytes(4, "big")
_END_NODE = FDT_END_NODE.to_bytes(4, "big")
_END = FDT_END.to_bytes(4, "big")


def write_fdt(tree: FdtTree) -> bytes:
    """`tree` as bytes; properties and nodes keep their order. Source: Devicetree Specification 0.4, chapter 5."""
    strings = _Strings()
    structs = bytearray()
    _write_node(tree.root, structs, strings)
    structs += _END
    reserved = b"".join(_RESERVATION.pack(*entry) for entry in [*tree.reservations, (0, 0)])
    structs_at = _HEADER.size + len(reserved)
    strings_at = structs_at + len(structs)
    total = strings_at + len(strings.block)
    header = _HEADER.pack(
        FDT_MAGIC,
        total,
        structs_at,
        strings_at,
        _HEADER.size,
        17,
        16,
        tree.boot_cpuid,
        len(strings.block),
        len(structs),
    )
    return b"".join((header, reserved, structs, strings.block))


class _Strings:
    """The strings block: each property name once."""

    def __init__(self) -> None:
        self.block = bytearray()
        self._offsets: dict[str, int] = {}

    def offset(self, name: str) -> int:
        if name not in self._offsets:
            self._offsets[name] = len(self.block)
            self.block += name.encode("ascii") + b"\0"
        return self._offsets[name]


def _write_node(node: FdtNode, out: bytearray, strings: _Strings) -> None:
    # Recursion is bounded: the reader limits the depth, and trees made here are shallow.
    out += _BEGIN + node.name.encode("ascii") + b"\0"
    _pad(out)
    for name, value in node.properties.items():
        out += _PROPERTY.pack(FDT_PROP, len(value), strings.offset(name))
        out += value
        _pad(out)
    for child in node.children.values():
        _write_node(child, out, strings)
    out += _END_NODE


def _pad(out: bytearray) -> None:
    out += bytes(-len(out) % 4)
