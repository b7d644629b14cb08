"""Effective to guest real addresses: real mode, and the radix trees that a process table names.

Pure logic over two functions, which read and write aligned big-endian doublewords of guest real memory. Nothing is
cached here: the engine's TLB is the cache. Page sizes 4 KiB, 64 KiB, 2 MiB and 1 GiB; process-scoped only, the
partition-scoped side is `services.guest.machine.partition`.
Source: Power ISA 3.0B, book III, 5.7.10 (radix) and 5.7.7 (process table).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from services.guest.machine.registers import Dsisr

REAL_MASK = (1 << 60) - 1
"""In real mode the four highest address bits are ignored."""
EA_BITS = 52
"""What a radix tree of Linux translates of a quadrant."""
KERNEL = 1 << 63
"""Addresses with this bit are the kernel's: the same in every process, those of process 0."""
_QUADRANT_SHIFT = 62
_OUTSIDE_MASK = (1 << _QUADRANT_SHIFT) - (1 << EA_BITS)
_EA_MASK = (1 << EA_BITS) - 1
_QUADRANTS = frozenset({0, 3})
"""Of a process, and of the kernel. The other two are the hypervisor's."""

VALID = 1 << 63
LEAF = 1 << 62
RPN_MASK = 0x01FF_FFFF_FFFF_F000
NEXT_MASK = 0x0FFF_FFFF_FFFF_FF00
SIZE_MASK = 0x1F
REFERENCED = 0x100
CHANGED = 0x080
GUARDED = 0x020
PRIVILEGED = 0x008
READ = 0x004
WRITE = 0x002
EXECUTE = 0x001
LEAF_SHIFTS = frozenset({12, 16, 21, 30})
MIN_SHIFT = 12
MIN_INDEX_BITS = 5
_MAX_LEVELS = 4

ROW_BYTES = 16
_RTS_HIGH_SHIFT = 61
_RTS_LOW_SHIFT = 5
_RTS_BASE = 31


class Use(Enum):
    """What an address is used for."""

    LOAD = "load"
    STORE = "store"
    FETCH = "fetch"


class StorageFault(Exception):
    """The guest's own translation refuses an access; `cause` is in terms of `Dsisr`."""

    def __init__(self, cause: int) -> None:
        self.cause = cause
        super().__init__(f"storage fault {cause:#x}")


class SegmentFault(Exception):
    """An effective address that no quadrant of a guest holds."""


@dataclass(frozen=True, slots=True)
class ProcessTable:
    """What H_REGISTER_PROC_TBL registered."""

    gpa: int
    size_bytes: int


class Mmu:
    """`load(gpa)` and `store(gpa, value)` reach guest real memory; what they raise passes through."""

    def __init__(self, load: Callable[[int], int], store: Callable[[int, int], None]) -> None:
        self._load = load
        self._store = store
        self.table: ProcessTable | None = None

    def translate(self, ea: int, use: Use, pid: int, *, problem: bool) -> tuple[int, bool, int]:
        """Where `ea` leads: the guest real address, whether whoever asked may do more there from now on (store, or load
        where a fetch asked), and how many bits of `ea` are within its page.

        Walks the tree of `ea`'s quadrant and sets R, and C for a store. What may be stored to has its C bit set: the
        first store has to come here. Raises StorageFault, SegmentFault.
        """
        quadrant = ea >> _QUADRANT_SHIFT
        if quadrant not in _QUADRANTS or ea & _OUTSIDE_MASK:
            raise SegmentFault
        table, index_bits, shift = self._root(0 if quadrant else pid)
        offset = ea & _EA_MASK
        if offset >> shift:
            raise SegmentFault
        # One loop without calls but for the loads: every miss of the engine's TLB comes here.
        load = self._load
        for _ in range(_MAX_LEVELS):
            shift -= index_bits
            if index_bits < MIN_INDEX_BITS or shift < MIN_SHIFT:
                break
            at = table + (offset >> shift & (1 << index_bits) - 1) * 8
            entry = load(at)
            if not entry & VALID:
                raise StorageFault(Dsisr.NO_PTE)
            if entry & LEAF:
                if shift not in LEAF_SHIFTS:
                    break
                return self._use(at, entry, use, problem, ea & (1 << shift) - 1, shift)
            table, index_bits = entry & NEXT_MASK, entry & SIZE_MASK
        raise StorageFault(Dsisr.BAD_CONFIGURATION)

    def _root(self, pid: int) -> tuple[int, int, int]:
        """Root table, its index bits and the bits of the address space of process `pid`."""
        if self.table is None or (pid + 1) * ROW_BYTES > self.table.size_bytes:
            raise StorageFault(Dsisr.NO_PTE)
        row = self._load(self.table.gpa + pid * ROW_BYTES)
        root = row & NEXT_MASK
        if not root:
            raise StorageFault(Dsisr.NO_PTE)
        space_bits = (row >> _RTS_HIGH_SHIFT & 3) << 3 | row >> _RTS_LOW_SHIFT & 7
        space_bits += _RTS_BASE
        if space_bits > EA_BITS:
            raise StorageFault(Dsisr.BAD_CONFIGURATION)
        return root, row & SIZE_MASK, space_bits

    def _use(self, at: int, pte: int, use: Use, problem: bool, within: int, shift: int) -> tuple[int, bool, int]:
        """The outcome for the leaf `pte` at `at`, a page of 1 << `shift` bytes."""
        if problem and pte & PRIVILEGED:
            raise StorageFault(Dsisr.PROTECTION)
        if use is Use.FETCH:
            if pte & (EXECUTE | GUARDED) != EXECUTE:
                raise StorageFault(Dsisr.NO_EXECUTE)
        elif not pte & (WRITE if use is Use.STORE else READ):
            raise StorageFault(Dsisr.PROTECTION)
        wanted = pte | (REFERENCED | CHANGED if use is Use.STORE else REFERENCED)
        if wanted != pte:
            self._store(at, wanted)
        more = READ if use is Use.FETCH else WRITE | CHANGED
        return pte & RPN_MASK & -(1 << shift) | within, wanted & more == more, shift
