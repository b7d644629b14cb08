"""The driver's virtqueue: chains, suppression, and everything a device may lie about."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.geometry import PAGE_BYTES
from services.guest.model.state import Queue
from services.guest.model.virtqueue import QueueBroken, QueueError, Virtqueue
from tests.unit.model_cpu import cpu_over

SIZE = 8
RING = 0x100
ADDR = 0x40000000
TABLE = 0x8000


class Device:
    """Writes what it likes into the used ring."""

    def __init__(self, *, indirect: bool = True, event_idx: bool = True) -> None:
        self.ram = bytearray(PAGE_BYTES)
        self.queue = Virtqueue(cpu_over(self.ram), Queue())
        self.queue.set_up(SIZE, RING, ADDR, indirect=indirect, event_idx=event_idx)
        self.used_idx = 0

    def use(self, head: int, written: int, *, jump: int = 1) -> None:
        state = self.queue.state
        struct.pack_into("<II", self.ram, state.used + 4 + 8 * (self.used_idx % SIZE), head, written)
        self.used_idx = self.used_idx + jump & 0xFFFF
        struct.pack_into("<H", self.ram, state.used + 2, self.used_idx)

    def descriptor(self, index: int) -> tuple[int, ...]:
        return struct.unpack_from("<QIHH", self.ram, self.queue.state.desc + 16 * index)


SEGMENTS = [(0x1000, 16, False), (0x2000, 512, True), (0x3000, 1, True)]


def test_a_direct_chain_is_linked_and_its_descriptors_come_back() -> None:
    device = Device(indirect=False)
    head = device.queue.add(SEGMENTS)
    assert [device.descriptor(n) for n in range(3)] == [(0x1000, 16, 1, 1), (0x2000, 512, 3, 2), (0x3000, 1, 2, 0)]
    device.use(head, 513)
    assert device.queue.take_used() == (head, 513)
    assert sorted(device.queue.state.free) == list(range(SIZE))


def test_an_indirect_request_takes_one_descriptor() -> None:
    device = Device()
    head = device.queue.add(SEGMENTS, TABLE, ADDR + TABLE)
    assert device.descriptor(head) == (ADDR + TABLE, 48, 4, 0)
    assert struct.unpack_from("<QIHH", device.ram, TABLE + 16) == (0x2000, 512, 3, 2)
    assert len(device.queue.state.free) == SIZE - 1


def test_with_event_idx_only_the_wished_index_needs_a_kick() -> None:
    device = Device()
    state = device.queue.state
    device.queue.add(SEGMENTS, TABLE, ADDR)
    assert device.queue.must_kick()
    assert not device.queue.must_kick()
    struct.pack_into("<H", device.ram, state.used + 4 + 8 * SIZE, 2)
    device.queue.add(SEGMENTS, TABLE, ADDR)
    assert not device.queue.must_kick()
    device.queue.add(SEGMENTS, TABLE, ADDR)
    assert device.queue.must_kick()


def test_asking_for_an_interrupt_says_what_came_meanwhile() -> None:
    device = Device()
    head = device.queue.add(SEGMENTS, TABLE, ADDR)
    assert not device.queue.ask_for_interrupt()
    device.use(head, 513)
    assert device.queue.ask_for_interrupt()


@pytest.mark.parametrize(
    ("head", "written", "jump", "error"),
    [
        (SIZE, 1, 1, QueueError.BAD_ID),
        (0xFFFFFFFF, 1, 1, QueueError.BAD_ID),
        (5, 1, 1, QueueError.NOT_A_HEAD),
        (0, 514, 1, QueueError.USED_LENGTH),
        (0, 1, 2, QueueError.INDEX_JUMP),
        (0, 1, 0xFFFF, QueueError.INDEX_JUMP),
    ],
)
def test_each_lie_has_its_name_and_ends_the_queue(head: int, written: int, jump: int, error: QueueError) -> None:
    device = Device(indirect=False)
    device.queue.add(SEGMENTS)
    device.use(head, written, jump=jump)
    with pytest.raises(QueueBroken) as caught:
        device.queue.take_used()
    assert caught.value.error is error
    with pytest.raises(QueueBroken):
        device.queue.add(SEGMENTS)


def test_a_request_is_finished_once() -> None:
    device = Device()
    first, second = (device.queue.add(SEGMENTS, TABLE, ADDR) for _ in range(2))
    device.use(first, 1)
    device.use(first, 1)
    assert device.queue.take_used() == (first, 1)
    with pytest.raises(QueueBroken, match="not the head"):
        device.queue.take_used()
    assert second in device.queue.state.chains


def test_descriptors_that_the_device_rewrites_are_not_believed() -> None:
    device = Device(indirect=False)
    head = device.queue.add(SEGMENTS)
    state = device.queue.state
    device.ram[state.desc : state.desc + 16 * SIZE] = b"\xff" * 16 * SIZE
    device.use(head, 513)
    assert device.queue.take_used() == (head, 513)
    assert sorted(state.free) == list(range(SIZE))


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=RING, max_size=4096), st.integers(1, SIZE))
def test_whatever_the_device_writes_ends_in_an_answer_or_a_named_error(noise: bytes, n_requests: int) -> None:
    device = Device()
    for _ in range(n_requests):
        device.queue.add(SEGMENTS, TABLE, ADDR)
    state = device.queue.state
    device.ram[state.used : state.used + min(len(noise), 6 + 8 * SIZE)] = noise[: 6 + 8 * SIZE]
    finished = 0
    try:
        while device.queue.take_used() is not None:
            finished += 1
    except QueueBroken as broken:
        assert broken.error.value == state.broken
    assert finished <= n_requests


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300), st.booleans())
def test_indices_run_freely_and_no_descriptor_is_lost(adds: list[bool], indirect: bool) -> None:
    device = Device(indirect=indirect)
    device.queue.state.avail_idx = device.queue.state.last_used = device.queue.state.kicked_idx = 0xFFF0
    device.used_idx = 0xFFF0
    struct.pack_into("<H", device.ram, device.queue.state.used + 2, 0xFFF0)
    open_heads: list[int] = []
    for add in adds:
        if add and device.queue.room_for(3):
            open_heads.append(device.queue.add(SEGMENTS, TABLE, ADDR))
        elif not add and open_heads:
            device.use(open_heads[0], 513)
            assert device.queue.take_used() == (open_heads.pop(0), 513)
    in_use = [index for chain in device.queue.state.chains.values() for index in chain]
    assert sorted(in_use + device.queue.state.free) == list(range(SIZE))


def test_a_driver_that_looks_itself_asks_the_device_for_silence_without_event_idx() -> None:
    device = Device(event_idx=False)
    flags = device.queue.state.avail
    device.queue.do_without_interrupts()
    assert struct.unpack_from("<H", device.ram, flags) == (1,)
    device.queue.ask_for_interrupt()
    assert struct.unpack_from("<H", device.ram, flags) == (0,)


def test_with_event_idx_the_event_stays_behind_until_the_driver_asks() -> None:
    device = Device()
    state = device.queue.state
    head = device.queue.add(SEGMENTS, TABLE, ADDR)
    device.use(head, 513)
    assert device.queue.take_used() == (head, 513)
    device.queue.do_without_interrupts()
    event = state.avail + 4 + 2 * SIZE
    assert (struct.unpack_from("<H", device.ram, event), state.armed) == ((0,), False)
    device.queue.ask_for_interrupt()
    assert (struct.unpack_from("<H", device.ram, event), state.armed) == ((1,), True)
