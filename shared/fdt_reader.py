"""A strict reader of flattened device trees that a guest or a host handed over.

The `fdt` package keeps neither property bytes nor unknown strings as they were, shares one list of reservations
between trees and trusts every offset, so nothing untrusted goes through it. This reader copies its input once,
then checks each offset against it; its time and memory are linear in the input and bounded by `FdtLimits`.

Source: Devicetree Specification 0.4, chapter 5 (versions 16 and 17; Linux's prom_init writes 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct

from protocol.errors import GuestFault

FDT_MAGIC = 0xD00DFEED
FDT_MAGIC_BYTES = FDT_MAGIC.to_bytes(4, "big")
FDT_BEGIN_NODE = 1
FDT_END_NODE = 2
FDT_PROP = 3
FDT_NOP = 4
FDT_END = 9
MAX_NAME_BYTES = 255

_U32 = Struct(">I")
_RESERVATION = Struct(">QQ")
_PROPERTY = Struct(">II")
_HEADER = Struct(">10I")
_HEADER_V16_BYTES = 36


@dataclass(frozen=True, slots=True)
class FdtLimits:
    """What a reader accepts at most."""

    total_bytes: int
    nodes: int
    properties: int
    depth: int = 64
    reservations: int = 1024


BOOT_LIMITS = FdtLimits(total_bytes=1 << 20, nodes=16_384, properties=65_536)
"""A boot device tree: the ultravisor takes at most 1 MiB."""


@dataclass(slots=True)
class FdtNode:
    """A node; `name` includes its unit address, property values are the bytes as they stand in the tree."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, FdtNode] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """A property that is one NUL-terminated ASCII string; None when it is absent or anything else."""
        value = self.properties.get(name)
        if value is None or value[-1:] != b"\0" or value.count(0) != 1 or not value.isascii():
            return None
        return value[:-1].decode("ascii")

    def number(self, name: str) -> int | None:
        """A property of one or two big-endian cells; None when it is absent or of another size."""
        value = self.properties.get(name)
        return int.from_bytes(value, "big") if value is not None and len(value) in (4, 8) else None


@dataclass(slots=True)
class FdtTree:
    """A whole tree. `reservations` are (address, bytes) pairs of the memory reservation block."""

    root: FdtNode
    reservations: list[tuple[int, int]] = field(default_factory=list)
    boot_cpuid: int = 0

    def node(self, path: str) -> FdtNode | None:
        """The node at `path` (`/memory@0`, names whole), or None."""
        node: FdtNode | None = self.root
        for name in path.split("/"):
            if name and node is not None:
                node = node.children.get(name)
        return node

    def property(self, path: str, name: str) -> bytes | None:
        """The bytes of property `name` of the node at `path`, or None when either is absent."""
        node = self.node(path)
        return None if node is None else node.properties.get(name)


def fdt_total_bytes(header: bytes | memoryview) -> int:
    """The size that the first 8 bytes of a tree announce; raises GuestFault when they begin no tree."""
    if len(header) < 8 or _U32.unpack_from(header, 0)[0] != FDT_MAGIC:
        raise GuestFault("no device tree: the magic number is missing")
    total: int = _U32.unpack_from(header, 4)[0]
    return total


def read_fdt(data: bytes | bytearray | memoryview, limits: FdtLimits = BOOT_LIMITS) -> FdtTree:
    """The tree that begins at the first byte of `data`; bytes after its announced size are ignored.

    Raises GuestFault, and nothing else, for anything that is not a well-formed tree within `limits`. A name that
    occurs twice in a node is refused: two readers could each pick another one.
    """
    announced = fdt_total_bytes(bytes(data[:8]))
    if announced > limits.total_bytes:
        raise GuestFault(f"device tree of {announced} bytes; at most {limits.total_bytes} are taken")
    if announced > len(data):
        raise GuestFault(f"device tree of {announced} bytes is cut off after {len(data)}")
    return _Reader(bytes(data[:announced]), limits).tree()


class _Reader:
    """One pass over a private copy of the tree."""

    def __init__(self, blob: bytes, limits: FdtLimits) -> None:
        self._blob = blob
        self._limits = limits
        self._nodes_left = limits.nodes
        self._properties_left = limits.properties
        self._read_header()

    def _read_header(self) -> None:
        if len(self._blob) < _HEADER_V16_BYTES:
            raise GuestFault("device tree header is cut off")
        padded = self._blob[: _HEADER.size].ljust(_HEADER.size, b"\0")
        magic, total, structs, strings, reserve, version, compatible, cpuid, n_strings, n_structs = _HEADER.unpack(
            padded
        )
        # The copy is read again because the source may be memory that others write.
        if magic != FDT_MAGIC or total != len(self._blob):
            raise GuestFault("device tree changed while it was read")
        if version < 16 or compatible > 17:
            raise GuestFault(f"device tree version {version} (compatible with {compatible}); 16 and 17 are known")
        if version < 17:
            n_structs = max(total - structs, 0)
        elif total < _HEADER.size:
            raise GuestFault("device tree header is cut off")
        if structs % 4 or structs + n_structs > total:
            raise GuestFault("structure block lies outside the device tree")
        if strings + n_strings > total:
            raise GuestFault("strings block lies outside the device tree")
        self._at, self._end = structs, structs + n_structs
        self._strings, self._strings_end = strings, strings + n_strings
        self._reserve_at, self._boot_cpuid = reserve, cpuid

    def tree(self) -> FdtTree:
        reservations = self._read_reservations()
        root = self._read_nodes()
        return FdtTree(root, reservations, self._boot_cpuid)

    def _read_reservations(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = self._reserve_at
        while at + _RESERVATION.size <= len(self._blob):
            entry: tuple[int, int] = _RESERVATION.unpack_from(self._blob, at)
            if entry == (0, 0):
                return found
            if len(found) == self._limits.reservations:
                raise GuestFault(f"more than {self._limits.reservations} memory reservations")
            found.append(entry)
            at += _RESERVATION.size
        raise GuestFault("memory reservation block has no end")

    def _read_nodes(self) -> FdtNode:
        open_nodes: list[FdtNode] = []
        while (token := self._token()) != FDT_END:
            if token == FDT_BEGIN_NODE:
                open_nodes.append(self._begin_node(open_nodes))
            elif token == FDT_PROP:
                self._read_property(open_nodes)
            elif token == FDT_END_NODE:
                if not open_nodes:
                    raise GuestFault("a node ends that never began")
                closed = open_nodes.pop()
                if not open_nodes:
                    return self._finish(closed)
            else:
                raise GuestFault(f"unknown token {token:#x} in the structure block")
        raise GuestFault("the structure block ends inside a node")

    def _finish(self, root: FdtNode) -> FdtNode:
        if self._token() != FDT_END:
            raise GuestFault("something follows the root node")
        return root

    def _begin_node(self, open_nodes: list[FdtNode]) -> FdtNode:
        if len(open_nodes) == self._limits.depth:
            raise GuestFault(f"nodes nest deeper than {self._limits.depth}")
        if self._nodes_left == 0:
            raise GuestFault(f"more than {self._limits.nodes} nodes")
        self._nodes_left -= 1
        name = self._name(self._at, self._end)
        self._skip(len(name) + 1)
        node = FdtNode(name)
        if not open_nodes:
            if name:
                raise GuestFault("the root node has a name")
            return node
        siblings = open_nodes[-1].children
        if not name or "/" in name or name in siblings:
            raise GuestFault(f"node name {name!r} is empty, taken or has a slash")
        siblings[name] = node
        return node

    def _read_property(self, open_nodes: list[FdtNode]) -> None:
        if self._properties_left == 0:
            raise GuestFault(f"more than {self._limits.properties} properties")
        self._properties_left -= 1
        if not open_nodes or open_nodes[-1].children:
            raise GuestFault("a property stands outside a node or after a child node")
        if self._at + _PROPERTY.size > self._end:
            raise GuestFault("a property is cut off")
        n_bytes, name_offset = _PROPERTY.unpack_from(self._blob, self._at)
        start = self._at + _PROPERTY.size
        self._skip(_PROPERTY.size + n_bytes)
        name = self._name(self._strings + name_offset, self._strings_end)
        properties = open_nodes[-1].properties
        if not name or name in properties:
            raise GuestFault(f"property name {name!r} is empty or taken")
        properties[name] = self._blob[start : start + n_bytes]

    def _token(self) -> int:
        while self._at + 4 <= self._end:
            token: int = _U32.unpack_from(self._blob, self._at)[0]
            self._at += 4
            if token != FDT_NOP:
                return token
        raise GuestFault("the structure block has no end")

    def _skip(self, n_bytes: int) -> None:
        if self._at + n_bytes > self._end:
            raise GuestFault("a name or property is cut off")
        self._at = (self._at + n_bytes + 3) & ~3

    def _name(self, at: int, end: int) -> str:
        # The search is bounded: many properties may name one long string.
        terminator = self._blob.find(b"\0", at, min(end, at + MAX_NAME_BYTES + 1)) if at < end else -1
        if terminator < 0:
            raise GuestFault(f"a name has no end within {MAX_NAME_BYTES} bytes")
        name = self._blob[at:terminator]
        if not name.isascii():
            raise GuestFault("a name is not ASCII")
        return name.decode("ascii")
