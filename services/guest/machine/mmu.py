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
_QUADRANT_SHIFT = 62
_OUTSIDE_MASK = (1 << _QUADRANT_SHIFT) - (1 << EA_BITS)
_EA_MASK = (1 << EA_BITS) - 1
KERNEL_QUADRANT = 3
USER_QUADRANT = 0

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
MIN_INDEX_BITS = 5
_MAX_LEVELS = 4

ROW_BYTES = 16
_ROOT_MASK = 0x0FFF_FFFF_FFFF_FF00
_RTS_HIGH_SHIFT = 61
_RTS_LOW_SHIFT = 5
_RTS_BASE = 31


class Use(Enum):
    """What an address is used for."""

    LOAD = "load"
    STORE = "store"
    FETCH = "fetch"


_NEEDS = {Use.LOAD: READ, Use.STORE: WRITE, Use.FETCH: EXECUTE}


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


@dataclass(frozen=True, slots=True)
class Translation:
    """Where an effective address leads: `gpa`, and whether whoever asked may store there from now on.

    `writable` only when the page's C bit is set: the first store has to come here.
    """

    gpa: int
    writable: bool


class Mmu:
    """`load(gpa)` and `store(gpa, value)` reach guest real memory; what they raise passes through."""

    def __init__(self, load: Callable[[int], int], store: Callable[[int, int], None]) -> None:
        self._load = load
        self._store = store
        self.table: ProcessTable | None = None

    def translate(self, ea: int, use: Use, pid: int, *, problem: bool) -> Translation:
        """Walk the tree of `ea`'s quadrant; sets R, and C for a store. Raises StorageFault, SegmentFault."""
        quadrant = ea >> _QUADRANT_SHIFT
        if quadrant not in (USER_QUADRANT, KERNEL_QUADRANT) or ea & _OUTSIDE_MASK:
            raise SegmentFault
        root, index_bits, space_bits = self._root(pid if quadrant == USER_QUADRANT else 0)
        offset = ea & _EA_MASK
        if offset >> space_bits:
            raise SegmentFault
        at, pte, shift = self._walk(root, index_bits, space_bits, offset)
        self._check(pte, use, problem)
        wanted = pte | REFERENCED | (CHANGED if use is Use.STORE else 0)
        if wanted != pte:
            self._store(at, wanted)
        within = (1 << shift) - 1
        return Translation(pte & RPN_MASK & ~within | ea & within, bool(pte & WRITE and wanted & CHANGED))

    def _root(self, pid: int) -> tuple[int, int, int]:
        """Root table, its index bits and the bits of the address space of process `pid`."""
        if self.table is None or (pid + 1) * ROW_BYTES > self.table.size_bytes:
            raise StorageFault(Dsisr.NO_PTE)
        row = self._load(self.table.gpa + pid * ROW_BYTES)
        space_bits = (row >> _RTS_HIGH_SHIFT & 3) << 3 | row >> _RTS_LOW_SHIFT & 7
        space_bits += _RTS_BASE
        if space_bits > EA_BITS or not row & _ROOT_MASK:
            raise StorageFault(Dsisr.NO_PTE if not row & _ROOT_MASK else Dsisr.BAD_CONFIGURATION)
        return row & _ROOT_MASK, row & SIZE_MASK, space_bits

    def _walk(self, table: int, index_bits: int, shift: int, offset: int) -> tuple[int, int, int]:
        """Address and value of the leaf for `offset`, and the page's shift."""
        for _ in range(_MAX_LEVELS):
            shift -= index_bits
            if index_bits < MIN_INDEX_BITS or shift < 12:
                raise StorageFault(Dsisr.BAD_CONFIGURATION)
            at = table + (offset >> shift & (1 << index_bits) - 1) * 8
            entry = self._load(at)
            if not entry & VALID:
                raise StorageFault(Dsisr.NO_PTE)
            if entry & LEAF:
                if shift not in LEAF_SHIFTS:
                    break
                return at, entry, shift
            table, index_bits = entry & NEXT_MASK, entry & SIZE_MASK
        raise StorageFault(Dsisr.BAD_CONFIGURATION)

    @staticmethod
    def _check(pte: int, use: Use, problem: bool) -> None:
        if problem and pte & PRIVILEGED:
            raise StorageFault(Dsisr.PROTECTION)
        if use is Use.FETCH and (not pte & EXECUTE or pte & GUARDED):
            raise StorageFault(Dsisr.NO_EXECUTE)
        if not pte & _NEEDS[use]:
            raise StorageFault(Dsisr.PROTECTION)
