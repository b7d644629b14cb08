"""Devices of every kind on one bridge at the same time, each reaching memory in its own way and in no other.

A virtio-blk that bypasses the windows, a virtio-rng that translates as the bus does, an edu that translates as the bus
does and had no choice, and an edu in a domain of its own, as a passed-through device.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import trio

from protocol.geometry import PAGE_BYTES
from protocol.startup import PLATFORM_OFFER, DeviceEntry, DiskEntry, IommuDomain
from services.qemu.board import Board
from services.qemu.testing import TestDriver, TestEdu, TestPort, TestRam, TestRing, board_entry
from shared.edu import BUFFER_ADDRESS, EduDma, EduRegister
from shared.tce import TcePermission, TceTable, tce
from shared.virtio import DeviceStatus
from shared.virtio_blk import REQUEST_HEADER, BlkRequest, BlkStatus
from shared.virtio_pci import CommonCfg

RAM_BYTES = 32 * PAGE_BYTES
BUS_IOBA, OWN_IOBA = 0x1000000, 0x3000000
"""Where the window of the bus has RAM, and where that of the own domain has it."""
BLK_RING, RNG_RING = 0x10000, 0x20000
BLK_DATA, RNG_DATA, BUS_DATA, OWN_DATA = 0x40000, 0x50000, 0x60000, 0x70000
HEADER, STATUS = 0x30000, 0x30100
N_BYTES = 4096


@dataclass
class Bus:
    """The board, its four drivers, and the content of the disk."""

    ram: TestRam
    port: TestPort
    board: Board
    blk: TestDriver
    rng: TestDriver
    shared: TestEdu
    own: TestEdu
    disk: bytes

    def table(self, liobn: int) -> TceTable:
        return next(table for domain in self.board.bridge.domains for table in domain.windows if table.liobn == liobn)

    def written(self) -> set[int]:
        """The frames that devices wrote."""
        return {gfn << 16 for gfn, mark in enumerate(self.ram.dirty) if mark}


def map_ram(table: TceTable, ioba: int) -> None:
    for page in range(RAM_BYTES >> 12):
        table.store((ioba >> 12) + page, tce(page << 12, TcePermission.READ | TcePermission.WRITE))


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    devices = [
        DeviceEntry(kind="virtio-blk", disk="d"),
        DeviceEntry(kind="virtio-rng", offer=PLATFORM_OFFER),
        DeviceEntry(kind="edu", name="shared", dma_bits=64),
        DeviceEntry(kind="edu", name="own", dma_bits=64, iommu_domain=IommuDomain.OWN),
    ]
    entry = board_entry([DiskEntry(name="d", path="")], devices, memory_bytes=RAM_BYTES)
    fd, disk = os.memfd_create("disk"), os.urandom(1 << 20)
    os.write(fd, disk)
    ram, port = TestRam(RAM_BYTES), TestPort()
    board = port.board = Board(entry, ram.accessor, {"d": fd}, port, assign_bars=True)
    for window in board.default_windows():
        assert await port.create_window(window)
    blk, rng = (TestDriver(board, function) for function in board.functions[:2])
    shared, own = (TestEdu(board, function) for function in board.functions[2:])
    rig = Bus(ram, port, board, blk, rng, shared, own, disk)
    map_ram(rig.table(0x80000000), BUS_IOBA)
    map_ram(rig.table(0x80000008), OWN_IOBA)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        yield rig
        nursery.cancel_scope.cancel()
    os.close(fd)


async def read_block(bus: Bus, ring_offset: int = 0) -> TestRing:
    """The disk's first blocks by guest addresses; `ring_offset` is added to those of the ring."""
    ring = TestRing.at(bus.ram.bytes, 16, BLK_RING)
    assert await bus.blk.negotiate()
    await bus.blk.set_queue(ring, offset=ring_offset)
    await bus.blk.go()
    bus.ram.bytes[HEADER : HEADER + 16] = REQUEST_HEADER.pack(BlkRequest.IN, 0, 0)
    ring.put_chain([(HEADER, 16, False), (BLK_DATA, N_BYTES, True), (STATUS, 1, True)])
    await bus.blk.kick()
    return ring


async def random_bytes(bus: Bus, ioba: int) -> TestRing:
    """Random bytes by bus addresses."""
    ring = TestRing.at(bus.ram.bytes, 8, RNG_RING)
    assert await bus.rng.negotiate()
    await bus.rng.set_queue(ring, offset=ioba)
    await bus.rng.go()
    ring.put_chain([(RNG_DATA + ioba, N_BYTES, True)])
    await bus.rng.kick()
    return ring


async def copy_out(edu: TestEdu, address: int) -> None:
    """What the edu's buffer holds."""
    await edu.transfer(BUFFER_ADDRESS, address, N_BYTES, EduDma.TO_RAM)


async def fill(edu: TestEdu, address: int) -> None:
    await edu.transfer(address, BUFFER_ADDRESS, N_BYTES, EduDma(0))


async def test_each_device_reaches_what_its_own_way_gives_it(bus: Bus) -> None:
    block = await read_block(bus)
    random = await random_bytes(bus, BUS_IOBA)
    await fill(bus.shared, BUS_IOBA + BLK_DATA)
    await copy_out(bus.shared, BUS_IOBA + BUS_DATA)
    await fill(bus.own, OWN_IOBA + RNG_DATA)
    await copy_out(bus.own, OWN_IOBA + OWN_DATA)

    ram = bus.ram.bytes
    assert block.take_used() == [(0, N_BYTES + 1)] and ram[STATUS] == BlkStatus.OK
    assert random.take_used() == [(0, N_BYTES)] and any(ram[RNG_DATA : RNG_DATA + N_BYTES])
    assert ram[BLK_DATA : BLK_DATA + N_BYTES] == ram[BUS_DATA : BUS_DATA + N_BYTES] == bus.disk[:N_BYTES]
    assert ram[OWN_DATA : OWN_DATA + N_BYTES] == ram[RNG_DATA : RNG_DATA + N_BYTES]
    assert bus.written() == {BLK_RING, RNG_RING, HEADER, BLK_DATA, RNG_DATA, BUS_DATA, OWN_DATA}
    assert bus.port.faults == []


async def test_the_address_of_another_way_is_a_fault_of_the_device_that_was_given_it_and_of_no_other(bus: Bus) -> None:
    for edu, address in (
        (bus.shared, OWN_IOBA + BUS_DATA),
        (bus.shared, BUS_DATA),
        (bus.own, BUS_IOBA + OWN_DATA),
        (bus.own, OWN_DATA),
    ):
        await copy_out(edu, address)
        assert edu.load(EduRegister.DMA_COMMAND) == EduDma.TO_RAM
    await random_bytes(bus, OWN_IOBA)

    names = [name for name, _ in bus.port.faults]
    assert names == ["vm1/shared", "vm1/shared", "vm1/own", "vm1/own", "vm1/rng"]
    assert all("liobn 0x80000008" in reason for name, reason in bus.port.faults if name == "vm1/own")
    assert all("liobn 0x80000000" in reason for name, reason in bus.port.faults if name != "vm1/own")
    assert bus.rng.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert bus.written() == set()

    assert (await read_block(bus)).take_used() == [(0, N_BYTES + 1)]
    await copy_out(bus.own, OWN_IOBA + OWN_DATA)
    await copy_out(bus.shared, BUS_IOBA + BUS_DATA)
    assert bus.written() >= {BLK_DATA, OWN_DATA, BUS_DATA}


async def test_a_bus_address_is_none_for_the_device_that_bypasses(bus: Bus) -> None:
    await read_block(bus, ring_offset=BUS_IOBA)

    assert [name for name, _ in bus.port.faults] == ["vm1/d"]
    assert bus.written() == set()


async def test_unmapping_in_one_domain_takes_nothing_from_the_others(bus: Bus) -> None:
    table = bus.table(0x80000000)
    table.fill(BUS_IOBA >> 12, RAM_BYTES >> 12, 0)

    await copy_out(bus.shared, BUS_IOBA + BUS_DATA)
    await copy_out(bus.own, OWN_IOBA + OWN_DATA)
    await read_block(bus)

    assert [name for name, _ in bus.port.faults] == ["vm1/shared"]
    assert bus.written() == {BLK_RING, HEADER, BLK_DATA, OWN_DATA}


async def make_window(bus: Bus, device: int) -> tuple[int, int]:
    """A 64-bit window over all of RAM for the device in slot `device`: its liobn and where it has RAM on the bus."""
    args = [device << 11, 0x8000000, 0x20000000, 12, 24]
    status, liobn, high, low = await bus.board.rtas("ibm,create-pe-dma-window", args, 4)
    assert status == 0
    map_ram(bus.table(liobn), 0)
    return liobn, high << 32 | low


async def test_a_window_made_for_the_own_device_is_its_alone(bus: Bus) -> None:
    liobn, base = await make_window(bus, 4)

    await copy_out(bus.shared, base + BUS_DATA)
    await copy_out(bus.own, base + OWN_DATA)

    assert liobn == 0x80000009
    assert bus.port.faults == [("vm1/shared", f"DMA: ioba {base + BUS_DATA:#x} is in no DMA window")]
    assert bus.written() == {OWN_DATA}


async def test_a_window_made_for_the_bus_is_none_of_the_own_device(bus: Bus) -> None:
    liobn, base = await make_window(bus, 3)

    await copy_out(bus.shared, base + BUS_DATA)
    await copy_out(bus.own, base + OWN_DATA)

    assert liobn == 0x80000001
    assert bus.port.faults == [("vm1/own", f"DMA: ioba {base + OWN_DATA:#x} is in no DMA window")]
    assert bus.written() == {BUS_DATA}


async def test_a_reset_leaves_each_domain_its_default_window_and_no_device_with_data(bus: Bus) -> None:
    bus.ram.bytes[OWN_DATA : OWN_DATA + 6] = b"secret"
    await fill(bus.own, OWN_IOBA + OWN_DATA)
    for slot in (3, 4):
        await make_window(bus, slot)

    await bus.board.reset()

    assert sorted(bus.port.windows) == [0x80000000, 0x80000008]
    assert not any(bus.own.function.device.state.buffer)
