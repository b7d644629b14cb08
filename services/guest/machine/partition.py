"""Guest real to engine-physical addresses: the partition-scoped map as the processor's last step of translation.

Engine-physical space holds RAM and secure memory as two ranges, and the shadow code pages as a third. Nothing waits
here: what the map does not give is raised as `Absent`, and the engine has it resolved once it has left the engine.
"""

from __future__ import annotations

from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.messages import Access
from services.guest.address_space import AddressSpace
from shared.partition_map import FRAME_SHIFT, KIND_MASK, PERMISSION, MapKind

NORMAL_BASE = 0
SECURE_BASE = 1 << 44
SHADOW_BASE = 1 << 46
_OFFSET_MASK = PAGE_BYTES - 1
_PERMISSION = {access: PERMISSION[access] for access in Access}
_READ = PERMISSION[Access.READ]
_WRITE = PERMISSION[Access.WRITE]
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
    """The guest real memory of one VM."""

    def __init__(self, space: AddressSpace) -> None:
        self._space = space

    def place(self, gpa: int, access: Access) -> tuple[int, bool]:
        """Engine-physical address of `gpa`, and whether its page may be written. Raises Absent, OutsideRam.

        For a store the page is marked in the guest dirty map.
        """
        if not 0 <= gpa < self._space.size_bytes:
            raise OutsideRam(gpa)
        gfn = gpa >> PAGE_SHIFT
        word = self._space.entry(gfn)
        if not word & _PERMISSION[access]:
            raise Absent(gfn, access)
        if access is Access.WRITE:
            self._space.mark_dirty(gfn)
        base = SECURE_BASE if word & KIND_MASK == _SECURE else NORMAL_BASE
        writable = bool(word & _WRITE) and self._space.is_dirty(gfn)
        return base + (word >> FRAME_SHIFT << PAGE_SHIFT) + (gpa & _OFFSET_MASK), writable

    def load_u64(self, gpa: int) -> int:
        """An aligned big-endian doubleword: an entry of a table. Raises Absent, OutsideRam."""
        self._must_give(gpa, Access.READ)
        return int.from_bytes(self._space.load(gpa, 8), "big")

    def store_u64(self, gpa: int, value: int) -> None:
        """Store an aligned big-endian doubleword. Raises Absent, OutsideRam."""
        self._must_give(gpa, Access.WRITE)
        self._space.store(gpa, value.to_bytes(8, "big"))

    def load(self, gpa: int, n_bytes: int) -> bytes:
        """`n_bytes` inside one page. Raises Absent, OutsideRam."""
        self._must_give(gpa, Access.READ)
        return self._space.load(gpa, n_bytes)

    def _must_give(self, gpa: int, access: Access) -> None:
        if not 0 <= gpa <= self._space.size_bytes - 8:
            raise OutsideRam(gpa)
        if not self._space.entry(gpa >> PAGE_SHIFT) & _PERMISSION[access]:
            raise Absent(gpa >> PAGE_SHIFT, access)

    def resolve(self, absent: Absent) -> None:
        """Have the hypervisor give a page; raises GuestFault. Takes messages: never from inside the engine."""
        self._space.resolve(absent.gfn, absent.access)
