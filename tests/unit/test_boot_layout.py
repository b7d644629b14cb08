"""Where the parts of a secure image lie: a device tree is the host's word, so nothing in it is believed unchecked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ImageRefused
from protocol.geometry import PAGE_BYTES
from services.ultravisor.boot_layout import (
    RTAS_BYTES,
    BootLayout,
    Extent,
    checked_extent,
    free_pages,
    read_layout,
)
from shared.fdt_reader import FdtNode, FdtTree

MEMORY_BYTES = 64 << 20
FDT = Extent(0x100000, 4096)

Properties = dict[str, bytes]


def tree(rtas: Properties | None = None, chosen: Properties | None = None, memory: Properties | None = None) -> FdtTree:
    """A tree that holds, with these properties in place of the usual ones."""
    nodes = {
        "rtas": {"linux,rtas-base": (0x10000).to_bytes(4, "big")} if rtas is None else rtas,
        "chosen": {
            "bootargs": b"svm=on\0",
            "linux,initrd-start": (0x200000).to_bytes(8, "big"),
            "linux,initrd-end": (0x280000).to_bytes(8, "big"),
        }
        | (chosen or {}),
        "memory@0": {"reg": bytes(8) + MEMORY_BYTES.to_bytes(8, "big")} if memory is None else memory,
    }
    return FdtTree(FdtNode("", {}, {name: FdtNode(name, properties) for name, properties in nodes.items()}))


def layout(rmo_bytes: int = MEMORY_BYTES) -> BootLayout:
    return BootLayout(FDT, Extent(0x10000, 20), Extent(0x200000, 0x80000), b"svm=on", rmo_bytes)


def refusal(bad: FdtTree, memory_bytes: int = MEMORY_BYTES) -> str:
    with pytest.raises(ImageRefused) as caught:
        read_layout(bad, FDT, memory_bytes)
    return caught.value.reason


def test_the_parts_are_read_from_the_tree() -> None:
    found = read_layout(tree(), FDT, MEMORY_BYTES)

    assert found == layout()
    assert found.rtas.n_bytes == RTAS_BYTES


def test_addresses_may_take_one_cell_or_two() -> None:
    narrow = {"linux,initrd-start": (0x200000).to_bytes(4, "big"), "linux,initrd-end": (0x280000).to_bytes(4, "big")}

    assert read_layout(tree(chosen=narrow), FDT, MEMORY_BYTES) == layout()


def test_boot_arguments_are_taken_without_their_end_mark() -> None:
    assert read_layout(tree(chosen={"bootargs": b"a b\0"}), FDT, MEMORY_BYTES).bootargs == b"a b"


def test_the_memory_of_the_first_node_bounds_the_bounce_pages() -> None:
    small = tree(memory={"reg": bytes(8) + (32 << 20).to_bytes(8, "big")})
    large = tree(memory={"reg": bytes(8) + (4 << 30).to_bytes(8, "big")})

    assert read_layout(small, FDT, MEMORY_BYTES).rmo_bytes == 32 << 20
    assert read_layout(large, FDT, MEMORY_BYTES).rmo_bytes == MEMORY_BYTES
    assert read_layout(large, FDT, 2 << 30).rmo_bytes == 768 << 20


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (tree(rtas={}), "device tree: no linux,rtas-base in /rtas"),
        (tree(rtas={"linux,rtas-base": b"\0\0\1"}), "device tree: no linux,rtas-base in /rtas"),
        (tree(rtas={"linux,rtas-base": b"\xff" * 4}), "rtas: 20 bytes at 0xffffffff are not in memory"),
        (tree(chosen={"linux,initrd-start": b""}), "device tree: no linux,initrd-start in /chosen"),
        (tree(chosen={"linux,initrd-end": bytes(8)}), "initrd: -2097152 bytes at 0x200000 are not in memory"),
        (
            tree(chosen={"linux,initrd-end": (0x200000).to_bytes(8, "big")}),
            "initrd: 0 bytes at 0x200000 are not in memory",
        ),
        (tree(memory={}), "device tree: no /memory@0"),
        (tree(memory={"reg": bytes(8)}), "device tree: no /memory@0"),
    ],
)
def test_a_tree_that_does_not_hold_is_refused_with_what_is_wrong(bad: FdtTree, reason: str) -> None:
    assert refusal(bad) == reason


@given(st.binary(max_size=9), st.binary(max_size=9), st.binary(max_size=9), st.binary(max_size=24))
def test_no_number_of_a_tree_leads_out_of_memory(rtas: bytes, start: bytes, end: bytes, reg: bytes) -> None:
    hostile = tree({"linux,rtas-base": rtas}, {"linux,initrd-start": start, "linux,initrd-end": end}, {"reg": reg})

    try:
        found = read_layout(hostile, FDT, MEMORY_BYTES)
    except ImageRefused:
        return
    for extent in (found.rtas, found.initrd):
        assert 0 <= extent.gpa < extent.end <= MEMORY_BYTES
    assert found.rmo_bytes <= MEMORY_BYTES


@given(st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 70), 1 << 70))
def test_a_checked_extent_lies_in_memory(gpa: int, n_bytes: int) -> None:
    try:
        extent = checked_extent("part", gpa, n_bytes, MEMORY_BYTES)
    except ImageRefused:
        assert n_bytes <= 0 or gpa < 0 or gpa + n_bytes > MEMORY_BYTES
        return
    assert 0 <= extent.gpa < extent.end <= MEMORY_BYTES


extents = st.builds(Extent, st.integers(0, MEMORY_BYTES - 1), st.integers(1, 1 << 20).map(lambda n: min(n, 1 << 20)))


@given(st.lists(extents, max_size=12), st.integers(1, 16))
def test_bounce_pages_overlap_nothing_and_lie_below_the_limit(taken: list[Extent], n_pages: int) -> None:
    gfns = free_pages(layout(), taken, [(e.gpa, e.n_bytes) for e in taken[::2]], n_pages)

    room = Extent(gfns[0] * PAGE_BYTES, n_pages * PAGE_BYTES)
    assert gfns == list(range(gfns[0], gfns[0] + n_pages))
    assert room.end <= MEMORY_BYTES
    assert not any(room.overlaps(extent) for extent in taken)


def test_the_highest_free_pages_are_taken() -> None:
    reserved = [(MEMORY_BYTES - PAGE_BYTES, 1)]

    gfns = free_pages(layout(), [], reserved, 5)

    assert gfns[-1] == MEMORY_BYTES // PAGE_BYTES - 2


def test_a_memory_without_room_is_refused() -> None:
    full = [Extent(gpa, PAGE_BYTES) for gpa in range(0, MEMORY_BYTES, 4 * PAGE_BYTES)]

    with pytest.raises(ImageRefused, match="no free memory"):
        free_pages(layout(), full, [], 5)
    with pytest.raises(ImageRefused, match="no free memory"):
        free_pages(layout(rmo_bytes=2 * PAGE_BYTES), [], [], 5)
