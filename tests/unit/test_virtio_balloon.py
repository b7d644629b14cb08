"""The balloon through the whole path: board, BAR, rings; and every order of pages against a plain set of them."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from protocol.codes import HCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES
from protocol.startup import PLATFORM_OFFER, DeviceEntry
from services.qemu.ballooned_pages import PAGES_PER_FRAME, BalloonedPages
from services.qemu.board import Board
from services.qemu.testing import TestDriver, TestPort, TestRam, TestRing, board_entry
from services.qemu.virtio_balloon import MAX_STATS, QUEUE_SIZE, VirtioBalloon
from shared.pci import Config
from shared.virtio import DeviceStatus, Feature, feature_mask, has_feature
from shared.virtio_balloon import (
    DEFLATE_QUEUE,
    INFLATE_QUEUE,
    STAT,
    STATS_QUEUE,
    BalloonConfig,
    BalloonFeature,
    StatTag,
)
from shared.virtio_pci import ISR_CONFIG, CommonCfg

N_FRAMES = 64
MEMORY_BYTES = N_FRAMES * PAGE_BYTES
N_PFNS = N_FRAMES * PAGES_PER_FRAME
RINGS, TABLE, DATA = (0x1000, 0x3000, 0x5000), 0x8000, 0x20000
SIZE = 8
BALLOON = DeviceEntry(kind="virtio-balloon")


@dataclass
class Rig:
    """A board with a balloon, and its driver."""

    ram: TestRam
    board: Board
    port: TestPort
    driver: TestDriver
    rings: list[TestRing]

    @property
    def balloon(self) -> VirtioBalloon:
        assert self.board.balloon is not None
        return self.board.balloon

    async def offer(self, index: int, buffers: list[tuple[int, int, bool]]) -> None:
        ring = self.rings[index]
        ring.put_chain(buffers, first=ring.avail_idx % SIZE)
        await self.driver.kick(index)

    async def name(self, index: int, *pfns: int) -> None:
        """One buffer with these page numbers."""
        self.ram.bytes[DATA : DATA + 4 * len(pfns)] = struct.pack(f"<{len(pfns)}I", *pfns)
        await self.offer(index, [(DATA, 4 * len(pfns), False)])

    async def tell_actual(self, n_pages: int) -> None:
        await self.board.mmio_store(self.driver.gpa + 0x2000 + BalloonConfig.ACTUAL, 4, n_pages)

    async def tell_stats(self, *stats: tuple[int, int]) -> None:
        data = b"".join(STAT.pack(*stat) for stat in stats)
        self.ram.bytes[DATA : DATA + len(data)] = data
        await self.offer(STATS_QUEUE, [(DATA, len(data), False)])

    def needs_reset(self) -> bool:
        return bool(self.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET)

    def discarded(self) -> list[int]:
        return [gfn for gfns in self.port.discarded for gfn in gfns]


def pages_of(*gfns: int) -> list[int]:
    """All page numbers of these frames."""
    return [gfn * PAGES_PER_FRAME + page for gfn in gfns for page in range(PAGES_PER_FRAME)]


async def start_driver(rig: Rig, features: int | None = None) -> None:
    assert await rig.driver.negotiate(features)
    rig.rings = [TestRing.at(rig.ram.bytes, SIZE, at) for at in RINGS]
    for index, ring in enumerate(rig.rings):
        rig.ram.bytes[ring.desc : ring.desc + 0x1000] = bytes(0x1000)
        await rig.driver.set_queue(ring, index)
    await rig.driver.go()


MakeRig = Callable[[], Awaitable[Rig]]


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    async with trio.open_nursery() as nursery:

        async def make() -> Rig:
            ram, port = TestRam(MEMORY_BYTES), TestPort()
            board = Board(
                board_entry([], [BALLOON], memory_bytes=MEMORY_BYTES), ram.accessor, {}, port, assign_bars=True
            )
            nursery.start_soon(board.run)
            rig = Rig(ram, board, port, TestDriver(board, board.functions[0]), [])
            await start_driver(rig)
            return rig

        yield make
        nursery.cancel_scope.cancel()


# -- what it is -------------------------------------------------------------------------------------------------------


async def test_it_is_a_modern_balloon_of_class_other_with_statistics(make_rig: MakeRig) -> None:
    rig = await make_rig()
    function = rig.driver.function

    assert function.read_config(Config.VENDOR_ID, 4) == 0x10451AF4
    assert function.read_config(Config.CLASS - 1, 2) == 0x00FF
    offered = await rig.driver.features()
    assert offered & 0xFFFFFF == feature_mask((BalloonFeature.MUST_TELL_HOST, BalloonFeature.STATS_VQ))
    assert not has_feature(offered, Feature.ACCESS_PLATFORM)
    assert rig.driver.load(CommonCfg.NUM_QUEUES) == 3
    assert [queue.max_size for queue in rig.balloon.queues] == [QUEUE_SIZE] * 3


async def test_a_driver_that_passes_plain_page_numbers_is_refused_where_access_platform_is_offered() -> None:
    """As QEMU: Linux's driver clears the bit, since its page numbers are never translated."""
    device = DeviceEntry(kind="virtio-balloon", offer=PLATFORM_OFFER)
    entry, port = board_entry([], [device], memory_bytes=MEMORY_BYTES), TestPort()
    board = Board(entry, TestRam(MEMORY_BYTES).accessor, {}, port, assign_bars=True)
    driver = TestDriver(board, board.functions[0])

    assert not await driver.negotiate(feature_mask((Feature.VERSION_1, BalloonFeature.STATS_VQ)))
    assert [device for device, _ in port.faults] == ["vm1/balloon"]
    assert await driver.negotiate()


# -- pages ------------------------------------------------------------------------------------------------------------


async def test_a_frame_goes_back_when_all_its_pages_are_in_the_balloon(make_rig: MakeRig) -> None:
    rig = await make_rig()
    *some, last = pages_of(5)

    await rig.name(INFLATE_QUEUE, *some)
    assert rig.discarded() == []
    await rig.name(INFLATE_QUEUE, last)

    assert rig.discarded() == [5]
    assert rig.rings[INFLATE_QUEUE].take_used() == [(0, 0), (1, 0)]


async def test_frames_of_one_buffer_go_back_together_whatever_the_order(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.name(INFLATE_QUEUE, *reversed(pages_of(5, 9, 6)))

    assert rig.port.discarded == [[5, 6, 9]]


async def test_a_page_named_twice_counts_once(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.name(INFLATE_QUEUE, *[pages_of(5)[0]] * PAGES_PER_FRAME)
    assert rig.discarded() == []
    await rig.name(INFLATE_QUEUE, *pages_of(5), *pages_of(5))

    assert rig.port.discarded == [[5]]


async def test_what_is_deflated_must_be_inflated_again(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.name(INFLATE_QUEUE, *pages_of(5))

    await rig.name(DEFLATE_QUEUE, pages_of(5)[3])
    await rig.name(INFLATE_QUEUE, pages_of(5)[4])
    assert rig.discarded() == [5]
    await rig.name(INFLATE_QUEUE, pages_of(5)[3])

    assert rig.discarded() == [5, 5]


async def test_deflating_what_is_not_in_the_balloon_changes_nothing(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.name(DEFLATE_QUEUE, *pages_of(5, 6))

    assert not rig.needs_reset()
    assert rig.rings[DEFLATE_QUEUE].take_used() == [(0, 0)]
    await rig.name(INFLATE_QUEUE, *pages_of(5))
    assert rig.discarded() == [5]


async def test_a_list_spread_over_descriptors_is_one_list(make_rig: MakeRig) -> None:
    rig = await make_rig()
    data = struct.pack("<16I", *pages_of(5))
    rig.ram.bytes[DATA : DATA + 7] = data[:7]
    rig.ram.bytes[DATA + 100 : DATA + 157] = data[7:]

    await rig.offer(INFLATE_QUEUE, [(DATA, 7, False), (DATA + 100, 57, False)])

    assert rig.discarded() == [5]


async def test_a_frame_that_kvm_has_no_time_for_is_asked_for_again(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.port.discard_code = HCode.H_BUSY
    await rig.name(INFLATE_QUEUE, *pages_of(5, 6))
    assert rig.rings[INFLATE_QUEUE].take_used() == [(0, 0)]

    rig.port.discard_code = HCode.H_SUCCESS
    await rig.name(DEFLATE_QUEUE, pages_of(6)[0])
    await rig.name(INFLATE_QUEUE, *pages_of(7))
    await rig.name(INFLATE_QUEUE, pages_of(9)[0])

    assert rig.port.discarded == [[5, 6], [5, 7]]


async def test_a_deflation_is_not_acknowledged_while_kvm_takes_the_frame(make_rig: MakeRig) -> None:
    rig = await make_rig()
    taking, taken = trio.Event(), trio.Event()

    async def discard(gfns: list[int]) -> int:
        rig.port.discarded.append(gfns)
        taking.set()
        await taken.wait()
        return HCode.H_SUCCESS

    rig.port.discard = discard  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.name, INFLATE_QUEUE, *pages_of(5))
        await taking.wait()
        nursery.start_soon(rig.name, DEFLATE_QUEUE, *pages_of(5))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.rings[DEFLATE_QUEUE].take_used() == []
        taken.set()

    await rig.board.drained()
    assert rig.rings[DEFLATE_QUEUE].take_used() == [(0, 0)]


async def test_a_driver_that_does_not_promise_to_tell_first_keeps_its_frames(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await start_driver(rig, feature_mask((Feature.VERSION_1, BalloonFeature.STATS_VQ)))

    await rig.name(INFLATE_QUEUE, *pages_of(5))

    assert rig.rings[INFLATE_QUEUE].take_used() == [(0, 0)]
    assert rig.discarded() == []


async def test_a_secure_vm_stops_the_balloon_and_the_operator_is_told_why(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.port.discard_code = HCode.H_PERMISSION

    await rig.name(INFLATE_QUEUE, *pages_of(5))

    assert rig.needs_reset()
    reason = "queue 0: the VM is secure: its pages are not the host's to take"
    assert rig.port.faults == [("vm1/balloon", reason)]
    assert rig.balloon.stopped == rig.balloon.balloon_status().reason == reason
    await rig.name(INFLATE_QUEUE, *pages_of(6))
    assert rig.discarded() == [5]


@pytest.mark.parametrize("index", [INFLATE_QUEUE, DEFLATE_QUEUE])
@pytest.mark.parametrize("pfn", [N_PFNS, N_PFNS + 1, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_a_page_outside_ram_needs_a_reset_and_none_of_its_list_is_taken(
    make_rig: MakeRig, index: int, pfn: int
) -> None:
    rig = await make_rig()

    await rig.name(index, *pages_of(5), pfn)

    assert rig.needs_reset()
    assert rig.discarded() == []
    assert f"page {pfn:#x} of 4 KiB is outside RAM" in rig.port.faults[0][1]


@pytest.mark.parametrize("index", [INFLATE_QUEUE, DEFLATE_QUEUE])
@pytest.mark.parametrize(
    ("buffer", "problem"),
    [
        ((DATA, 63, False), "no list of page numbers"),
        ((DATA, 1, False), "no list of page numbers"),
        ((1 << 40, 64, False), "outside RAM"),
        ((0, 4 * N_PFNS + 4, False), "more than there are pages"),
        ((0, 0xFFFFFFF8, False), "more than there are pages"),
    ],
)
async def test_what_is_no_list_of_pages_needs_a_reset(
    make_rig: MakeRig, index: int, buffer: tuple[int, int, bool], problem: str
) -> None:
    rig = await make_rig()

    await rig.offer(index, [buffer])

    assert rig.needs_reset()
    assert problem in rig.port.faults[0][1]
    assert rig.discarded() == []


@pytest.mark.parametrize("buffer", [(DATA, 64, True), (DATA, 0, False)])
async def test_a_buffer_without_page_numbers_is_used_and_does_nothing(
    make_rig: MakeRig, buffer: tuple[int, int, bool]
) -> None:
    rig = await make_rig()

    await rig.offer(INFLATE_QUEUE, [buffer])

    assert rig.rings[INFLATE_QUEUE].take_used() == [(0, 0)]
    assert not rig.needs_reset()


async def test_all_of_ram_in_one_buffer_leaves_other_tasks_their_turn(make_rig: MakeRig) -> None:
    rig = await make_rig()
    other_turns = 0

    async def count() -> None:
        nonlocal other_turns
        while True:
            other_turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        # The list lies in pages that it names itself: nothing here takes their content away.
        await rig.name(INFLATE_QUEUE, *range(N_PFNS))
        nursery.cancel_scope.cancel()

    assert rig.discarded() == list(range(N_FRAMES))
    assert other_turns >= len(rig.port.discarded) >= 1


# -- target and actual ------------------------------------------------------------------------------------------------


async def test_a_target_is_told_by_a_configuration_interrupt(make_rig: MakeRig) -> None:
    rig = await make_rig()
    generation = rig.driver.load(CommonCfg.CONFIG_GENERATION)
    rig.driver.isr()

    rig.balloon.set_target(MEMORY_BYTES - 3 * PAGE_BYTES)

    assert rig.driver.isr() == ISR_CONFIG
    assert rig.driver.config(BalloonConfig.NUM_PAGES, 4) == 3 * PAGES_PER_FRAME
    assert rig.driver.load(CommonCfg.CONFIG_GENERATION) != generation
    assert rig.balloon.target_bytes == MEMORY_BYTES - 3 * PAGE_BYTES


@pytest.mark.parametrize(
    ("target", "num_pages"),
    [(MEMORY_BYTES, 0), (MEMORY_BYTES + 1, 0), (1 << 70, 0), (1, N_PFNS - 1), (MEMORY_BYTES - 1, 0)],
)
async def test_a_target_is_of_whole_pages_and_no_more_than_there_is(
    make_rig: MakeRig, target: int, num_pages: int
) -> None:
    rig = await make_rig()

    rig.balloon.set_target(target)

    assert rig.driver.config(BalloonConfig.NUM_PAGES, 4) == num_pages


async def test_the_driver_says_how_many_pages_there_are_and_the_machine_hears_of_changes(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.tell_actual(32)
    await rig.tell_actual(32)
    await rig.tell_actual(16)

    assert rig.driver.config(BalloonConfig.ACTUAL, 4) == 16
    assert rig.port.actual_bytes == [MEMORY_BYTES - 2 * PAGE_BYTES, MEMORY_BYTES - PAGE_BYTES]


async def test_an_actual_beyond_all_memory_leaves_the_guest_none(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.tell_actual(0xFFFFFFFF)

    assert rig.balloon.actual_bytes == 0


@pytest.mark.parametrize(("offset", "n_bytes"), [(0, 4), (0, 8), (4, 1), (4, 2), (4, 8), (6, 2), (8, 4), (12, 4)])
async def test_only_actual_is_the_drivers_to_write(make_rig: MakeRig, offset: int, n_bytes: int) -> None:
    rig = await make_rig()

    await rig.board.mmio_store(rig.driver.gpa + 0x2000 + offset, n_bytes, (1 << 64) - 1)

    assert rig.driver.config(0, 8) == 0
    assert rig.driver.config(8, 8) == 0


async def test_a_reset_empties_the_balloon_and_keeps_the_target(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.balloon.set_target(MEMORY_BYTES - PAGE_BYTES)
    await rig.name(INFLATE_QUEUE, *pages_of(5)[1:])
    await rig.tell_actual(15)

    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    await start_driver(rig)
    await rig.name(INFLATE_QUEUE, pages_of(5)[0])

    assert rig.discarded() == []
    assert rig.port.actual_bytes[-1] == rig.balloon.actual_bytes == MEMORY_BYTES
    assert rig.driver.config(BalloonConfig.NUM_PAGES, 4) == PAGES_PER_FRAME


# -- statistics -------------------------------------------------------------------------------------------------------


async def test_statistics_are_kept_and_the_buffer_waits_until_somebody_asks(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.tell_stats((StatTag.FREE_MEMORY, 1 << 20), (StatTag.TOTAL_MEMORY, 1 << 21), (999, 7))
    assert rig.balloon.balloon_status().stats == {"free_memory": 1 << 20, "total_memory": 1 << 21}
    assert rig.rings[STATS_QUEUE].take_used() == []
    await rig.balloon.ask_stats(0)
    await rig.board.drained()

    assert rig.rings[STATS_QUEUE].take_used() == [(0, 0)]


async def test_asking_waits_for_the_drivers_answer(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.tell_stats((StatTag.FREE_MEMORY, 1))

    async with trio.open_nursery() as nursery:
        with trio.fail_after(5):
            nursery.start_soon(rig.balloon.ask_stats, 60)
            await trio.testing.wait_all_tasks_blocked()
            await rig.tell_stats((StatTag.FREE_MEMORY, 2))

    assert rig.balloon.balloon_status().stats == {"free_memory": 2}


async def test_asking_a_driver_without_statistics_returns_at_once(make_rig: MakeRig) -> None:
    rig = await make_rig()

    with trio.fail_after(5):
        await rig.balloon.ask_stats(60)

    assert rig.balloon.balloon_status().stats == {}


async def test_a_second_statistics_buffer_gives_the_first_one_back(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.tell_stats((StatTag.FREE_MEMORY, 1))
    await rig.tell_stats((StatTag.FREE_MEMORY, 2))

    assert rig.rings[STATS_QUEUE].take_used() == [(0, 0)]
    assert rig.balloon.balloon_status().stats == {"free_memory": 2}


@pytest.mark.parametrize("n_bytes", [0, 1, 9, 11, MAX_STATS * 10 + 5, 1 << 20])
async def test_statistics_of_any_length_are_taken(make_rig: MakeRig, n_bytes: int) -> None:
    rig = await make_rig()

    await rig.offer(STATS_QUEUE, [(DATA, n_bytes, False)])

    assert not rig.needs_reset()
    assert len(rig.balloon.balloon_status().stats) <= len(StatTag)


# -- save -------------------------------------------------------------------------------------------------------------


async def test_a_balloon_survives_a_save(make_rig: MakeRig) -> None:
    rig, other = await make_rig(), await make_rig()
    rig.balloon.set_target(MEMORY_BYTES // 2)
    await rig.name(INFLATE_QUEUE, *pages_of(5)[1:])
    rig.port.discard_code = HCode.H_BUSY
    await rig.name(INFLATE_QUEUE, *pages_of(9))
    await rig.tell_actual(31)
    await rig.tell_stats((StatTag.FREE_MEMORY, 7))

    other.ram.bytes[:] = rig.ram.bytes
    other.board.load(rig.board.save())
    other.rings = [TestRing(other.ram.bytes, *_places(ring)) for ring in rig.rings]

    assert other.balloon.balloon_status() == rig.balloon.balloon_status()
    assert other.port.actual_bytes == []
    await other.name(INFLATE_QUEUE, pages_of(5)[0])
    assert other.port.discarded == [[5, 9]]
    await other.balloon.ask_stats(0)
    await other.board.drained()
    assert other.rings[STATS_QUEUE].take_used() == [(0, 0)]


def _places(ring: TestRing) -> tuple[int, int, int, int, int, int]:
    return ring.size, ring.desc, ring.driver, ring.device, ring.avail_idx, ring.used_idx()


async def test_a_saved_balloon_is_not_loaded_into_another_machine(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.board.drained()
    state = rig.board.save()
    state.balloon = None

    with pytest.raises(ValueError, match="other devices"):
        rig.board.load(state)


# -- any order of pages -----------------------------------------------------------------------------------------------

FEW = 3
"""Frames: few, so that some are filled."""
PFNS = st.lists(st.integers(0, FEW * PAGES_PER_FRAME + 2), max_size=3 * PAGES_PER_FRAME)
WHOLE = st.integers(0, FEW - 1).map(lambda gfn: pages_of(gfn))


@given(orders=st.lists(st.tuples(st.booleans(), st.one_of(PFNS, WHOLE)), max_size=12))
def test_whatever_goes_in_and_out_a_frame_is_whole_when_all_its_pages_are_in(
    orders: list[tuple[bool, list[int]]],
) -> None:
    pages, inside = BalloonedPages(FEW), set[int]()

    for goes_in, pfns in orders:
        before = pages.save()
        if any(pfn >= FEW * PAGES_PER_FRAME for pfn in pfns):
            with pytest.raises(GuestFault):
                pages.put(pfns) if goes_in else pages.take(pfns)
            assert pages.save() == before
        elif goes_in:
            inside.update(pfns)
            touched = {pfn // PAGES_PER_FRAME for pfn in pfns}
            assert pages.put(pfns) == sorted(gfn for gfn in touched if inside.issuperset(pages_of(gfn)))
        else:
            inside.difference_update(pfns)
            pages.take(pfns)

    copy = BalloonedPages(FEW)
    copy.load(pages.save())
    for gfn in range(FEW):
        assert copy.is_whole(gfn) is pages.is_whole(gfn) is inside.issuperset(pages_of(gfn))


def test_a_balloon_of_another_size_is_not_loaded() -> None:
    with pytest.raises(ValueError, match="2 frames, this VM has 3"):
        BalloonedPages(3).load(BalloonedPages(2).save())
