"""A TCE table as devices read it."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import GuestFault
from protocol.messages import TceWindowBody
from shared.memfd import SealedMemory, map_sealed
from shared.tce import ENTRY_BYTES, TcePermission, TceTable, gpa_of_tce, tce

READ_WRITE = TcePermission.READ | TcePermission.WRITE
N_TCES = 16


def table_at(base: int = 0, page_shift: int = 12, n_tces: int = N_TCES) -> TceTable:
    window = TceWindowBody(0x80000000, page_shift, base, n_tces)
    return TceTable(window, memoryview(bytearray(n_tces * ENTRY_BYTES)))


def map_all(table: TceTable, value: int) -> None:
    for index in range(table.n_tces):
        table.store(index, value)


def test_an_entry_keeps_its_page_and_permission() -> None:
    value = tce(0x7FFF_F000, TcePermission.READ)

    assert value == 0x7FFF_F001
    assert gpa_of_tce(value) == 0x7FFF_F000


def test_an_entry_is_one_native_word() -> None:
    memory = bytearray(N_TCES * ENTRY_BYTES)
    table = TceTable(TceWindowBody(0x80000000, 12, 0, N_TCES), memoryview(memory))

    table.store(2, 0x1122334455667003)

    assert struct.unpack_from("<Q", memory, 16) == (0x1122334455667003,)


def test_lookup_keeps_the_offset_in_the_page() -> None:
    table = table_at(base=0x10000)
    table.store(1, tce(0x5000, READ_WRITE))

    assert table.lookup(0x11ABC) == 0x5ABC


@pytest.mark.parametrize("ioba", [0x0FFFF, 0x20000, 0x12000, 1 << 70, -1])
def test_lookup_outside_the_window_or_of_an_empty_entry_finds_nothing(ioba: int) -> None:
    table = table_at(base=0x10000)
    table.store(1, tce(0x5000, READ_WRITE))

    assert table.lookup(ioba) is None


def test_an_entry_with_an_address_but_no_permission_faults() -> None:
    table = table_at()
    table.store(0, 0x5000)

    assert table.lookup(0) is None
    with pytest.raises(GuestFault):
        table.translate(0, 1, write=False)


def test_neighbouring_guest_pages_make_one_piece() -> None:
    table = table_at()
    for index, gpa in enumerate([0x8000, 0x9000, 0x3000]):
        table.store(index, tce(gpa, READ_WRITE))

    assert table.translate(0x800, 0x2000, write=True) == [(0x8800, 0x1800), (0x3000, 0x800)]


def test_a_transfer_of_nothing_has_no_pieces() -> None:
    assert table_at().translate(0, 0, write=True) == []


@pytest.mark.parametrize(
    ("permission", "write", "allowed"),
    [
        (TcePermission.READ, False, True),
        (TcePermission.READ, True, False),
        (TcePermission.WRITE, False, False),
        (TcePermission.WRITE, True, True),
    ],
)
def test_the_device_needs_the_permission_of_its_direction(
    permission: TcePermission, write: bool, allowed: bool
) -> None:
    table = table_at()
    table.store(0, tce(0x5000, permission))

    if allowed:
        assert table.translate(0, 16, write=write) == [(0x5000, 16)]
    else:
        with pytest.raises(GuestFault):
            table.translate(0, 16, write=write)


@pytest.mark.parametrize(
    ("ioba", "n_bytes"), [(0, N_TCES * 4096 + 1), (N_TCES * 4096, 1), (0, -1), (-1, 4), (0, 1 << 80)]
)
def test_a_transfer_that_leaves_the_window_faults(ioba: int, n_bytes: int) -> None:
    table = table_at()
    map_all(table, tce(0x5000, READ_WRITE))

    with pytest.raises(GuestFault):
        table.translate(ioba, n_bytes, write=False)


def test_one_missing_entry_faults_the_whole_transfer() -> None:
    table = table_at()
    map_all(table, tce(0x5000, READ_WRITE))
    table.store(3, 0)

    with pytest.raises(GuestFault, match="0x3000"):
        table.translate(0, 5 * 4096, write=False)


def test_an_entry_outside_the_table_is_an_error() -> None:
    with pytest.raises(IndexError):
        table_at().entry(-1)
    with pytest.raises(IndexError):
        table_at().entry(N_TCES)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="TCEs over"):
        TceTable(TceWindowBody(0x80000000, 12, 0, 4), memoryview(bytearray(24)))


@given(
    page_shift=st.sampled_from([12, 16]),
    base=st.integers(0, 1 << 20),
    pages=st.lists(st.integers(0, 7), min_size=N_TCES, max_size=N_TCES),
    data=st.data(),
)
def test_pieces_cover_exactly_the_bytes_that_lookup_finds(
    page_shift: int, base: int, pages: list[int], data: st.DataObject
) -> None:
    table = table_at(base << page_shift, page_shift)
    for index, page in enumerate(pages):
        table.store(index, tce(page << page_shift, READ_WRITE))
    start = data.draw(st.integers(0, table.size_bytes - 1))
    n_bytes = data.draw(st.integers(1, table.size_bytes - start))
    ioba = table.base + start

    pieces = table.translate(ioba, n_bytes, write=False)

    assert sum(n for _, n in pieces) == n_bytes
    position = ioba
    for gpa, n in pieces:
        assert table.lookup(position) == gpa
        assert table.lookup(position + n - 1) == gpa + n - 1
        position += n


def test_a_reader_of_the_sealed_memory_sees_each_store() -> None:
    memory = SealedMemory("tce-test", N_TCES * ENTRY_BYTES)
    window = TceWindowBody(0x80000000, 12, 0, N_TCES)
    owner = TceTable(window, memory.buffer)
    readers_map = map_sealed(os.dup(memory.fd), memory.size_bytes)
    reader = TceTable(window, memoryview(readers_map))

    owner.store(5, tce(0x9000, TcePermission.WRITE))

    assert reader.translate(0x5010, 16, write=True) == [(0x9010, 16)]
    with pytest.raises(TypeError, match="read-only"):
        reader.store(5, 0)
    reader.release()
    owner.release()
    readers_map.close()
    memory.close()


@given(st.dictionaries(st.integers(0, 2999), st.integers(1, (1 << 64) - 1), max_size=20))
def test_every_entry_that_is_not_zero_is_found(entries: dict[int, int]) -> None:
    n_tces = 3000
    window = TceWindowBody(1, 12, 0, n_tces)
    table = TceTable(window, memoryview(bytearray(n_tces * ENTRY_BYTES)))
    for index, value in entries.items():
        table.store(index, value)

    assert table.nonzero() == dict(sorted(entries.items()))


def test_no_access_is_permitted_by_filling() -> None:
    with pytest.raises(ValueError, match="permits"):
        table_at().fill(0, N_TCES, tce(0x5000, TcePermission.READ))


@given(st.integers(0, 2999), st.integers(0, 3000), st.integers(0, (1 << 62) - 1).map(lambda value: value << 2))
def test_exactly_the_entries_of_a_range_are_filled(index: int, n: int, value: int) -> None:
    n_tces = 3000
    n = min(n, n_tces - index)
    table = TceTable(TceWindowBody(1, 12, 0, n_tces), memoryview(bytearray(b"\xff" * (n_tces * ENTRY_BYTES))))

    table.fill(index, n, value)

    before = (1 << 64) - 1
    expected = [before] * index + [value] * n + [before] * (n_tces - index - n)
    assert [table.entry(at) for at in range(n_tces)] == expected
