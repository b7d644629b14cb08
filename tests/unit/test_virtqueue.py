"""The device's side of a split ring, against correct and hostile drivers (S5)."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES
from services.qemu.dma import BypassSpace
from services.qemu.testing import Descriptor, TestRam, TestRing, chained
from services.qemu.virtqueue import RingError, RingFault, Virtqueue
from shared.host_view import HostState
from shared.virtio import Feature, feature_mask
from shared.vring import AVAIL_NO_INTERRUPT, USED_NO_NOTIFY, DescFlag, avail_event, desc_bytes

SIZE = 8
RING = 0x1000
TABLE = 0x4000
DATA = 0x8000
N, W, IND = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT
ALL = feature_mask((Feature.VERSION_1, Feature.EVENT_IDX, Feature.INDIRECT_DESC))
PLAIN = feature_mask((Feature.VERSION_1,))


def make(features: int = ALL, size: int = SIZE) -> tuple[TestRam, TestRing, Virtqueue]:
    ram = TestRam(4 * PAGE_BYTES)
    ring = TestRing.at(ram.bytes, size, RING)
    queue = Virtqueue(0, 256)
    queue.state = ring.settings()
    queue.start(BypassSpace(ram.accessor), features)
    return ram, ring, queue


async def fault_of(queue: Virtqueue) -> RingFault:
    with pytest.raises(RingError) as caught:
        await queue.pop()
    return caught.value.fault


async def test_an_empty_ring_has_nothing_to_pop() -> None:
    _, _, queue = make()

    assert await queue.pop() is None


async def test_a_direct_chain_is_split_into_readable_and_writable() -> None:
    _, ring, queue = make()
    ring.put_chain([(DATA, 16, False), (DATA + 64, 512, False), (DATA + 1024, 1, True)], first=3)

    chain = await queue.pop()

    assert chain is not None
    assert chain.head == 3
    assert chain.readable == [(DATA, 16), (DATA + 64, 512)]
    assert chain.writable == [(DATA + 1024, 1)]


async def test_an_indirect_chain_is_the_same_as_a_direct_one() -> None:
    _, ring, queue = make()
    ring.put_indirect([(DATA, 16, False), (DATA + 1024, 1, True)], TABLE)

    chain = await queue.pop()

    assert chain is not None
    assert (chain.readable, chain.writable) == ([(DATA, 16)], [(DATA + 1024, 1)])


async def test_an_indirect_table_may_end_a_direct_chain() -> None:
    _, ring, queue = make()
    ring.put_indirect([(DATA + 16, 16, False), (DATA + 1024, 1, True)], TABLE, head=5)
    ring.put_descriptors([(DATA, 16, N, 5)], first=0)
    ring.set_avail_idx(0)
    ring.avail_idx = 0
    ring.offer(0)

    chain = await queue.pop()

    assert chain is not None
    assert (chain.readable_bytes, chain.writable_bytes) == (32, 1)


async def test_used_elements_are_published_in_order_across_the_wrap_of_the_index() -> None:
    _, ring, queue = make()
    queue.state.next_avail = queue.state.next_used = queue.state.signalled_used = 0xFFFE
    ring.avail_idx = ring.seen_used = 0xFFFE

    for n_bytes in range(5):
        ring.put_chain([(DATA, 16, True)], first=n_bytes)
        chain = await queue.pop()
        assert chain is not None
        await queue.push(chain.head, n_bytes)

    ring.seen_used = 0xFFFE
    assert ring.take_used() == [(n, n) for n in range(5)]
    assert ring.used_idx() == 3


async def test_event_index_asks_for_an_interrupt_only_when_passed() -> None:
    _, ring, queue = make()
    ring.set_used_event(2)
    wishes = []
    for head in range(4):
        ring.put_chain([(DATA, 16, True)], first=head)
        await queue.pop()
        await queue.push(head, 0)
        wishes.append(await queue.wants_interrupt())

    assert wishes == [False, False, True, False]


async def test_several_pushes_make_one_decision() -> None:
    _, ring, queue = make()
    ring.set_used_event(1)
    for head in range(3):
        ring.put_chain([(DATA, 16, True)], first=head)
        await queue.pop()
        await queue.push(head, 0)

    assert await queue.wants_interrupt()
    assert not await queue.wants_interrupt()


async def test_no_interrupt_flag_is_respected_without_event_index() -> None:
    _, ring, queue = make(PLAIN)
    ring.put_chain([(DATA, 16, True)])
    await queue.pop()
    ring.set_avail_flags(AVAIL_NO_INTERRUPT)
    await queue.push(0, 0)
    assert not await queue.wants_interrupt()

    ring.set_avail_flags(0)
    ring.put_chain([(DATA, 16, True)])
    await queue.pop()
    await queue.push(0, 0)

    assert await queue.wants_interrupt()


async def test_notifications_are_paused_by_flag_and_resumed_by_event_index() -> None:
    _, plain_ring, plain = make(PLAIN)
    await plain.pause_notifications()
    assert plain_ring.u16(plain_ring.device) == USED_NO_NOTIFY
    assert not await plain.resume_notifications()
    assert plain_ring.u16(plain_ring.device) == 0

    _, ring, queue = make()
    ring.put_chain([(DATA, 16, True)])
    assert await queue.resume_notifications()
    await queue.pop()
    assert not await queue.resume_notifications()
    assert ring.u16(ring.device + avail_event(SIZE)) == 1


async def test_a_ring_in_absent_frames_is_fetched() -> None:
    ram, ring, queue = make()
    ring.put_chain([(DATA, 16, True)])
    ram.view[0] = HostState.ABSENT

    assert await queue.pop() is not None
    assert ram.wanted == [0]


@pytest.mark.parametrize("idx", [SIZE + 1, 0x8000, 0xFFFF])
async def test_an_index_jump_is_refused(idx: int) -> None:
    _, ring, queue = make()
    ring.set_avail_idx(idx)

    assert await fault_of(queue) is RingFault.INDEX_JUMP


async def test_a_head_outside_the_table_is_refused() -> None:
    _, ring, queue = make()
    ring.offer(SIZE)

    assert await fault_of(queue) is RingFault.HEAD_OUT_OF_RANGE


async def test_a_head_in_flight_is_refused() -> None:
    _, ring, queue = make()
    ring.put_chain([(DATA, 16, True)])
    await queue.pop()
    ring.offer(0)

    assert await fault_of(queue) is RingFault.HEAD_IN_FLIGHT


HOSTILE_DIRECT: dict[str, tuple[list[Descriptor], RingFault]] = {
    "loop": ([(DATA, 16, N, 1), (DATA, 16, N, 0)], RingFault.CHAIN_TOO_LONG),
    "self loop": ([(DATA, 0, N, 0)], RingFault.CHAIN_TOO_LONG),
    "next outside": ([(DATA, 16, N, SIZE)], RingFault.NEXT_OUT_OF_RANGE),
    "4 GiB": ([(DATA, 0xFFFFFFFF, N, 1), (DATA, 1, 0, 0)], RingFault.CHAIN_TOO_LARGE),
    "readable last": ([(DATA, 16, N | W, 1), (DATA, 16, 0, 0)], RingFault.READABLE_AFTER_WRITABLE),
    "readable after empty writable": ([(DATA, 0, N | W, 1), (DATA, 16, 0, 0)], RingFault.READABLE_AFTER_WRITABLE),
    "indirect with next": ([(TABLE, 16, IND | N, 1)], RingFault.INDIRECT_WITH_NEXT),
    "indirect odd": ([(TABLE, 24, IND, 0)], RingFault.INDIRECT_BAD_LENGTH),
    "indirect empty": ([(TABLE, 0, IND, 0)], RingFault.INDIRECT_BAD_LENGTH),
    "indirect too long": ([(TABLE, 16 * (SIZE + 1), IND, 0)], RingFault.INDIRECT_BAD_LENGTH),
    "indirect 4 GiB": ([(TABLE, 0xFFFFFFF0, IND, 0)], RingFault.INDIRECT_BAD_LENGTH),
}


@pytest.mark.parametrize("name", HOSTILE_DIRECT)
async def test_a_hostile_direct_chain_is_refused_by_name(name: str) -> None:
    descriptors, fault = HOSTILE_DIRECT[name]
    _, ring, queue = make()
    ring.put_descriptors(descriptors)
    ring.offer(0)

    assert await fault_of(queue) is fault


HOSTILE_INDIRECT: dict[str, tuple[list[Descriptor], RingFault]] = {
    "nested": ([(TABLE, 16, IND, 0)], RingFault.INDIRECT_NESTED),
    "loop": ([(DATA, 16, N, 1), (DATA, 16, N, 0)], RingFault.CHAIN_TOO_LONG),
    "next outside": ([(DATA, 16, N, 2), (DATA, 16, 0, 0)], RingFault.NEXT_OUT_OF_RANGE),
}


@pytest.mark.parametrize("name", HOSTILE_INDIRECT)
async def test_a_hostile_indirect_table_is_refused_by_name(name: str) -> None:
    descriptors, fault = HOSTILE_INDIRECT[name]
    ram, ring, queue = make()
    table = TestRing(ram.bytes, SIZE, TABLE, 0, 0)
    table.put_descriptors(descriptors)
    ring.put_descriptors([(TABLE, desc_bytes(len(descriptors)), IND, 0)])
    ring.offer(0)

    assert await fault_of(queue) is fault


async def test_an_indirect_descriptor_needs_the_feature() -> None:
    _, ring, queue = make(PLAIN)
    ring.put_indirect([(DATA, 16, False)], TABLE)

    assert await fault_of(queue) is RingFault.INDIRECT_NOT_NEGOTIATED


@pytest.mark.parametrize(("field", "value"), [("desc", RING + 8), ("driver", RING + 1), ("device", RING + 2)])
def test_a_misaligned_ring_does_not_start(field: str, value: int) -> None:
    ram, ring, queue = make()
    settings_ = ring.settings()
    setattr(settings_, field, value)
    queue.state = settings_

    with pytest.raises(RingError) as caught:
        queue.start(BypassSpace(ram.accessor), ALL)
    assert caught.value.fault is RingFault.MISALIGNED


@pytest.mark.parametrize("size", [0, 3, 512, 65536])
def test_a_size_that_was_not_offered_does_not_start(size: int) -> None:
    ram, ring, queue = make()
    queue.state = ring.settings()
    queue.state.size = size

    with pytest.raises(RingError) as caught:
        queue.start(BypassSpace(ram.accessor), ALL)
    assert caught.value.fault is RingFault.BAD_QUEUE_SIZE


@pytest.mark.parametrize("field", ["desc", "driver", "device"])
def test_a_ring_outside_ram_does_not_start(field: str) -> None:
    ram, ring, queue = make()
    queue.state = ring.settings()
    setattr(queue.state, field, 4 * PAGE_BYTES - 16)

    with pytest.raises(GuestFault):
        queue.start(BypassSpace(ram.accessor), ALL)


descriptor = st.tuples(
    st.one_of(st.integers(0, 4 * PAGE_BYTES), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 256), st.integers(0, 0xFFFFFFFF)),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.lists(descriptor, min_size=SIZE, max_size=SIZE),
    indirect=st.lists(descriptor, min_size=1, max_size=SIZE),
    heads=st.lists(st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)), min_size=SIZE, max_size=SIZE),
    idx=st.one_of(st.integers(0, SIZE + 1), st.integers(0, 0xFFFF)),
    event=st.integers(0, 0xFFFF),
)
async def test_any_ring_ends_in_chains_within_its_bounds_or_a_guest_fault(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    idx: int,
    event: int,
) -> None:
    ram, ring, queue = make()
    ring.put_descriptors(table)
    TestRing(ram.bytes, SIZE, TABLE, 0, 0).put_descriptors(indirect)
    for head in heads:
        ring.offer(head)
    ring.set_avail_idx(idx)
    ring.set_used_event(event)

    popped = 0
    try:
        while (chain := await queue.pop()) is not None:
            popped += 1
            assert len(chain.readable) + len(chain.writable) <= SIZE
            assert chain.readable_bytes + chain.writable_bytes < 1 << 32
            await queue.push(chain.head, 0)
            await queue.wants_interrupt()
    except GuestFault:
        pass
    assert popped <= min(idx, SIZE)


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20), st.booleans()), min_size=1, max_size=SIZE))
async def test_chains_of_a_correct_driver_come_out_as_they_went_in(buffers: list[tuple[int, int, bool]]) -> None:
    buffers = sorted(buffers, key=lambda buffer: buffer[2])
    _, ring, queue = make()
    ring.put_chain(buffers)

    chain = await queue.pop()

    assert chain is not None
    assert chain.readable == [(address, n) for address, n, writable in buffers if not writable]
    assert chain.writable == [(address, n) for address, n, writable in buffers if writable]
    assert len(chained(buffers, 0)) == len(buffers)
