"""Builds radix trees and process tables in a dict of doublewords, the way a kernel does."""

from __future__ import annotations

from collections.abc import Callable

from services.guest.machine import mmu

SPACE_BITS = 52
LEVEL_BITS = (13, 9, 9, 9)
"""Index bits of each level: of Linux with 4 KiB pages; a leaf is 1 GiB, 2 MiB or 4 KiB by its level."""
LEVEL_BITS_64K = (13, 9, 9, 5)
RTS = SPACE_BITS - 31
TABLE_SIZES = {13: 1 << 16, 9: 1 << 12, 5: 1 << 8}


class RadixTree:
    """One process's tree; tables are taken from `next_table` upwards and written with `store(gpa, value)`."""

    def __init__(
        self, store: Callable[[int, int], None], next_table: int, level_bits: tuple[int, ...] = LEVEL_BITS
    ) -> None:
        self._store = store
        self._next = next_table
        self._bits = level_bits
        self._tables: dict[tuple[int, ...], int] = {}
        self.root = self._table(())
        self.leaves: dict[int, int] = {}
        """Effective address of each page to where its entry lies."""

    def row(self) -> int:
        """The first doubleword of this process's row in the process table."""
        return (RTS >> 3) << 61 | (RTS & 7) << 5 | self.root | self._bits[0]

    def map(self, ea: int, gpa: int, flags: int, shift: int = 12) -> None:
        """A page of 1 << shift bytes."""
        offset = ea & (1 << SPACE_BITS) - 1
        path: tuple[int, ...] = ()
        left = SPACE_BITS
        for bits in self._bits:
            left -= bits
            at = self._tables[path] + (offset >> left & (1 << bits) - 1) * 8
            if left == shift:
                self._store(at, mmu.VALID | mmu.LEAF | gpa | flags)
                self.leaves[ea] = at
                return
            path = (*path, offset >> left)
            if path not in self._tables:
                deeper = self._bits[len(path)]
                self._store(at, mmu.VALID | self._table(path) | deeper)
        raise ValueError(f"no level of this tree has pages of 1 << {shift} bytes")

    def _table(self, path: tuple[int, ...]) -> int:
        size = TABLE_SIZES[self._bits[len(path)]]
        self._next = (self._next + size - 1) // size * size
        self._tables[path] = self._next
        self._next += size
        return self._tables[path]
