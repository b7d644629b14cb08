"""Guest physical memory as the processor reaches it: every access goes through the partition-scoped map.

A GFN that the map does not give is a fault, which `fault` resolves (a call to kvm or the ultravisor) before the access
goes on; a guest kernel never sees it. No view of memory leaves this module, but for the machine engine: that one is
the processor, and puts `normal` and `secure` behind translations of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.messages import Access
from shared.partition_map import FRAME_SHIFT, KIND_MASK, PERMISSION, MapKind, PartitionMap

_OFFSET_MASK = PAGE_BYTES - 1
_ZEROS = bytes(PAGE_BYTES)
_READ = PERMISSION[Access.READ]
_WRITE = PERMISSION[Access.WRITE]


class AddressSpace:
    """Loads and stores by guest physical address.

    `normal` is the RAM segment, `fault(gfn, access)` makes a mapping or raises GuestFault. `dirty` is the guest dirty
    map, a byte a GFN, set before each store.
    """

    def __init__(self, normal: memoryview, dirty: memoryview, fault: Callable[[int, Access], None]) -> None:
        self.size_bytes = len(normal)
        self.on_map: Callable[[], None] | None = None
        """Told whenever `use_map` took another map or memory; nothing of the old ones may be used after it."""
        self._normal = normal
        self._secure: memoryview | None = None
        self._map: PartitionMap | None = None
        self._normal_dirty = self._dirty = dirty
        self._fault = fault

    def use_map(self, entries: PartitionMap | None, secure: memoryview | None, dirty: memoryview | None = None) -> None:
        """Translate through `entries` from now on (None: nowhere); `secure` is the VM's secure memory, if any.

        Stores are marked in `dirty`, or in the map of the normal VM.
        """
        self._map = entries
        self._secure = secure
        self._dirty = self._normal_dirty if dirty is None else dirty
        if self.on_map is not None:
            self.on_map()

    # -- for an engine that translates by itself ------------------------------------------------------------------

    @property
    def normal(self) -> memoryview:
        """The RAM segment."""
        return self._normal

    @property
    def secure(self) -> memoryview | None:
        """The secure memory that the map in use may name."""
        return self._secure

    @property
    def words(self) -> memoryview | None:
        """The words of the map in use, one a GFN of RAM."""
        return None if self._map is None else self._map.words

    @property
    def dirty(self) -> memoryview:
        """The guest dirty map: to be set before a store past this object."""
        return self._dirty

    def resolve(self, gfn: int, access: Access) -> None:
        """Have the map give `gfn` for `access`; raises GuestFault."""
        self._translate(gfn, access, PERMISSION[access])

    # -- loads and stores -----------------------------------------------------------------------------------------

    def load(self, gpa: int, n_bytes: int) -> bytes:
        """`n_bytes` from `gpa`."""
        offset = gpa & _OFFSET_MASK
        if offset + n_bytes <= PAGE_BYTES:
            frame = self._frame(gpa >> PAGE_SHIFT, Access.READ, _READ)
            return bytes(frame[offset : offset + n_bytes])
        parts = []
        while n_bytes > 0:
            part = min(n_bytes, PAGE_BYTES - (gpa & _OFFSET_MASK))
            parts.append(self.load(gpa, part))
            gpa += part
            n_bytes -= part
        return b"".join(parts)

    def store(self, gpa: int, data: bytes | memoryview) -> None:
        """Store `data` at `gpa`."""
        offset = gpa & _OFFSET_MASK
        if offset + len(data) <= PAGE_BYTES:
            gfn = gpa >> PAGE_SHIFT
            frame = self._frame(gfn, Access.WRITE, _WRITE)
            self._dirty[gfn] = 1
            frame[offset : offset + len(data)] = data
            return
        data = memoryview(data)
        while data:
            part = min(len(data), PAGE_BYTES - (gpa & _OFFSET_MASK))
            self.store(gpa, data[:part])
            gpa += part
            data = data[part:]

    def copy(self, dst: int, src: int, n_bytes: int) -> None:
        """Copy `n_bytes` from `src` to `dst`; the ranges do not overlap."""
        while n_bytes > 0:
            part = min(n_bytes, PAGE_BYTES - (src & _OFFSET_MASK), PAGE_BYTES - (dst & _OFFSET_MASK))
            self._copy_part(dst, src, part)
            src += part
            dst += part
            n_bytes -= part

    def _copy_part(self, dst: int, src: int, n_bytes: int) -> None:
        """Both parts lie in one page each. A fault on one side may take the other's frame: then look again."""
        dst_gfn, src_gfn = dst >> PAGE_SHIFT, src >> PAGE_SHIFT
        while True:
            to = self._translate(dst_gfn, Access.WRITE, _WRITE)
            source = self._frame(src_gfn, Access.READ, _READ)
            if self._map is not None and self._map.words[dst_gfn] == to:
                break
        self._dirty[dst_gfn] = 1
        to_offset, from_offset = dst & _OFFSET_MASK, src & _OFFSET_MASK
        self._view(to)[to_offset : to_offset + n_bytes] = source[from_offset : from_offset + n_bytes]

    def fill(self, gpa: int, n_bytes: int, value: int = 0) -> None:
        """Set `n_bytes` from `gpa` to `value`."""
        block = _ZEROS if value == 0 else bytes([value]) * min(n_bytes, PAGE_BYTES)
        while n_bytes > 0:
            part = min(n_bytes, PAGE_BYTES - (gpa & _OFFSET_MASK))
            self.store(gpa, memoryview(block)[:part])
            gpa += part
            n_bytes -= part

    def peek(self, gpa: int, n_bytes: int) -> bytes | None:
        """`n_bytes` inside one page without faulting: None when the map does not give it (for debuggers)."""
        return self.load(gpa, n_bytes) if self.gives(gpa, Access.READ) else None

    def gives(self, gpa: int, access: Access) -> bool:
        """Whether the map gives the page of `gpa` now."""
        gfn = gpa >> PAGE_SHIFT
        return self._map is not None and 0 <= gfn < len(self._map) and bool(self._map[gfn] & PERMISSION[access])

    def load_u8(self, gpa: int) -> int:
        """One byte."""
        frame = self._frame(gpa >> PAGE_SHIFT, Access.READ, _READ)
        value: int = frame[gpa & _OFFSET_MASK]
        return value

    def load_u16(self, gpa: int) -> int:
        """An aligned little-endian u16 with one load: ring words that a device writes at the same time."""
        frame = self._frame(gpa >> PAGE_SHIFT, Access.READ, _READ)
        value: int = frame.cast("H")[(gpa & _OFFSET_MASK) >> 1]
        return value

    def store_u16(self, gpa: int, value: int) -> None:
        """An aligned little-endian u16 with one store."""
        gfn = gpa >> PAGE_SHIFT
        frame = self._frame(gfn, Access.WRITE, _WRITE)
        self._dirty[gfn] = 1
        frame.cast("H")[(gpa & _OFFSET_MASK) >> 1] = value

    def load_u64(self, gpa: int) -> int:
        """A little-endian u64."""
        return int.from_bytes(self.load(gpa, 8), "little")

    def store_u64(self, gpa: int, value: int) -> None:
        """A little-endian u64."""
        self.store(gpa, value.to_bytes(8, "little"))

    def _frame(self, gfn: int, access: Access, permission: int) -> memoryview:
        return self._view(self._translate(gfn, access, permission))

    def _translate(self, gfn: int, access: Access, permission: int) -> int:
        """The map entry of `gfn`, once it gives `permission`; it holds until this processor takes a message."""
        if gfn < 0 or gfn << PAGE_SHIFT >= self.size_bytes or self._map is None:
            raise GuestFault(f"gfn {gfn:#x} is outside RAM of {self.size_bytes:#x} bytes")
        words = self._map.words
        value = words[gfn]
        while not value & permission:
            self._fault(gfn, access)
            value = self._map.words[gfn]
        return value

    def _view(self, value: int) -> memoryview:
        start = value >> FRAME_SHIFT << PAGE_SHIFT
        if value & KIND_MASK == MapKind.SECURE:
            assert self._secure is not None
            return self._secure[start : start + PAGE_BYTES]
        return self._normal[start : start + PAGE_BYTES]
