"""Random numbers and a second console through the whole path: board, BAR, rings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio

from protocol.geometry import PAGE_BYTES
from protocol.startup import DeviceEntry
from services.qemu.board import Board
from services.qemu.testing import TestDriver, TestPort, TestRam, TestRing, board_entry
from services.qemu.virtio_rng import MAX_REQUEST_BYTES
from services.runtime.text_buffers import INPUT_BYTES, OUTPUT_BYTES
from shared.typed_text import TypedText
from shared.virtio import DeviceStatus
from shared.virtio_console import RECEIVE_QUEUE, TRANSMIT_QUEUE
from shared.virtio_pci import CommonCfg

RINGS, DATA = (0x1000, 0x3000), 0x20000
SIZE = 8


@dataclass
class Rig:
    """A board with one device, and its driver."""

    ram: TestRam
    board: Board
    port: TestPort
    driver: TestDriver
    rings: list[TestRing]

    async def offer(self, index: int, buffers: list[tuple[int, int, bool]]) -> None:
        ring = self.rings[index]
        ring.put_chain(buffers, first=ring.avail_idx % SIZE)
        await self.driver.kick(index)

    def needs_reset(self) -> bool:
        return bool(self.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET)


MakeRig = Callable[[DeviceEntry], Awaitable[Rig]]
RNG, CONSOLE = DeviceEntry(kind="virtio-rng"), DeviceEntry(kind="virtio-console", name="log")


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    async with trio.open_nursery() as nursery:

        async def make(device: DeviceEntry) -> Rig:
            entry = board_entry([], [device], memory_bytes=64 * PAGE_BYTES)
            ram, port = TestRam(entry.memory_bytes), TestPort()
            board = Board(entry, ram.accessor, {}, port, assign_bars=True)
            nursery.start_soon(board.run)
            driver = TestDriver(board, board.functions[0])
            n_queues = len(driver.function.device.queues)
            rig = Rig(ram, board, port, driver, [TestRing.at(ram.bytes, SIZE, at) for at in RINGS[:n_queues]])
            assert await driver.negotiate()
            for index, ring in enumerate(rig.rings):
                await driver.set_queue(ring, index)
            await driver.go()
            return rig

        yield make
        nursery.cancel_scope.cancel()


async def test_a_request_is_filled_with_random_bytes(make_rig: MakeRig) -> None:
    rig = await make_rig(RNG)

    await rig.offer(0, [(DATA, 64, True)])
    await rig.offer(0, [(DATA + 64, 32, True), (DATA + 96, 32, True)])

    assert rig.rings[0].take_used() == [(0, 64), (1, 64)]
    first, second = rig.ram.bytes[DATA : DATA + 64], rig.ram.bytes[DATA + 64 : DATA + 128]
    assert first != second and any(first) and any(second[32:])
    assert not any(rig.ram.bytes[DATA + 128 : DATA + 256])


async def test_a_large_request_is_filled_in_part(make_rig: MakeRig) -> None:
    rig = await make_rig(RNG)

    await rig.offer(0, [(DATA, 1 << 20, True)])

    assert rig.rings[0].take_used() == [(0, MAX_REQUEST_BYTES)]
    assert not any(rig.ram.bytes[DATA + MAX_REQUEST_BYTES : DATA + (1 << 20)])


@pytest.mark.parametrize("buffer", [(DATA, 64, False), (1 << 40, 64, True)])
async def test_a_request_without_room_needs_a_reset(make_rig: MakeRig, buffer: tuple[int, int, bool]) -> None:
    rig = await make_rig(RNG)

    await rig.offer(0, [buffer])

    assert rig.needs_reset()
    assert [device for device, _ in rig.port.faults] == ["vm1/rng"]


async def test_what_the_guest_prints_is_kept_like_a_terminal_s(make_rig: MakeRig) -> None:
    rig = await make_rig(CONSOLE)
    text = rig.board.consoles["log"].text
    rig.ram.bytes[DATA : DATA + 10] = b"hello\nyou\n"

    await rig.offer(TRANSMIT_QUEUE, [(DATA, 6, False), (DATA + 6, 4, False)])
    assert (text.read().data, text.end) == (b"hello\nyou\n", 10)
    await rig.offer(TRANSMIT_QUEUE, [(DATA, 3 * OUTPUT_BYTES, False)])

    assert text.end == 10 + 3 * OUTPUT_BYTES
    assert len(text.read().data) == OUTPUT_BYTES
    assert rig.rings[TRANSMIT_QUEUE].take_used() == [(0, 0), (1, 0)]


async def test_typed_text_waits_for_room_and_comes_in_order(make_rig: MakeRig) -> None:
    rig = await make_rig(CONSOLE)
    console = rig.board.consoles["log"]

    assert console.type_in(TypedText(b"abcdef").offer()) == 6
    await rig.offer(RECEIVE_QUEUE, [(DATA, 4, True)])
    await rig.offer(RECEIVE_QUEUE, [(DATA + 4, 4, True)])
    await rig.offer(RECEIVE_QUEUE, [(DATA + 8, 4, True)])
    assert bytes(rig.ram.bytes[DATA : DATA + 6]) == b"abcdef"
    assert [n_bytes for _, n_bytes in rig.rings[RECEIVE_QUEUE].take_used()] == [4, 2]
    console.type_in(TypedText(b"gh").offer())
    await rig.board.drained()

    assert bytes(rig.ram.bytes[DATA + 8 : DATA + 10]) == b"gh"


async def test_typed_text_is_bounded_and_gone_after_a_reset(make_rig: MakeRig) -> None:
    rig = await make_rig(CONSOLE)
    console = rig.board.consoles["log"]

    assert console.type_in(TypedText(bytes(INPUT_BYTES + 5)).offer()) == INPUT_BYTES
    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)

    assert not console.text.has_typed


async def test_a_console_buffer_without_room_needs_a_reset(make_rig: MakeRig) -> None:
    rig = await make_rig(CONSOLE)
    rig.board.consoles["log"].type_in(TypedText(b"x").offer())

    await rig.offer(RECEIVE_QUEUE, [(DATA, 4, False)])

    assert rig.needs_reset()
    assert [device for device, _ in rig.port.faults] == ["vm1/log"]


async def test_both_directions_of_a_console_survive_a_save(make_rig: MakeRig) -> None:
    rig, other = await make_rig(CONSOLE), await make_rig(CONSOLE)
    rig.ram.bytes[DATA : DATA + 5] = b"hello"
    await rig.offer(TRANSMIT_QUEUE, [(DATA, 5, False)])
    rig.board.consoles["log"].type_in(TypedText(b"ab").offer())
    await rig.board.drained()

    other.ram.bytes[:] = rig.ram.bytes
    other.board.load(rig.board.save())
    other.rings[RECEIVE_QUEUE].avail_idx = 0
    await other.offer(RECEIVE_QUEUE, [(DATA, 4, True)])

    assert other.board.consoles["log"].text.read().data == b"hello"
    assert bytes(other.ram.bytes[DATA : DATA + 2]) == b"ab"
