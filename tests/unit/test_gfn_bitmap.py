"""Bitmaps of GFNs: what is packed either way is what is unpacked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.gfn_bitmap import bitmap_of, bitmap_of_marks, gfns_of


@given(st.binary(max_size=200).map(lambda raw: bytes(byte & 1 for byte in raw)), st.integers(0, 1000))
def test_both_ways_to_pack_give_the_gfns_that_were_marked(marks: bytes, first: int) -> None:
    marked = [gfn for gfn, mark in enumerate(marks) if mark]

    assert bitmap_of(marked, len(marks)) == bitmap_of_marks(marks)
    assert gfns_of(bitmap_of_marks(marks), first) == [first + gfn for gfn in marked]
    assert len(bitmap_of_marks(marks)) == (len(marks) + 7) // 8


def test_the_first_gfn_is_the_lowest_bit_of_the_first_byte() -> None:
    assert bitmap_of([0, 9], 10) == b"\x01\x02"
