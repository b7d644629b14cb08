"""Guest memory through the partition-scoped map: copies and fills over pages that come and go."""

import os

from hypothesis import given
from hypothesis import strategies as st

from protocol.geometry import PAGE_BYTES
from protocol.messages import Access
from services.guest.address_space import AddressSpace
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap

N_PAGES = 4


class Memory:
    """Pages that a fault maps; a page in `steals` takes another's mapping away when it faults, and moves its frame."""

    def __init__(self) -> None:
        self.ram, self.secret = bytearray(os.urandom(N_PAGES * PAGE_BYTES)), bytearray(N_PAGES * PAGE_BYTES)
        self.map = PartitionMap(memoryview(bytearray(N_PAGES * ENTRY_BYTES)))
        self.dirty = bytearray(N_PAGES)
        self.steals: dict[int, int] = {}
        self.space = AddressSpace(memoryview(self.ram), memoryview(self.dirty), self.fault)
        self.space.use_map(self.map, memoryview(self.secret))

    def fault(self, gfn: int, _access: Access) -> None:
        victim = self.steals.pop(gfn, None)
        if victim is not None:
            self.map.set(victim, MapKind.SECURE, victim)
        self.map.set(gfn, MapKind.NORMAL, gfn)


@given(
    dst=st.integers(0, 2 * PAGE_BYTES - 1),
    src=st.integers(2 * PAGE_BYTES, 3 * PAGE_BYTES),
    n_bytes=st.integers(0, PAGE_BYTES),
)
def test_a_copy_moves_exactly_its_bytes(dst: int, src: int, n_bytes: int) -> None:
    memory = Memory()
    n_bytes = min(n_bytes, 2 * PAGE_BYTES - dst)
    expected = bytearray(memory.ram)
    expected[dst : dst + n_bytes] = expected[src : src + n_bytes]
    memory.space.copy(dst, src, n_bytes)
    assert memory.ram == expected
    touched = range(dst // PAGE_BYTES, -(-(dst + n_bytes) // PAGE_BYTES)) if n_bytes else range(0)
    assert [gfn for gfn, flag in enumerate(memory.dirty) if flag] == list(touched)


def test_a_copy_whose_source_faults_looks_at_its_destination_again() -> None:
    memory = Memory()
    before = bytes(memory.ram[:PAGE_BYTES])
    memory.steals[2] = 0
    memory.space.copy(0, 2 * PAGE_BYTES, PAGE_BYTES)
    assert memory.secret[:PAGE_BYTES] == memory.ram[2 * PAGE_BYTES : 3 * PAGE_BYTES]
    assert memory.ram[:PAGE_BYTES] == before


@given(gpa=st.integers(0, 3 * PAGE_BYTES), n_bytes=st.integers(0, PAGE_BYTES), value=st.integers(0, 255))
def test_a_fill_sets_exactly_its_bytes(gpa: int, n_bytes: int, value: int) -> None:
    memory = Memory()
    expected = bytearray(memory.ram)
    expected[gpa : gpa + n_bytes] = bytes([value]) * n_bytes
    memory.space.fill(gpa, n_bytes, value)
    assert memory.ram == expected


def test_stores_are_marked_in_the_dirty_map_of_the_map_in_force() -> None:
    memory = Memory()
    secure_dirty = bytearray(N_PAGES)
    for gfn in range(N_PAGES):
        memory.map.set(gfn, MapKind.SECURE, gfn)

    memory.space.use_map(memory.map, memoryview(memory.secret), memoryview(secure_dirty))
    memory.space.store(0, b"a")
    memory.space.use_map(memory.map, memoryview(memory.secret))
    memory.space.store(PAGE_BYTES, b"b")

    assert (list(secure_dirty), list(memory.dirty)) == ([1, 0, 0, 0], [0, 1, 0, 0])
