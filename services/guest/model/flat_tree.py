"""A flattened device tree, read and written. What comes from outside is bounded: TreeError for anything that does not
hold, never a loop.

Source: Devicetree Specification 0.4, chapter 5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocol.errors import PefboxError

MAX_TREE_BYTES = 1 << 20
MAX_DEPTH = 16
HEADER = struct.Struct(">10I")
MAGIC = 0xD00DFEED
VERSION = 17
COMPATIBLE_VERSION = 16

_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
_RESERVE = struct.Struct(">QQ")


class TreeError(PefboxError):
    """The bytes are no device tree."""


@dataclass
class Node:
    """A node: its name with unit address, properties as bytes, children in order."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def child(self, name: str) -> Node | None:
        """The child of this name, unit address included or left out."""
        return next((node for node in self.children if node.name == name or node.name.split("@")[0] == name), None)

    def walk(self) -> Iterator[Node]:
        """This node and all below."""
        yield self
        for node in self.children:
            yield from node.walk()

    def cells(self, name: str) -> list[int]:
        """A property as u32 cells; empty when it is missing."""
        data = self.properties.get(name, b"")
        return list(struct.unpack(f">{len(data) // 4}I", data[: len(data) // 4 * 4]))

    def number(self, name: str, default: int = 0) -> int:
        """A property of one or two cells as a number."""
        data = self.properties.get(name, b"")
        return int.from_bytes(data, "big") if len(data) in (4, 8) else default

    def text(self, name: str) -> str:
        """A property as its first string."""
        return self.properties.get(name, b"").split(b"\0")[0].decode("ascii", "replace")


@dataclass
class Tree:
    """A device tree with its memory reservations (gpa, bytes)."""

    root: Node
    reserved: list[tuple[int, int]] = field(default_factory=list)
    boot_cpu: int = 0


def total_bytes(header: bytes) -> int:
    """The length that the first HEADER.size bytes promise; raises TreeError."""
    if len(header) < HEADER.size:
        raise TreeError("too short for a device tree")
    magic, n_bytes, *_ = HEADER.unpack_from(header)
    if magic != MAGIC or not HEADER.size <= n_bytes <= MAX_TREE_BYTES:
        raise TreeError("no device tree at this address")
    return int(n_bytes)


def parse(data: bytes) -> Tree:
    """The tree in `data`; raises TreeError."""
    n_bytes = total_bytes(data)
    if n_bytes > len(data):
        raise TreeError("the device tree is cut off")
    _, _, off_struct, off_strings, off_reserve, version, _, boot_cpu, n_strings, n_struct = HEADER.unpack_from(data)
    if version < COMPATIBLE_VERSION or off_struct % 4:
        raise TreeError("a device tree of an unknown version")
    if max(off_struct + n_struct, off_strings + n_strings, off_reserve) > n_bytes:
        raise TreeError("a block of the device tree lies outside it")
    strings = data[off_strings : off_strings + n_strings]
    root = _Reader(data[off_struct : off_struct + n_struct], strings).read()
    return Tree(root, _reservations(data[off_reserve:n_bytes]), boot_cpu)


def _reservations(data: bytes) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for gpa, n_bytes in _RESERVE.iter_unpack(data[: len(data) // 16 * 16]):
        if not gpa and not n_bytes:
            return found
        found.append((gpa, n_bytes))
    raise TreeError("the memory reservations have no end")


class _Reader:
    """Walks the structure block once, forward."""

    def __init__(self, block: bytes, strings: bytes) -> None:
        self._block = block
        self._strings = strings
        self._at = 0

    def read(self) -> Node:
        top = Node("")
        path = [top]
        while (token := self._word()) != _END:
            if token == _BEGIN_NODE:
                self._begin(path)
            elif token == _END_NODE and len(path) > 1:
                path.pop()
            elif token == _PROP and len(path) > 1:
                self._property(path[-1])
            elif token != _NOP:
                raise TreeError(f"token {token} in the device tree")
        if len(path) != 1 or len(top.children) != 1:
            raise TreeError("the device tree has no single root")
        return top.children[0]

    def _begin(self, path: list[Node]) -> None:
        if len(path) > MAX_DEPTH:
            raise TreeError("the device tree is too deep")
        end = self._block.find(b"\0", self._at)
        if end < 0:
            raise TreeError("a node name has no end")
        node = Node(self._block[self._at : end].decode("ascii", "replace"))
        self._at = end + 4 & ~3
        path[-1].children.append(node)
        path.append(node)

    def _property(self, node: Node) -> None:
        n_bytes, name_at = self._word(), self._word()
        name_end = self._strings.find(b"\0", name_at)
        if self._at + n_bytes > len(self._block) or name_end < 0:
            raise TreeError("a property lies outside the device tree")
        name = self._strings[name_at:name_end].decode("ascii", "replace")
        node.properties[name] = self._block[self._at : self._at + n_bytes]
        self._at = self._at + n_bytes + 3 & ~3

    def _word(self) -> int:
        if self._at + 4 > len(self._block):
            raise TreeError("the device tree has no end")
        self._at += 4
        return int.from_bytes(self._block[self._at - 4 : self._at], "big")


def build(tree: Tree) -> bytes:
    """The flattened form of `tree`; raises TreeError when it is larger than MAX_TREE_BYTES."""
    strings = bytearray()
    offsets: dict[str, int] = {}
    block = bytearray()
    _write(tree.root, block, strings, offsets)
    block += _END.to_bytes(4, "big")
    reserve = b"".join(_RESERVE.pack(*entry) for entry in [*tree.reserved, (0, 0)])
    off_struct = HEADER.size + len(reserve)
    off_strings = off_struct + len(block)
    n_bytes = off_strings + len(strings)
    if n_bytes > MAX_TREE_BYTES:
        raise TreeError("the device tree grew too large")
    header = HEADER.pack(
        MAGIC, n_bytes, off_struct, off_strings, HEADER.size, VERSION, COMPATIBLE_VERSION, tree.boot_cpu,
        len(strings), len(block),
    )  # fmt: skip
    return header + reserve + bytes(block) + bytes(strings)


def _write(node: Node, block: bytearray, strings: bytearray, offsets: dict[str, int]) -> None:
    block += _BEGIN_NODE.to_bytes(4, "big") + _padded(node.name.encode("ascii") + b"\0")
    for name, data in node.properties.items():
        if name not in offsets:
            offsets[name] = len(strings)
            strings += name.encode("ascii") + b"\0"
        block += struct.pack(">III", _PROP, len(data), offsets[name]) + _padded(data)
    for child in node.children:
        _write(child, block, strings, offsets)
    block += _END_NODE.to_bytes(4, "big")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
