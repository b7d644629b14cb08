"""Which GFNs of a range, as a bitmap: the lowest bit of the first byte stands for the first one."""

from __future__ import annotations

from collections.abc import Iterable


def bitmap_of(gfns: Iterable[int], n_pages: int) -> bytes:
    """The bitmap of `n_pages` from 0 that has `gfns`."""
    bits = bytearray((n_pages + 7) // 8)
    for gfn in gfns:
        bits[gfn >> 3] |= 1 << (gfn & 7)
    return bytes(bits)


def bitmap_of_marks(marks: bytes) -> bytes:
    """The bitmap of a range with a byte a GFN, each 0 or 1."""
    # Every eighth byte, from each of eight places on, gives one bit of all bytes at once.
    n_bytes = -(-len(marks) // 8)
    padded = marks.ljust(n_bytes * 8, b"\0")
    packed = 0
    for bit in range(8):
        packed |= int.from_bytes(padded[bit::8], "little") << bit
    return packed.to_bytes(n_bytes, "little")


def gfns_of(bitmap: bytes, first: int = 0) -> list[int]:
    """The GFNs that a bitmap of a range from `first` on has, ascending."""
    return [
        first + (index << 3) + bit for index, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1
    ]
