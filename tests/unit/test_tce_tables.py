"""The TCE hypercalls: what they store, what they refuse, and with which code."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.codes import HCode
from protocol.errors import MalformedMessage
from protocol.messages import TceWindowBody
from services.kvm.tce_tables import (
    DEFAULT_WINDOW_TCES,
    MAX_STUFF_TCES,
    MAX_TABLES,
    MAX_TOTAL_TCES,
    TceTables,
)
from shared.tce import ENTRY_BYTES, pci_liobn

RAM_BYTES = 1 << 20
LIOBN = pci_liobn(0, 0, 0)
BASE = 0x100000
N_TCES = 32
WINDOW = TceWindowBody(LIOBN, 12, BASE, N_TCES)
SUCCESS = [HCode.H_SUCCESS]
PARAMETER = [HCode.H_PARAMETER]


def in_ram(gpa: int, n_bytes: int) -> bool:
    return gpa + n_bytes <= RAM_BYTES


def allocate(window: TceWindowBody) -> memoryview:
    return memoryview(bytearray(window.n_tces * ENTRY_BYTES))


def one_window() -> TceTables:
    tables = TceTables(in_ram, allocate)
    assert tables.create(WINDOW) is HCode.H_SUCCESS
    return tables


def indirect(tables: TceTables, ioba: int, values: list[int], list_gpa: int = 0x4000) -> list[int]:
    return tables.h_put_tce_indirect(LIOBN, ioba, list_gpa, len(values), struct.pack(f">{len(values)}Q", *values))


def entries(tables: TceTables) -> list[int]:
    return [tables.h_get_tce(LIOBN, BASE + (n << 12))[1] for n in range(N_TCES)]


def test_a_liobn_names_bridge_domain_and_window() -> None:
    assert pci_liobn(3, 0, 1) == 0x80000301
    assert pci_liobn(0, 2, 0) == 0x80000004


def test_a_stored_entry_is_read_back() -> None:
    tables = one_window()

    assert tables.h_put_tce(LIOBN, BASE + 0x5000, 0x9003) == SUCCESS
    assert tables.h_get_tce(LIOBN, BASE + 0x5000) == [HCode.H_SUCCESS, 0x9003]
    assert tables.h_get_tce(LIOBN, BASE + 0x6000) == [HCode.H_SUCCESS, 0]


@pytest.mark.parametrize(
    ("liobn", "ioba"),
    [
        (LIOBN + 1, BASE),
        (LIOBN | 1 << 32, BASE),
        (LIOBN, BASE - 0x1000),
        (LIOBN, BASE + N_TCES * 0x1000),
        (LIOBN, BASE + 0x10),
        (LIOBN, (1 << 64) - 0x1000),
    ],
)
def test_an_unknown_table_or_bus_address_is_a_parameter_error(liobn: int, ioba: int) -> None:
    tables = one_window()

    assert tables.h_get_tce(liobn, ioba) == PARAMETER
    assert tables.h_put_tce(liobn, ioba, 0x9003) == PARAMETER
    assert tables.h_stuff_tce(liobn, ioba, 0, 1) == PARAMETER
    assert tables.may_put_indirect(liobn, ioba, 0x4000, 1) is HCode.H_PARAMETER
    assert tables.h_put_tce_indirect(liobn, ioba, 0x4000, 1, bytes(8)) == PARAMETER
    assert entries(tables) == [0] * N_TCES


@pytest.mark.parametrize("tce", [RAM_BYTES | 3, (1 << 63) | 1, 0x9000 | 0x10 | 3, (RAM_BYTES - 0x1000 + 0x800) | 1])
def test_an_entry_outside_ram_or_not_aligned_is_refused(tce: int) -> None:
    tables = one_window()

    assert tables.h_put_tce(LIOBN, BASE, tce) == PARAMETER
    assert indirect(tables, BASE, [tce]) == PARAMETER
    assert entries(tables) == [0] * N_TCES


def test_the_last_page_of_ram_may_be_mapped() -> None:
    tables = one_window()

    assert tables.h_put_tce(LIOBN, BASE, (RAM_BYTES - 0x1000) | 3) == SUCCESS


def test_a_large_page_must_lie_in_ram_as_a_whole() -> None:
    tables = TceTables(lambda gpa, n_bytes: gpa + n_bytes <= 0x18000, allocate)
    tables.create(TceWindowBody(LIOBN, 16, 0, 4))

    assert tables.h_put_tce(LIOBN, 0, 0x0003) == SUCCESS
    assert tables.h_put_tce(LIOBN, 0, 0x10003) == PARAMETER
    assert tables.h_put_tce(LIOBN, 0, 0x1003) == PARAMETER


def test_an_entry_that_permits_nothing_may_hold_any_address() -> None:
    tables = one_window()

    assert tables.h_put_tce(LIOBN, BASE, 0xDEAD_BEEF_0000_0000) == SUCCESS
    assert entries(tables)[0] == 0xDEAD_BEEF_0000_0000


def test_a_list_is_stored_in_order() -> None:
    tables = one_window()

    assert indirect(tables, BASE + 0x2000, [0x1003, 0x2003, 0x3001]) == SUCCESS
    assert entries(tables)[2:5] == [0x1003, 0x2003, 0x3001]


def test_a_list_stops_at_its_first_bad_entry() -> None:
    tables = one_window()

    assert indirect(tables, BASE, [0x1003, 0x2003, RAM_BYTES | 3, 0x4003]) == PARAMETER
    assert entries(tables)[:4] == [0x1003, 0x2003, 0, 0]


@pytest.mark.parametrize("list_gpa", [0x4008, 0x4800, 1])
def test_a_list_that_is_not_aligned_is_refused(list_gpa: int) -> None:
    tables = one_window()

    assert tables.may_put_indirect(LIOBN, BASE, list_gpa, 1) is HCode.H_PARAMETER
    assert indirect(tables, BASE, [0x1003], list_gpa) == PARAMETER


def test_a_list_of_more_than_512_is_refused_before_it_is_read() -> None:
    tables = TceTables(in_ram, allocate)
    tables.create(TceWindowBody(LIOBN, 12, 0, 1024))

    assert tables.may_put_indirect(LIOBN, 0, 0, 512) is HCode.H_SUCCESS
    assert tables.may_put_indirect(LIOBN, 0, 0, 513) is HCode.H_PARAMETER


def test_a_list_beyond_the_window_is_refused_whole() -> None:
    tables = one_window()

    assert indirect(tables, BASE + (N_TCES - 1 << 12), [0x1003, 0x2003]) == PARAMETER
    assert entries(tables) == [0] * N_TCES


def test_a_list_of_the_wrong_length_is_refused() -> None:
    tables = one_window()

    assert tables.h_put_tce_indirect(LIOBN, BASE, 0x4000, 2, bytes(8)) == PARAMETER


def test_stuffing_writes_its_value_everywhere() -> None:
    tables = one_window()
    indirect(tables, BASE, [0x1003] * N_TCES)

    assert tables.h_stuff_tce(LIOBN, BASE + 0x1000, 0, N_TCES - 2) == SUCCESS
    assert entries(tables) == [0x1003, *[0] * (N_TCES - 2), 0x1003]


@pytest.mark.parametrize(
    ("tce", "n_tces"), [(1, 1), (2, 1), (0x1003, 1), (0, N_TCES + 1), (0, MAX_STUFF_TCES + 1), (0, 1 << 63)]
)
def test_stuffing_a_permission_or_beyond_the_window_is_refused(tce: int, n_tces: int) -> None:
    tables = one_window()

    assert tables.h_stuff_tce(LIOBN, BASE, tce, n_tces) == PARAMETER


def test_the_default_window_can_be_cleared_in_one_call() -> None:
    tables = TceTables(in_ram, allocate)
    tables.create(TceWindowBody(LIOBN, 12, 0, DEFAULT_WINDOW_TCES))
    tables.h_put_tce(LIOBN, 0x3FFFF000, 0x1003)

    assert tables.h_stuff_tce(LIOBN, 0, 0, DEFAULT_WINDOW_TCES) == SUCCESS
    assert tables.h_get_tce(LIOBN, 0x3FFFF000) == [HCode.H_SUCCESS, 0]


def test_a_domain_has_two_windows_and_no_other_takes_one_from_it() -> None:
    tables = one_window()

    assert tables.create(TceWindowBody(pci_liobn(0, 0, 1), 16, 1 << 59, 16)) is HCode.H_SUCCESS
    for domain in (1, 31):
        for window in (0, 1):
            assert tables.create(TceWindowBody(pci_liobn(0, domain, window), 12, 0, 16)) is HCode.H_SUCCESS
    assert tables.create(TceWindowBody(pci_liobn(1, 0, 0), 12, 0, 16)) is HCode.H_SUCCESS
    assert tables.create(TceWindowBody(pci_liobn(0, 1, 1), 12, 0, 16)) is HCode.H_IN_USE


def test_no_two_windows_of_any_bridge_and_domain_have_one_liobn() -> None:
    liobns = [pci_liobn(bridge, domain, window) for bridge in range(4) for domain in range(32) for window in range(2)]

    assert len(set(liobns)) == len(liobns)


def test_there_is_room_for_two_windows_of_the_bus_and_of_every_slot() -> None:
    tables = TceTables(in_ram, allocate)
    for domain in range(32):
        for window in range(2):
            assert tables.create(TceWindowBody(pci_liobn(0, domain, window), 12, 0, 1)) is HCode.H_SUCCESS


def test_a_virtual_io_device_has_one_window() -> None:
    tables = TceTables(in_ram, allocate)

    assert tables.create(TceWindowBody(0x71000003, 12, 0, 16)) is HCode.H_SUCCESS
    assert tables.create(TceWindowBody(0x71000004, 12, 0, 16)) is HCode.H_SUCCESS
    assert tables.create(TceWindowBody(0x71000003, 12, 0, 16)) is HCode.H_IN_USE


@pytest.mark.parametrize(
    "window",
    [
        TceWindowBody(LIOBN, 11, 0, 16),
        TceWindowBody(LIOBN, 35, 0, 16),
        TceWindowBody(LIOBN, 12, 0x800, 16),
        TceWindowBody(LIOBN, 12, -0x1000, 16),
        TceWindowBody(LIOBN, 12, (1 << 64) - 0x1000, 2),
        TceWindowBody(LIOBN, 12, 0, 0),
        TceWindowBody(LIOBN, 12, 0, (1 << 24) + 1),
        TceWindowBody(1 << 32, 12, 0, 16),
    ],
)
def test_a_window_that_does_not_hold_is_refused_before_memory_is_taken(window: TceWindowBody) -> None:
    taken: list[TceWindowBody] = []

    def take(wanted: TceWindowBody) -> memoryview:
        taken.append(wanted)
        return allocate(wanted)

    assert TceTables(in_ram, take).create(window) is HCode.H_PARAMETER
    assert taken == []


def test_the_number_of_tables_is_bounded() -> None:
    tables = TceTables(in_ram, allocate)
    for n in range(MAX_TABLES):
        assert tables.create(TceWindowBody(pci_liobn(n, 0, 0), 12, 0, 1)) is HCode.H_SUCCESS

    assert tables.create(TceWindowBody(pci_liobn(MAX_TABLES, 0, 0), 12, 0, 1)) is HCode.H_RESOURCE


def test_the_memory_of_all_tables_is_bounded() -> None:
    shared_memory = memoryview(bytearray(8 << 24))
    tables = TceTables(in_ram, lambda _window: shared_memory)
    for n in range(MAX_TOTAL_TCES >> 24):
        assert tables.create(TceWindowBody(pci_liobn(n, 0, 0), 12, 0, 1 << 24)) is HCode.H_SUCCESS

    assert tables.create(TceWindowBody(pci_liobn(9, 0, 0), 12, 0, 1)) is HCode.H_RESOURCE


def test_a_removed_table_is_unknown_and_lets_its_memory_go() -> None:
    memory = bytearray(N_TCES * ENTRY_BYTES)
    tables = TceTables(in_ram, lambda _window: memoryview(memory))
    tables.create(WINDOW)

    assert tables.remove(LIOBN) is HCode.H_SUCCESS
    assert tables.remove(LIOBN) is HCode.H_PARAMETER
    assert tables.h_get_tce(LIOBN, BASE) == PARAMETER
    memory.clear()


def test_clearing_keeps_the_windows() -> None:
    tables = one_window()
    indirect(tables, BASE, [0x1003] * N_TCES)

    tables.clear()

    assert tables.windows == [WINDOW]
    assert entries(tables) == [0] * N_TCES


def test_clearing_a_table_that_a_guest_has_filled_takes_no_memory() -> None:
    tables = TceTables(in_ram, allocate)
    tables.create(TceWindowBody(LIOBN, 12, 0, DEFAULT_WINDOW_TCES))
    assert tables.h_stuff_tce(LIOBN, 0, 0x1000, DEFAULT_WINDOW_TCES) == SUCCESS

    tracemalloc.start()
    try:
        tables.clear()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 1 << 20
    assert tables.save().tables[0].entries == {}


def test_a_saved_table_loads_into_a_new_vm() -> None:
    tables = one_window()
    indirect(tables, BASE, [0x1003, 0, 0x2001])

    fresh = TceTables(in_ram, allocate)
    fresh.load(tables.save())

    assert fresh.windows == [WINDOW]
    assert entries(fresh) == entries(tables)


@pytest.mark.parametrize(("index", "value"), [(N_TCES, 0x1003), (-1, 0x1003), (0, RAM_BYTES | 3), (0, 1 << 64)])
def test_a_saved_entry_that_could_not_be_stored_is_refused(index: int, value: int) -> None:
    state = one_window().save()
    state.tables[0].entries[index] = value

    with pytest.raises(MalformedMessage):
        TceTables(in_ram, allocate).load(state)


U64 = st.integers(0, (1 << 64) - 1)


@given(liobn=U64, ioba=U64, value=U64, n=U64, data=st.binary(max_size=64))
def test_any_registers_end_in_a_code(liobn: int, ioba: int, value: int, n: int, data: bytes) -> None:
    tables = one_window()

    for result in (
        tables.h_get_tce(liobn, ioba),
        tables.h_put_tce(liobn, ioba, value),
        tables.h_stuff_tce(liobn, ioba, value, n),
        tables.h_put_tce_indirect(liobn, ioba, value, n, data),
    ):
        assert result[0] in (HCode.H_SUCCESS, HCode.H_PARAMETER)


class AgainstAPlainList(RuleBasedStateMachine):
    """The table holds what a plain list of the accepted stores holds, and never a page outside RAM."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = one_window()
        self.model = [0] * N_TCES

    indices = st.integers(-2, N_TCES + 1)
    values = st.one_of(
        st.integers(0, (RAM_BYTES >> 12) + 2).flatmap(lambda page: st.integers(0, 3).map(lambda p: page << 12 | p)), U64
    )

    @staticmethod
    def storable(value: int) -> bool:
        return not value & 3 or (value & 0xFFC == 0 and value >> 12 < RAM_BYTES >> 12)

    @rule(index=indices, value=values)
    def put(self, index: int, value: int) -> None:
        accepted = 0 <= index < N_TCES and self.storable(value)
        assert self.tables.h_put_tce(LIOBN, BASE + (index << 12), value) == (SUCCESS if accepted else PARAMETER)
        if accepted:
            self.model[index] = value

    @rule(index=indices, values=st.lists(values, max_size=6))
    def put_list(self, index: int, values: list[int]) -> None:
        result = indirect(self.tables, BASE + (index << 12), values)
        if not (0 <= index < N_TCES and index + len(values) <= N_TCES):
            assert result == PARAMETER
            return
        for n, value in enumerate(values):
            if not self.storable(value):
                assert result == PARAMETER
                return
            self.model[index + n] = value
        assert result == SUCCESS

    @rule(index=indices, value=values, n=st.integers(0, N_TCES + 1))
    def stuff(self, index: int, value: int, n: int) -> None:
        accepted = 0 <= index < N_TCES and index + n <= N_TCES and not value & 3
        assert self.tables.h_stuff_tce(LIOBN, BASE + (index << 12), value, n) == (SUCCESS if accepted else PARAMETER)
        if accepted:
            self.model[index : index + n] = [value] * n

    @precondition(lambda self: any(self.model))
    @rule()
    def move_to_another_host(self) -> None:
        fresh = TceTables(in_ram, allocate)
        fresh.load(self.tables.save())
        self.tables = fresh

    @invariant()
    def holds_the_model(self) -> None:
        assert entries(self.tables) == self.model

    @invariant()
    def devices_reach_ram_only(self) -> None:
        table = self.tables.get(LIOBN)
        assert table is not None
        gpas = [table.lookup(BASE + (n << 12)) for n in range(N_TCES)]
        assert [gpa for gpa in gpas if gpa is not None and not in_ram(gpa, 0x1000)] == []


TestAgainstAPlainList = AgainstAPlainList.TestCase
