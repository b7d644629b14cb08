"""Property values of a device tree as bytes, and adding a node; beside `shared.fdt_writer`.

Source: Devicetree Specification 0.4, section 2.2.4.
"""

from __future__ import annotations

from shared.fdt_reader import FdtNode


def cells(*values: int) -> bytes:
    """Big-endian u32 cells."""
    return b"".join(value.to_bytes(4, "big") for value in values)


def quads(*values: int) -> bytes:
    """Big-endian u64 values, two cells each."""
    return b"".join(value.to_bytes(8, "big") for value in values)


def strings(*values: str) -> bytes:
    """NUL-terminated strings; raises UnicodeEncodeError for what is not ASCII."""
    return b"".join(value.encode("ascii") + b"\0" for value in values)


def add_node(parent: FdtNode, name: str, properties: dict[str, bytes]) -> FdtNode:
    """A new child of `parent`."""
    node = FdtNode(name, properties)
    parent.children[name] = node
    return node
