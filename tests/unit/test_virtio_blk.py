"""The block device through its whole path: board, bridge, BAR, ring, image."""

import hashlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.trace.events import EventKind
from protocol.geometry import PAGE_BYTES
from protocol.startup import NO_OFFER, PLATFORM_OFFER, DiskEntry, DmaOffer, VmEntry
from services.qemu.board import Board
from services.qemu.segments import pieces, split, total_bytes
from services.qemu.testing import TestDriver, TestPort, TestRam, TestRing, board_entry
from services.qemu.virtio_blk import VirtioBlk
from services.runtime.cause import CAUSE
from shared.host_view import HostState
from shared.tce import TcePermission, TceTable, tce
from shared.virtio import DeviceStatus, Feature, has_feature
from shared.virtio_blk import (
    BARRIER,
    RANGE,
    RANGE_UNMAP,
    REQUEST_HEADER,
    BlkConfig,
    BlkFeature,
    BlkRequest,
    BlkStatus,
)
from shared.virtio_pci import CommonCfg
from tests.unit.trace_rig import LPID, Recording, events_of

MIB = 1 << 20
RING, HEADER, STATUS, DATA = 0x1000, 0x10000, 0x18000, 0x20000
UNSET = 0xEE


def vm_entry(*, readonly: bool = False, offer: DmaOffer = NO_OFFER, time: str = "instructions") -> VmEntry:
    disk = DiskEntry(name="disk0", path="", readonly=readonly)
    return board_entry([disk], memory_bytes=64 * PAGE_BYTES, time=time, offer=offer)


@dataclass
class Rig:
    """A board with one disk, its driver, and the image."""

    ram: TestRam
    board: Board
    port: TestPort
    driver: TestDriver
    ring: TestRing
    image: Path

    @property
    def blk(self) -> VirtioBlk:
        device = self.driver.function.device
        assert isinstance(device, VirtioBlk)
        return device

    def content(self) -> bytes:
        """The whole image as it is now."""
        return self.image.read_bytes()

    def header(self, kind: int, sector: int, slot: int = 0) -> tuple[int, int, bool]:
        at = HEADER + 16 * slot
        self.ram.bytes[at : at + 16] = REQUEST_HEADER.pack(kind, 0, sector)
        return at, 16, False

    async def request(self, kind: int, sector: int, data: list[tuple[int, int, bool]], slot: int = 0) -> int:
        """One request with its buffers; its status."""
        self.ram.bytes[STATUS + slot] = UNSET
        chain = [self.header(kind, sector, slot), *data, (STATUS + slot, 1, True)]
        self.ring.put_chain(chain, first=0)
        await self.driver.kick()
        await self.board.drained()
        assert [head for head, _ in self.ring.take_used()] == [0]
        return self.ram.bytes[STATUS + slot]

    async def ready(self, features: int | None = None) -> None:
        assert await self.driver.negotiate(features)
        await self.driver.set_queue(self.ring)
        await self.driver.go()


MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make_rig(tmp_path: Path) -> AsyncIterator[MakeRig]:
    numbers, fds = itertools.count(), list[int]()
    async with trio.open_nursery() as nursery:

        async def make(entry: VmEntry | None = None, *, go: bool = True) -> Rig:
            entry = entry or vm_entry()
            image = tmp_path / f"disk{next(numbers)}.img"
            image.write_bytes(os.urandom(4 * MIB))
            ram, port = TestRam(entry.memory_bytes), TestPort()
            fds.append(fd := os.open(image, os.O_RDONLY if entry.disks[0].readonly else os.O_RDWR))
            board = Board(entry, ram.accessor, {"disk0": fd}, port, assign_bars=True)
            port.board = board
            nursery.start_soon(board.run)
            driver = TestDriver(board, board.functions[0])
            rig = Rig(ram, board, port, driver, TestRing.at(ram.bytes, 64, RING), image)
            if go:
                await rig.ready()
            return rig

        yield make
        nursery.cancel_scope.cancel()
    for fd in fds:
        os.close(fd)


async def test_configuration_tells_capacity_and_limits(make_rig: MakeRig) -> None:
    driver = (await make_rig()).driver

    assert driver.config(BlkConfig.CAPACITY, 8) == 4 * MIB // 512
    assert driver.config(BlkConfig.BLK_SIZE, 4) == 512
    assert driver.config(BlkConfig.NUM_QUEUES, 2) == 1
    assert driver.config(BlkConfig.WRITE_ZEROES_MAY_UNMAP, 1) == 1
    assert driver.config(0x800, 4) == 0


async def test_reads_whole_disk(make_rig: MakeRig) -> None:
    rig = await make_rig()
    digest = hashlib.sha256()
    for start in range(0, 4 * MIB, 256 * 1024):
        status = await rig.request(BlkRequest.IN, start // 512, [(DATA, 256 * 1024, True)])
        assert status == BlkStatus.OK
        digest.update(rig.ram.bytes[DATA : DATA + 256 * 1024])

    assert digest.digest() == hashlib.sha256(rig.content()).digest()


async def test_a_write_is_in_the_image_after_flush(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.ram.bytes[DATA : DATA + 1024] = os.urandom(1024)

    assert await rig.request(BlkRequest.OUT, 9, [(DATA, 512, False), (DATA + 512, 512, False)]) == BlkStatus.OK
    assert await rig.request(BlkRequest.FLUSH, 0, []) == BlkStatus.OK

    assert rig.content()[9 * 512 : 11 * 512] == rig.ram.bytes[DATA : DATA + 1024]


async def test_a_legacy_driver_s_barrier_bit_changes_nothing(make_rig: MakeRig) -> None:
    rig = await make_rig()
    before = rig.content()

    assert await rig.request(BlkRequest.IN | BARRIER, 1, [(DATA, 512, True)]) == BlkStatus.OK
    assert rig.ram.bytes[DATA : DATA + 512] == before[512:1024]
    assert await rig.request(BlkRequest.OUT | BARRIER, 3, [(DATA, 512, False)]) == BlkStatus.OK
    assert rig.content()[1536:2048] == before[512:1024]


async def test_framing_does_not_matter(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.ram.bytes[HEADER : HEADER + 16] = REQUEST_HEADER.pack(BlkRequest.IN, 0, 3)
    rig.ring.put_chain([(HEADER, 5, False), (HEADER + 5, 11, False), (DATA, 100, True), (DATA + 100, 413, True)])

    await rig.driver.kick()

    assert rig.ring.take_used() == [(0, 513)]
    assert rig.ram.bytes[DATA : DATA + 512] == rig.content()[3 * 512 : 4 * 512]
    assert rig.ram.bytes[DATA + 512] == BlkStatus.OK


async def test_absent_frames_are_fetched_before_data_lands(make_rig: MakeRig) -> None:
    rig = await make_rig()
    gfn = DATA // PAGE_BYTES
    rig.ram.view[gfn] = HostState.ABSENT

    assert await rig.request(BlkRequest.IN, 0, [(DATA, 4096, True)]) == BlkStatus.OK

    assert gfn in rig.ram.wanted
    assert rig.ram.bytes[DATA : DATA + 4096] == rig.content()[:4096]


async def test_a_large_request_is_served_in_pieces(make_rig: MakeRig) -> None:
    rig = await make_rig()

    assert await rig.request(BlkRequest.IN, 1, [(DATA, 3 * MIB, True)]) == BlkStatus.OK

    assert rig.ram.bytes[DATA : DATA + 3 * MIB] == rig.content()[512 : 512 + 3 * MIB]


async def test_get_id_is_the_disk_s_name(make_rig: MakeRig) -> None:
    rig = await make_rig()

    assert await rig.request(BlkRequest.GET_ID, 0, [(DATA, 20, True)]) == BlkStatus.OK

    assert bytes(rig.ram.bytes[DATA : DATA + 20]) == b"disk0".ljust(20, b"\0")


async def test_zeroes_and_discard_change_only_their_range(make_rig: MakeRig) -> None:
    rig = await make_rig()
    before = rig.content()
    rig.ram.bytes[DATA : DATA + 32] = RANGE.pack(8, 16, RANGE_UNMAP) + RANGE.pack(100, 1, 0)

    assert await rig.request(BlkRequest.WRITE_ZEROES, 0, [(DATA, 32, False)]) == BlkStatus.OK
    rig.ram.bytes[DATA : DATA + 16] = RANGE.pack(2048, 256, 0)
    assert await rig.request(BlkRequest.DISCARD, 0, [(DATA, 16, False)]) == BlkStatus.OK

    after = rig.content()
    assert not any(after[8 * 512 : 24 * 512]) and not any(after[100 * 512 : 101 * 512])
    assert after[: 8 * 512] == before[: 8 * 512]
    assert after[101 * 512 : 2048 * 512] == before[101 * 512 : 2048 * 512]
    assert after[2304 * 512 :] == before[2304 * 512 :]


REFUSED = {
    "read past the end": (BlkRequest.IN, 8191, (DATA, 1024, True), BlkStatus.IOERR),
    "read far past the end": (BlkRequest.IN, (1 << 64) - 1, (DATA, 512, True), BlkStatus.IOERR),
    "read of part of a sector": (BlkRequest.IN, 0, (DATA, 100, True), BlkStatus.IOERR),
    "write past the end": (BlkRequest.OUT, 8192, (DATA, 512, False), BlkStatus.IOERR),
    "unknown type": (99, 0, (DATA, 512, True), BlkStatus.UNSUPP),
    "secure erase": (BlkRequest.SECURE_ERASE, 0, (DATA, 16, False), BlkStatus.UNSUPP),
    "range of odd length": (BlkRequest.DISCARD, 0, (DATA, 17, False), BlkStatus.IOERR),
    "no range": (BlkRequest.DISCARD, 0, (DATA, 0, False), BlkStatus.IOERR),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_bad_request_is_refused_and_the_device_goes_on(make_rig: MakeRig, name: str) -> None:
    kind, sector, data, status = REFUSED[name]
    rig = await make_rig()
    before = rig.content()

    assert await rig.request(kind, sector, [data]) == status

    assert rig.content() == before
    assert await rig.request(BlkRequest.IN, 0, [(DATA, 512, True)]) == BlkStatus.OK
    assert not rig.port.faults


@pytest.mark.parametrize(
    ("kind", "entry", "status"),
    [
        (BlkRequest.DISCARD, RANGE.pack(0, 1, RANGE_UNMAP), BlkStatus.UNSUPP),
        (BlkRequest.WRITE_ZEROES, RANGE.pack(0, 1, 2), BlkStatus.UNSUPP),
        (BlkRequest.WRITE_ZEROES, RANGE.pack(8191, 2, 0), BlkStatus.IOERR),
        (BlkRequest.DISCARD, RANGE.pack(0, 0xFFFFFFFF, 0), BlkStatus.IOERR),
    ],
)
async def test_a_bad_range_is_refused_before_anything_changes(
    make_rig: MakeRig, kind: BlkRequest, entry: bytes, status: BlkStatus
) -> None:
    rig = await make_rig()
    before = rig.content()
    rig.ram.bytes[DATA : DATA + 32] = RANGE.pack(16, 8, 0) + entry

    assert await rig.request(kind, 0, [(DATA, 32, False)]) == status
    assert rig.content() == before


async def test_a_refused_read_reports_zeros_and_no_old_bytes(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.ram.bytes[DATA : DATA + 512] = b"x" * 512
    chain = [rig.header(BlkRequest.IN, 1 << 40), (DATA, 512, True), (STATUS, 1, True)]
    rig.ring.put_chain(chain)

    await rig.driver.kick()

    assert rig.ring.take_used() == [(0, 513)]
    assert not any(rig.ram.bytes[DATA : DATA + 512])


async def test_a_readonly_disk_offers_ro_and_refuses_writes(make_rig: MakeRig) -> None:
    rig = await make_rig(vm_entry(readonly=True))
    before = rig.content()

    assert has_feature(await rig.driver.features(), BlkFeature.RO)
    assert await rig.request(BlkRequest.OUT, 0, [(DATA, 512, False)]) == BlkStatus.IOERR
    assert await rig.request(BlkRequest.DISCARD, 0, [(DATA, 16, False)]) == BlkStatus.UNSUPP
    assert await rig.request(BlkRequest.IN, 0, [(DATA, 512, True)]) == BlkStatus.OK
    assert rig.content() == before


async def test_what_the_host_refuses_is_ioerr_and_one_line(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig()

    async def full(offset: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rig.blk.disk, "write", full)

    assert await rig.request(BlkRequest.OUT, 5, [(DATA, 512, False)]) == BlkStatus.IOERR
    assert rig.port.io_errors == [("vm1/disk0", "OUT at sector 5: No space left on device")]


async def test_without_flush_a_write_is_stable_when_it_ends(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig(go=False)
    flushes = []

    async def flush() -> None:
        flushes.append(rig.content()[:512])

    monkeypatch.setattr(rig.blk.disk, "flush", flush)
    await rig.ready(1 << Feature.VERSION_1)
    rig.ram.bytes[DATA : DATA + 512] = b"s" * 512

    await rig.request(BlkRequest.OUT, 0, [(DATA, 512, False)])

    assert flushes == [b"s" * 512]


async def test_requests_end_in_the_order_of_the_host(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig(vm_entry(time="wall"))
    gate = trio.Event()

    async def slow_flush() -> None:
        await gate.wait()

    monkeypatch.setattr(rig.blk.disk, "flush", slow_flush)
    rig.ring.put_chain([rig.header(BlkRequest.FLUSH, 0, 0), (STATUS, 1, True)], first=0)
    rig.ring.put_chain([rig.header(BlkRequest.IN, 0, 1), (DATA, 512, True), (STATUS + 1, 1, True)], first=2)
    await rig.driver.kick()
    await trio.testing.wait_all_tasks_blocked()

    assert [head for head, _ in rig.ring.take_used()] == [2]
    gate.set()
    await rig.board.drained()

    assert [head for head, _ in rig.ring.take_used()] == [0]


async def test_a_reset_waits_for_open_requests_and_forgets_them(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make_rig(vm_entry(time="wall"))
    gate = trio.Event()

    async def slow_flush() -> None:
        await gate.wait()

    monkeypatch.setattr(rig.blk.disk, "flush", slow_flush)
    rig.ring.put_chain([rig.header(BlkRequest.FLUSH, 0), (STATUS, 1, True)])
    await rig.driver.kick()
    await trio.testing.wait_all_tasks_blocked()

    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.DRIVER_OK
    gate.set()
    await rig.board.drained()

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) == 0
    assert rig.ring.take_used() == []
    rig.ring = TestRing.at(rig.ram.bytes, 64, RING + 0x4000)
    await rig.ready()
    assert await rig.request(BlkRequest.IN, 0, [(DATA, 512, True)]) == BlkStatus.OK


async def test_access_platform_goes_through_the_window(make_rig: MakeRig) -> None:
    rig = await make_rig(vm_entry(offer=PLATFORM_OFFER), go=False)
    (window,) = rig.board.default_windows()
    table = TceTable(window, memoryview(bytearray(window.n_tces * 8)))
    rig.board.add_dma_window(table)
    offset = 0x10000000
    for page in range(0x100):
        table.store((offset >> 12) + page, tce(page << 12, TcePermission.READ | TcePermission.WRITE))
    assert await rig.driver.negotiate()
    await rig.driver.set_queue(rig.ring, offset=offset)
    await rig.driver.go()
    header = rig.header(BlkRequest.IN, 7)
    rig.ring.put_chain([(header[0] + offset, 16, False), (DATA + 8 + offset, 8192, True), (STATUS + offset, 1, True)])

    await rig.driver.kick()

    assert rig.ring.take_used() == [(0, 8193)]
    assert rig.ram.bytes[DATA + 8 : DATA + 8200] == rig.content()[7 * 512 : 7 * 512 + 8192]


async def test_a_guest_address_under_access_platform_needs_a_reset(make_rig: MakeRig) -> None:
    rig = await make_rig(vm_entry(offer=PLATFORM_OFFER), go=False)

    assert await rig.driver.negotiate()
    await rig.driver.set_queue(rig.ring)
    await rig.driver.go()

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert rig.port.faults and "DMA window" in rig.port.faults[0][1]


@pytest.mark.parametrize("chain", [[(HEADER, 15, False), (STATUS, 1, True)], [(HEADER, 16, False)]])
async def test_a_chain_that_is_no_request_needs_a_reset(make_rig: MakeRig, chain: list[tuple[int, int, bool]]) -> None:
    rig = await make_rig()
    rig.ring.put_chain(chain)

    await rig.driver.kick()

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert "no block request" in rig.port.faults[0][1]


async def test_data_outside_ram_needs_a_reset_and_moves_nothing(make_rig: MakeRig) -> None:
    rig = await make_rig()
    before = rig.content()
    rig.ring.put_chain([rig.header(BlkRequest.OUT, 0), (1 << 50, 512, False), (STATUS, 1, True)])

    await rig.driver.kick()

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert rig.content() == before


async def test_a_saved_board_goes_on_in_a_new_one(make_rig: MakeRig) -> None:
    first = await make_rig()
    assert await first.request(BlkRequest.IN, 0, [(DATA, 512, True)]) == BlkStatus.OK
    second = await make_rig(go=False)
    second.ram.bytes[:] = first.ram.bytes
    second.ring.avail_idx, second.ring.seen_used = first.ring.avail_idx, first.ring.seen_used

    second.board.load(first.board.save())

    assert await second.request(BlkRequest.IN, 2, [(DATA, 512, True)]) == BlkStatus.OK
    assert second.ram.bytes[DATA : DATA + 512] == second.content()[1024:1536]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.lists(st.binary(min_size=16, max_size=16), min_size=64, max_size=64),
    header=st.binary(min_size=16, max_size=16),
    heads=st.lists(st.integers(0, 70), min_size=1, max_size=64),
)
async def test_no_ring_content_gets_past_the_device(
    make_rig: MakeRig, raw: list[bytes], header: bytes, heads: list[int]
) -> None:
    rig = await make_rig()
    rig.ram.bytes[RING : RING + 1024] = b"".join(raw)
    rig.ram.bytes[0:16] = header
    for head in heads:
        rig.ring.offer(head)

    await rig.driver.kick()
    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) == 0


segments = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 500)), max_size=10)


@given(segments, st.data())
def test_split_divides_at_any_byte(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, total_bytes(parts)))

    head, rest = split(parts, at)

    assert total_bytes(head) == at
    assert [byte for address, n in head + rest for byte in (address, address + n - 1)][:1] == [
        address for address, _ in parts
    ][:1]
    assert total_bytes(rest) == total_bytes(parts) - at


@given(segments, st.integers(1, 600))
def test_pieces_cover_everything_within_the_limit(parts: list[tuple[int, int]], limit: int) -> None:
    result = list(pieces(parts, limit))

    assert all(0 < total_bytes(piece) <= limit for piece in result)
    assert sum(map(total_bytes, result)) == total_bytes(parts)


async def with_two_reads(make_rig: MakeRig) -> Rig:
    """A device that looks at its ring for a minute after two requests at once, which it has just been told of."""
    rig = await make_rig(vm_entry(time="wall"))
    rig.blk.poll_ns = 60_000_000_000
    for slot in range(2):
        rig.ring.put_chain([rig.header(BlkRequest.IN, slot, slot), *read_into(slot)], first=8 * slot)
    await rig.driver.kick()
    return rig


async def test_a_busy_queue_is_looked_at_for_a_while_without_a_kick(make_rig: MakeRig) -> None:
    rig = await with_two_reads(make_rig)
    with trio.fail_after(5):
        await until(lambda: rig.ring.used_idx() == 2)
        rig.ring.put_chain([rig.header(BlkRequest.IN, 2, 2), *read_into(2)], first=16)
        await until(lambda: rig.ring.used_idx() == 3)
    assert rig.blk.busy


async def test_after_a_lonely_request_the_device_asks_for_a_kick_at_once(make_rig: MakeRig) -> None:
    rig = await make_rig(vm_entry(time="wall"))
    rig.blk.poll_ns = 60_000_000_000
    rig.ring.put_chain([rig.header(BlkRequest.IN, 0), *read_into(0)], first=0)
    await rig.driver.kick()
    with trio.fail_after(5):
        await rig.board.drained()
    assert rig.ring.used_idx() == 1


async def test_requests_that_follow_each_other_need_no_kick_after_the_second(make_rig: MakeRig) -> None:
    rig = await make_rig(vm_entry(time="wall"))
    rig.blk.poll_ns = 60_000_000_000
    with trio.fail_after(5):
        for slot in range(2):
            rig.ring.put_chain([rig.header(BlkRequest.IN, slot, slot), *read_into(slot)], first=8 * slot)
            await rig.driver.kick()
            await until(lambda: rig.ring.used_idx() == slot + 1)  # noqa: B023
            assert rig.blk.busy is (slot == 1)
        rig.ring.put_chain([rig.header(BlkRequest.IN, 2, 2), *read_into(2)], first=16)
        await until(lambda: rig.ring.used_idx() == 3)


async def test_a_reset_does_not_wait_for_the_looking(make_rig: MakeRig) -> None:
    rig = await with_two_reads(make_rig)
    with trio.fail_after(5):
        await until(lambda: rig.ring.used_idx() == 2)
        await rig.board.reset()
    assert rig.blk.status == 0


def read_into(slot: int) -> list[tuple[int, int, bool]]:
    """A sector of data and a status."""
    return [(DATA + 512 * slot, 512, True), (STATUS + slot, 1, True)]


async def until(holds: Callable[[], bool]) -> None:
    """Let the device work until `holds`; the test's time limit ends it."""
    while not holds():
        await trio.lowlevel.checkpoint()


# -- on whose behalf ----------------------------------------------------------------------------------------


async def kick_for(rig: Rig, cause: int) -> None:
    """A store to the notify register, as the message of `cause` does it."""
    CAUSE.set(cause)
    await rig.driver.kick()
    CAUSE.set(0)


async def test_an_interrupt_has_the_cause_of_the_request_that_it_tells_of(make_rig: MakeRig, tmp_path: Path) -> None:
    recording = Recording(tmp_path, "vm1/qemu")
    rig = await make_rig(vm_entry(time="wall"), go=False)
    await rig.ready(1 << Feature.VERSION_1)
    rig.blk.trace_to(recording.tracer, LPID)
    released = trio.Event()

    async def flush() -> None:
        await released.wait()

    rig.blk.disk.flush = flush  # type: ignore[method-assign]
    rig.ring.put_chain([rig.header(BlkRequest.FLUSH, 0), (STATUS, 1, True)], first=0)
    await kick_for(rig, 21)
    await trio.testing.wait_all_tasks_blocked()
    # Without the event index a queue that ran empty interrupts, whether something was used or not.
    rig.driver.isr()
    rig.port.causes.clear()
    rig.ring.put_chain([rig.header(BlkRequest.IN, 0, 1), (DATA, 512, True), (STATUS + 1, 1, True)], first=8)
    await kick_for(rig, 22)
    with trio.fail_after(5):
        while len(rig.port.causes) < 1:
            await trio.lowlevel.checkpoint()
        rig.driver.isr()
        released.set()
        while len(rig.port.causes) < 2:
            await trio.lowlevel.checkpoint()

    assert rig.port.causes == [22, 21]
    requests = [event for event in events_of(recording.close()) if event.kind is EventKind.REQUEST]
    assert [(event.name, event.cause) for event in requests] == [
        ("begun", 21),
        ("begun", 22),
        ("ended", 22),
        ("ended", 21),
    ]
    assert requests[0].text == "vm1/disk0 queue 0 request 0 begins, 17 bytes"
