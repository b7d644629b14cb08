"""Guest real to engine-physical addresses: the partition-scoped map as the processor's last step of translation.

Engine-physical space holds RAM and secure memory as two ranges, and the shadow code pages as a third. Nothing waits
here: what the map does not give is raised as `Absent`, and the engine has it resolved once it has left the engine.
"""

from __future__ import annotations

from struct import Struct

from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.messages import Access
from services.guest.address_space import AddressSpace
from shared.partition_map import FRAME_SHIFT, KIND_MASK, PERMISSION, MapKind

NORMAL_BASE = 0
SECURE_BASE = 1 << 44
SHADOW_BASE = 1 << 46
_OFFSET_MASK = PAGE_BYTES - 1
_PERMISSION = {access: PERMISSION[access] for access in Access}
_WRITE = PERMISSION[Access.WRITE]
_READ = PERMISSION[Access.READ]
_u64 = Struct(">Q")
_load_u64 = _u64.unpack_from
_SECURE = int(MapKind.SECURE)


class Absent(Exception):
    """The map does not give `gfn` for `access`."""

    def __init__(self, gfn: int, access: Access) -> None:
        self.gfn = gfn
        self.access = access
        super().__init__(f"gfn {gfn:#x} is absent")


class OutsideRam(Exception):
    """A guest real address that is no RAM: a device, or nothing."""

    def __init__(self, gpa: int) -> None:
        self.gpa = gpa
        super().__init__(f"{gpa:#x} is outside RAM")


class Partition:
    """The guest real memory of one VM. `follow_space` has to be called whenever the space takes another map."""

    def __init__(self, space: AddressSpace) -> None:
        self._space = space
        self._size_bytes = space.size_bytes
        self._dirty = space.dirty
        self._normal = space.normal
        self._words: memoryview | None = None
        self._secure: memoryview | None = None
        self.follow_space()

    def follow_space(self) -> None:
        """Look through the map and at the memory that the space uses now."""
        self._words, self._secure = self._space.words, self._space.secure
        self._dirty = self._space.dirty

    def place(self, gpa: int, access: Access) -> tuple[int, bool]:
        """Engine-physical address of `gpa`, and whether its page may be written, or read where `access` is a fetch.
        Raises Absent, OutsideRam.

        For a store the page is marked in the guest dirty map; one that is not marked is not written through.
        """
        word = self._word(gpa, access)
        gfn = gpa >> PAGE_SHIFT
        if access is Access.WRITE:
            self._dirty[gfn] = 1
        base = SECURE_BASE if word & KIND_MASK == _SECURE else NORMAL_BASE
        place = base + (word >> FRAME_SHIFT << PAGE_SHIFT) + (gpa & _OFFSET_MASK)
        if access is Access.EXECUTE:
            return place, word & _READ != 0
        return place, word & _WRITE != 0 and self._dirty[gfn] != 0

    def load_u64(self, gpa: int) -> int:
        """An aligned big-endian doubleword: an entry of a table. Raises Absent, OutsideRam."""
        # `_word` written out: five of these make a walk.
        words = self._words
        word = words[gpa >> PAGE_SHIFT] if words is not None and 0 <= gpa < self._size_bytes else 0
        if not word & _READ:
            word = self._word(gpa, Access.READ)
        memory = self._normal if word & KIND_MASK != _SECURE else self._secure
        assert memory is not None
        value: int = _load_u64(memory, (word >> FRAME_SHIFT << PAGE_SHIFT) + (gpa & _OFFSET_MASK))[0]
        return value

    def store_u64(self, gpa: int, value: int) -> None:
        """Store an aligned big-endian doubleword. Raises Absent, OutsideRam."""
        self._word(gpa, Access.WRITE)
        self._space.store(gpa, _u64.pack(value))

    def load(self, gpa: int, n_bytes: int) -> bytes:
        """`n_bytes` inside one page. Raises Absent, OutsideRam."""
        self._word(gpa, Access.READ)
        return self._space.load(gpa, n_bytes)

    def _word(self, gpa: int, access: Access) -> int:
        """The map's word for the page at `gpa`, which permits `access`."""
        if not 0 <= gpa < self._size_bytes:
            raise OutsideRam(gpa)
        gfn = gpa >> PAGE_SHIFT
        word: int = 0 if self._words is None else self._words[gfn]
        if not word & _PERMISSION[access]:
            raise Absent(gfn, access)
        return word

    def resolve(self, absent: Absent) -> None:
        """Have the hypervisor give a page; raises GuestFault. Takes messages: never from inside the engine."""
        self._space.resolve(absent.gfn, absent.access)
