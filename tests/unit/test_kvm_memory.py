"""Frames of a VM as kvm keeps them: slots, states and what the host finds, punched frames, the normal map."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES, gpa_of
from services.kvm.memory import MemSlot, VmMemory
from services.kvm.page_state import KvmState
from shared.host_view import HostState
from shared.partition_map import MapKind, kind_of

N_PAGES = 40
SIZE_BYTES = N_PAGES * PAGE_BYTES


@contextmanager
def open_ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE_BYTES)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def ram_fd() -> Iterator[int]:
    with open_ram() as fd:
        yield fd


@pytest.fixture
def memory(ram_fd: int) -> Iterator[VmMemory]:
    with closing(VmMemory("vm1", ram_fd, SIZE_BYTES)) as it:
        yield it


def raw(fd: int, gfn: int) -> bytes:
    return os.pread(fd, PAGE_BYTES, gpa_of(gfn))


def whole(memory: VmMemory) -> None:
    assert memory.set_slot(MemSlot(0, 0, SIZE_BYTES))


# -- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slot",
    [
        MemSlot(1, 1, PAGE_BYTES),
        MemSlot(1, 0, PAGE_BYTES + 1),
        MemSlot(1, 0, SIZE_BYTES + PAGE_BYTES),
        MemSlot(1, SIZE_BYTES, PAGE_BYTES),
        MemSlot(1, (1 << 64) - PAGE_BYTES, 2 * PAGE_BYTES),
        MemSlot(2, 0, 0),
    ],
    ids=["unaligned", "odd size", "too large", "behind RAM", "wraps", "removes what is not there"],
)
def test_a_slot_that_does_not_fit_is_refused(memory: VmMemory, slot: MemSlot) -> None:
    assert not memory.set_slot(slot)
    assert not memory.slots


def test_slots_do_not_overlap_and_one_may_replace_itself(memory: VmMemory) -> None:
    assert memory.set_slot(MemSlot(0, 0, 4 * PAGE_BYTES))

    assert not memory.set_slot(MemSlot(1, 3 * PAGE_BYTES, PAGE_BYTES))
    assert memory.set_slot(MemSlot(1, 4 * PAGE_BYTES, PAGE_BYTES))
    assert memory.set_slot(MemSlot(0, 0, 2 * PAGE_BYTES))

    assert [memory.in_slots(gfn) for gfn in range(6)] == [True, True, False, False, True, False]


def test_a_slot_of_size_zero_is_removed(memory: VmMemory) -> None:
    whole(memory)

    assert memory.set_slot(MemSlot(0, 0, 0))

    assert not memory.in_slots(0)


@given(
    slots=st.lists(st.tuples(st.integers(0, 3), st.integers(0, N_PAGES + 2), st.integers(0, N_PAGES + 2)), max_size=12)
)
def test_whatever_is_set_no_frame_is_in_two_slots(slots: list[tuple[int, int, int]]) -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE_BYTES)
    memory = VmMemory("vm1", fd, SIZE_BYTES)

    for number, gfn, n_pages in slots:
        memory.set_slot(MemSlot(number, gpa_of(gfn), n_pages * PAGE_BYTES))

    frames = [gfn for slot in memory.slots.values() for gfn in slot.gfns]
    assert len(frames) == len(set(frames))
    assert all(gfn < N_PAGES for gfn in frames)
    memory.close()
    os.close(fd)


# -- states -----------------------------------------------------------------------------------------------------------


@given(changes=st.lists(st.tuples(st.integers(0, N_PAGES - 1), st.sampled_from(KvmState)), max_size=60))
def test_host_view_and_counts_follow_the_states(changes: list[tuple[int, KvmState]]) -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE_BYTES)
    memory = VmMemory("vm1", fd, SIZE_BYTES)

    for gfn, state in changes:
        memory.set_state(gfn, state)

    for gfn in range(N_PAGES):
        assert memory.host_view[gfn] == memory.state(gfn).host_state
    assert [memory.counts[state] for state in KvmState] == [len(memory.in_state(state)) for state in KvmState]
    assert sum(memory.page_counts().values()) == N_PAGES
    memory.close()
    os.close(fd)


def test_a_hidden_frame_is_absent_until_it_is_shown(memory: VmMemory) -> None:
    memory.hide(3)
    assert memory.host_view[3] == HostState.ABSENT
    assert memory.state(3) is KvmState.NORMAL

    memory.show(3)

    assert memory.host_view[3] == HostState.PRESENT


# -- frames -----------------------------------------------------------------------------------------------------------


def test_a_punched_frame_is_a_hole_and_its_neighbours_are_not(memory: VmMemory, ram_fd: int) -> None:
    memory.ram[:] = b"x" * SIZE_BYTES

    memory.punch(2, 2)

    assert raw(ram_fd, 2) == raw(ram_fd, 3) == bytes(PAGE_BYTES)
    assert raw(ram_fd, 1) == raw(ram_fd, 4) == b"x" * PAGE_BYTES
    assert os.fstat(ram_fd).st_blocks * 512 == SIZE_BYTES - 2 * PAGE_BYTES


def test_dropping_frames_leaves_neither_content_nor_view(memory: VmMemory, ram_fd: int) -> None:
    memory.ram[:] = b"x" * SIZE_BYTES

    memory.drop_secure([1, 2, 5])

    assert memory.in_state(KvmState.SECURE) == [1, 2, 5]
    for gfn in (1, 2, 5):
        assert memory.host_view[gfn] == HostState.ABSENT
        assert raw(ram_fd, gfn) == bytes(PAGE_BYTES)
    assert raw(ram_fd, 3) == b"x" * PAGE_BYTES


def test_the_end_of_a_secure_vm_leaves_no_image_and_keeps_what_was_shared(memory: VmMemory, ram_fd: int) -> None:
    memory.ram[:] = b"x" * SIZE_BYTES
    memory.drop_secure([1])
    memory.set_state(2, KvmState.PAGED_OUT)
    memory.set_state(3, KvmState.SHARED)
    memory.busy.add(2)

    memory.forget_secure()

    assert memory.in_state(KvmState.NORMAL) == list(range(N_PAGES))
    assert raw(ram_fd, 1) == raw(ram_fd, 2) == bytes(PAGE_BYTES)
    assert raw(ram_fd, 3) == b"x" * PAGE_BYTES
    assert not memory.busy


def test_a_segment_that_is_too_short_is_refused() -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE_BYTES)

    with pytest.raises(HostFault, match="RAM of vm1"):
        VmMemory("vm1", fd, SIZE_BYTES)

    os.close(fd)


# -- the map of a normal VM -------------------------------------------------------------------------------------------


def test_a_fault_maps_the_neighbours_that_are_normal_and_free(memory: VmMemory) -> None:
    whole(memory)
    memory.set_state(17, KvmState.SECURE)
    memory.busy.add(18)

    memory.map_around(20)

    assert list(memory.map.mapped()) == [gfn for gfn in range(16, 32) if gfn not in (17, 18)]
    assert kind_of(memory.map[20]) is MapKind.NORMAL


def test_nothing_outside_the_slots_is_mapped(memory: VmMemory) -> None:
    memory.set_slot(MemSlot(0, 0, 3 * PAGE_BYTES))

    memory.map_around(0)
    memory.map_around(N_PAGES - 1)

    assert list(memory.map.mapped()) == [0, 1, 2]


def test_unmapping_takes_every_entry(memory: VmMemory) -> None:
    whole(memory)
    memory.map_around(0)
    memory.map_around(20)

    memory.unmap_all()

    assert not list(memory.map.mapped())


# -- arrival ----------------------------------------------------------------------------------------------------------


@given(states=st.lists(st.sampled_from(KvmState), min_size=N_PAGES, max_size=N_PAGES))
def test_a_vm_that_arrives_is_as_if_each_frame_had_changed_its_state(states: list[KvmState]) -> None:
    with (
        open_ram() as fd,
        open_ram() as other_fd,
        closing(VmMemory("vm1", fd, SIZE_BYTES)) as arrived,
        closing(VmMemory("vm1", other_fd, SIZE_BYTES)) as stepped,
    ):
        for gfn in range(N_PAGES):
            arrived.ram[gpa_of(gfn)] = 7
        arrived.arrive(bytes(states))
        for gfn, state in enumerate(states):
            stepped.set_state(gfn, state)

        assert (arrived.states(), arrived.counts) == (stepped.states(), stepped.counts)
        assert bytes(arrived.host_view) == bytes(stepped.host_view)
        kept = [state.host_state is not HostState.ABSENT for state in states]
        assert [raw(fd, gfn)[0] == 7 for gfn in range(N_PAGES)] == kept
