"""The modern PCI transport and what every virtio device does: capabilities, negotiation, interrupts, faults."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio

from protocol.codes import HCode
from protocol.geometry import PAGE_BYTES
from protocol.startup import NO_OFFER, PLATFORM_OFFER, DiskEntry, DmaOffer
from services.qemu.board import Board
from services.qemu.testing import TestDriver, TestPort, TestRam, TestRing, board_entry
from services.qemu.virtio_pci import MODERN_BAR, MODERN_BAR_BYTES, MSIX_BAR, OFFSETS
from shared.interrupt_sources import MSI_BASE
from shared.pci import (
    MSIX_ENABLE,
    MSIX_FUNCTION_MASK,
    STATUS_INTERRUPT,
    Capability,
    Command,
    Config,
    Msix,
    OfSpace,
)
from shared.virtio import DeviceStatus, Feature, feature_mask, has_feature
from shared.virtio_blk import REQUEST_HEADER, BlkRequest, BlkStatus
from shared.virtio_pci import ISR_CONFIG, ISR_QUEUE, NO_VECTOR, CapField, CfgType, CommonCfg

RING, HEADER, STATUS, DATA = 0x1000, 0x4000, 0x5000, 0x6000
BUID = 0x800000020000000
LSI = 0x1201
"""Slot 1, pin A."""


@dataclass
class Rig:
    ram: TestRam
    board: Board
    port: TestPort
    driver: TestDriver
    ring: TestRing

    def offer_read(self, head: int = 0) -> None:
        self.ram.bytes[HEADER : HEADER + 16] = REQUEST_HEADER.pack(BlkRequest.IN, 0, 0)
        self.ring.put_chain([(HEADER, 16, False), (DATA, 512, True), (STATUS, 1, True)], first=head)

    async def ready(self, vector: int | None = None) -> None:
        assert await self.driver.negotiate()
        await self.driver.set_queue(self.ring, vector=vector)
        await self.driver.go()

    async def enable_msix(self) -> None:
        rets = await self.board.rtas("ibm,change-msi", [1 << 11, BUID >> 32, BUID & 0xFFFFFFFF, 4, 2, 1], 4)
        assert rets == [0, 2, 2, 2]
        self.driver.function.write_config(msix_offset(self) + Msix.CONTROL, 2, MSIX_ENABLE)


MakeRig = Callable[..., Awaitable[Rig]]


def msix_offset(rig: Rig) -> int:
    capabilities = rig.driver.function.capabilities
    return next(offset for offset, kind in capabilities.items() if kind == Capability.MSIX)


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 1 << 20)
    async with trio.open_nursery() as nursery:

        async def make(*, offer: DmaOffer = NO_OFFER, time: str = "instructions") -> Rig:
            entry = board_entry([DiskEntry(name="d", path="")], memory_bytes=PAGE_BYTES, time=time, offer=offer)
            ram, port = TestRam(PAGE_BYTES), TestPort()
            board = Board(entry, ram.accessor, {"d": fd}, port, assign_bars=True)
            port.board = board
            nursery.start_soon(board.run)
            await board.start()
            return Rig(ram, board, port, TestDriver(board, board.functions[0]), TestRing.at(ram.bytes, 16, RING))

        yield make
        nursery.cancel_scope.cancel()
    os.close(fd)


async def test_capabilities_lead_to_every_region(make_rig: MakeRig) -> None:
    function = (await make_rig()).driver.function
    found = {}
    offset = function.read_config(Config.CAPABILITIES, 1)
    while offset:
        if function.read_config(offset, 1) == Capability.VENDOR:
            found[function.read_config(offset + CapField.CFG_TYPE, 1)] = offset
        offset = function.read_config(offset + CapField.CAP_NEXT, 1)

    assert set(found) == {CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE, CfgType.PCI_CFG}
    ends = [
        function.read_config(at + CapField.OFFSET, 4) + function.read_config(at + CapField.LENGTH, 4)
        for at in found.values()
    ]
    assert max(ends) <= MODERN_BAR_BYTES
    assert function.read_config(found[CfgType.NOTIFY] + CapField.NOTIFY_MULTIPLIER, 4) == 4
    assert function.read_config(found[CfgType.COMMON] + CapField.BAR, 1) == MODERN_BAR
    assert function.read_config(msix_offset_of(function.capabilities) + Msix.TABLE, 4) & 7 == MSIX_BAR


def msix_offset_of(capabilities: dict[int, int]) -> int:
    return next(offset for offset, kind in capabilities.items() if kind == Capability.MSIX)


async def test_identity_is_that_of_a_modern_block_device(make_rig: MakeRig) -> None:
    function = (await make_rig()).driver.function

    assert function.read_config(Config.VENDOR_ID, 4) == 0x10421AF4
    assert function.read_config(Config.REVISION, 1) >= 1


async def test_negotiation_accepts_what_is_offered(make_rig: MakeRig) -> None:
    driver = (await make_rig()).driver

    assert await driver.negotiate()
    offered = await driver.features()
    assert has_feature(offered, Feature.VERSION_1) and has_feature(offered, Feature.EVENT_IDX)
    assert not has_feature(offered, Feature.ACCESS_PLATFORM)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (0, "VERSION_1"),
        (feature_mask((Feature.VERSION_1, Feature.RING_PACKED)), "not offered"),
        (feature_mask((Feature.VERSION_1, Feature.ACCESS_PLATFORM)), "not offered"),
    ],
)
async def test_features_that_do_not_hold_are_refused(make_rig: MakeRig, chosen: int, reason: str) -> None:
    rig = await make_rig()

    assert not await rig.driver.negotiate(chosen)
    assert reason in rig.port.faults[0][1]


async def test_dropping_an_offered_access_platform_is_refused(make_rig: MakeRig) -> None:
    rig = await make_rig(offer=PLATFORM_OFFER)

    assert has_feature(await rig.driver.features(), Feature.ACCESS_PLATFORM)
    assert not await rig.driver.negotiate(1 << Feature.VERSION_1)
    assert "ACCESS_PLATFORM" in rig.port.faults[0][1]


async def test_features_above_bit_63_are_refused(make_rig: MakeRig) -> None:
    driver = (await make_rig()).driver
    await driver.store(CommonCfg.DRIVER_FEATURE_SELECT, 1)
    await driver.store(CommonCfg.DRIVER_FEATURE, 1)
    await driver.store(CommonCfg.DRIVER_FEATURE_SELECT, 2)
    await driver.store(CommonCfg.DRIVER_FEATURE, 1)

    await driver.store(CommonCfg.DEVICE_STATUS, DeviceStatus.FEATURES_OK)

    assert not driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.FEATURES_OK


async def test_features_are_frozen_by_features_ok(make_rig: MakeRig) -> None:
    driver = (await make_rig()).driver
    await driver.negotiate(1 << Feature.VERSION_1)
    await driver.store(CommonCfg.DRIVER_FEATURE_SELECT, 0)
    await driver.store(CommonCfg.DRIVER_FEATURE, 0xFFFFFFFF)

    assert driver.load(CommonCfg.DRIVER_FEATURE) == 0


async def test_no_buffer_is_touched_before_driver_ok(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.driver.negotiate()
    await rig.driver.set_queue(rig.ring)
    rig.offer_read()

    await rig.driver.kick()
    assert rig.ring.take_used() == []

    await rig.driver.go()
    await rig.board.drained()
    assert rig.ring.take_used() == [(0, 513)]
    assert rig.ram.bytes[STATUS] == BlkStatus.OK


async def test_driver_ok_without_features_ok_needs_a_reset(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.driver.store(CommonCfg.DEVICE_STATUS, DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER_OK)

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert rig.board.faults() == {"vm1/d": "DRIVER_OK without FEATURES_OK"}


async def test_a_driver_cannot_clear_a_status_bit(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.ready()

    await rig.driver.store(CommonCfg.DEVICE_STATUS, DeviceStatus.ACKNOWLEDGE)

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.DRIVER_OK


async def test_queue_settings_are_locked_once_enabled(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.ready()

    await rig.driver.store(CommonCfg.QUEUE_DESC, 0xDEAD0)

    assert rig.driver.load(CommonCfg.QUEUE_DESC) == RING


async def test_a_queue_that_does_not_exist_has_size_zero(make_rig: MakeRig) -> None:
    driver = (await make_rig()).driver
    await driver.store(CommonCfg.QUEUE_SELECT, 1)

    assert driver.load(CommonCfg.QUEUE_SIZE) == 0
    assert driver.load(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR
    await driver.store(CommonCfg.QUEUE_ENABLE, 1)
    await driver.kick(1000)
    assert driver.load(CommonCfg.QUEUE_ENABLE) == 0


async def test_registers_answer_only_at_their_own_width(make_rig: MakeRig) -> None:
    rig = await make_rig()
    gpa = rig.driver.gpa

    assert rig.board.mmio_load(gpa + CommonCfg.NUM_QUEUES.offset, 2) == (HCode.H_SUCCESS, 1)
    assert rig.board.mmio_load(gpa + CommonCfg.NUM_QUEUES.offset, 1) == (HCode.H_SUCCESS, 0)
    assert await rig.board.mmio_store(gpa + CommonCfg.DEVICE_FEATURE.offset, 4, 1) == HCode.H_SUCCESS
    assert rig.board.mmio_load(gpa + 1, 2)[0] == HCode.H_PARAMETER
    assert rig.board.mmio_load(gpa, 3)[0] == HCode.H_PARAMETER


async def test_addresses_may_be_stored_in_halves(make_rig: MakeRig) -> None:
    rig = await make_rig()
    at = rig.driver.gpa + CommonCfg.QUEUE_DEVICE.offset

    await rig.board.mmio_store(at + 4, 4, 0x11223344)
    await rig.board.mmio_store(at, 4, 0x55667780)

    assert rig.driver.load(CommonCfg.QUEUE_DEVICE) == 0x1122334455667780
    assert rig.board.mmio_load(at + 4, 4)[1] == 0x11223344


async def test_without_msix_the_line_rises_until_isr_is_read(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.ready()
    rig.offer_read()

    await rig.driver.kick()

    assert rig.port.sources[LSI] is True
    assert rig.port.levels[LSI] is True
    assert rig.driver.function.read_config(Config.STATUS, 2) & STATUS_INTERRUPT
    assert rig.driver.isr() == ISR_QUEUE
    assert rig.port.levels[LSI] is False
    assert rig.driver.isr() == 0


async def test_intx_disable_keeps_the_line_low(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.ready()
    rig.driver.function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.INTX_DISABLE)
    rig.offer_read()
    await rig.driver.kick()
    assert not rig.port.levels.get(LSI)

    rig.driver.function.write_config(Config.COMMAND, 2, Command.MEMORY)

    assert rig.port.levels[LSI] is True


async def test_msix_sends_the_edge_that_change_msi_gave(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.enable_msix()
    await rig.ready(vector=1)
    rig.offer_read()

    await rig.driver.kick()

    assert rig.port.edges == [MSI_BASE + 1]
    assert rig.port.sources[MSI_BASE + 1] is False
    assert not rig.port.levels.get(LSI)


async def test_a_masked_vector_stays_pending_until_unmasked(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.enable_msix()
    await rig.ready(vector=0)
    control = msix_offset(rig) + Msix.CONTROL
    rig.driver.function.write_config(control, 2, MSIX_ENABLE | MSIX_FUNCTION_MASK)
    rig.offer_read()
    await rig.driver.kick()
    assert rig.port.edges == []
    assert rig.driver.function.msix.load(0x800, 8) == 1

    rig.driver.function.write_config(control, 2, MSIX_ENABLE)

    assert rig.port.edges == [MSI_BASE]
    assert rig.driver.function.msix.load(0x800, 8) == 0


async def test_no_message_without_bus_mastering_or_ownership(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.enable_msix()
    await rig.ready(vector=0)
    rig.driver.function.write_config(Config.COMMAND, 2, Command.MEMORY)
    rig.offer_read()
    await rig.driver.kick()
    assert rig.port.edges == []

    rig.driver.function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.MASTER)
    rig.driver.function.msix.set_message(0, 0x40000000000, 0x1000)
    rig.offer_read(head=3)
    await rig.driver.kick()

    assert rig.port.edges == []


async def test_a_vector_beyond_the_table_reads_back_as_none(make_rig: MakeRig) -> None:
    driver = (await make_rig()).driver

    await driver.store(CommonCfg.CONFIG_MSIX_VECTOR, 2)
    assert driver.load(CommonCfg.CONFIG_MSIX_VECTOR) == NO_VECTOR

    await driver.store(CommonCfg.CONFIG_MSIX_VECTOR, 1)
    assert driver.load(CommonCfg.CONFIG_MSIX_VECTOR) == 1


async def test_a_broken_ring_needs_a_reset_with_a_config_interrupt_and_a_reason(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.ready()
    rig.ring.set_avail_idx(0x8000)

    await rig.driver.kick()

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert rig.driver.isr() == ISR_CONFIG
    assert rig.port.faults == [("vm1/d", rig.board.faults()["vm1/d"])]
    assert "avail.idx" in rig.port.faults[0][1]


async def test_a_broken_device_works_after_a_reset(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.ready()
    rig.ring.set_avail_idx(0x8000)
    await rig.driver.kick()
    rig.ring.set_avail_idx(0)

    await rig.ready()
    rig.offer_read()
    await rig.driver.kick()

    assert rig.ring.take_used() == [(0, 513)]
    assert rig.board.faults() == {}


async def test_reset_of_the_board_unassigns_sources_and_settings(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.enable_msix()
    await rig.ready(vector=1)

    await rig.board.reset()

    assert not rig.board.bridge.msis.blocks
    assert not rig.driver.function.msix.enabled
    assert rig.driver.load(CommonCfg.DEVICE_STATUS) == 0
    assert not rig.driver.function.command(Command.MASTER)
    assert rig.driver.function.command(Command.MEMORY)


async def test_the_pci_cfg_window_reaches_the_modern_bar(make_rig: MakeRig) -> None:
    function = (await make_rig()).driver.function
    *_, at = function.capabilities
    function.write_config(at + CapField.BAR, 1, MODERN_BAR)
    function.write_config(at + CapField.OFFSET, 4, CommonCfg.QUEUE_SELECT.offset)
    function.write_config(at + CapField.LENGTH, 4, 2)

    function.write_config(at + CapField.PCI_CFG_DATA, 2, 5)

    assert function.read_config(at + CapField.PCI_CFG_DATA, 2) == 5
    assert function.load(CommonCfg.QUEUE_SELECT.offset, 2) == 5
    function.write_config(at + CapField.OFFSET, 4, MODERN_BAR_BYTES)
    assert function.read_config(at + CapField.PCI_CFG_DATA, 2) == 0


async def test_bars_have_the_kinds_that_the_guest_expects(make_rig: MakeRig) -> None:
    function = (await make_rig()).driver.function

    assert [(bar.index, bar.space) for bar in function.bars] == [
        (MSIX_BAR, OfSpace.MEM32),
        (MODERN_BAR, OfSpace.MEM64),
    ]


async def test_the_notify_registers_of_running_queues_are_doorbells(make_rig: MakeRig) -> None:
    rig = await make_rig(time="wall")
    function = rig.driver.function
    assert rig.port.doorbells == set()
    await rig.ready()
    notify = rig.driver.gpa + OFFSETS[CfgType.NOTIFY]
    assert rig.port.doorbells == {notify}

    function.write_config(Config.COMMAND, 2, 0)
    assert rig.port.doorbells == set()
    function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.MASTER)
    assert rig.port.doorbells == {notify}
    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    assert rig.port.doorbells == set()


async def test_a_doorbell_moves_with_its_bar(make_rig: MakeRig) -> None:
    rig = await make_rig(time="wall")
    await rig.ready()
    function = rig.driver.function
    bar = next(bar for bar in function.bars if bar.index == MODERN_BAR)
    function.assign_bar(bar, function.bar_address(bar) + (1 << 20))
    assert rig.port.doorbells == {rig.driver.gpa + (1 << 20) + OFFSETS[CfgType.NOTIFY]}


async def test_with_virtual_time_a_kick_stays_a_call(make_rig: MakeRig) -> None:
    rig = await make_rig(time="instructions")
    await rig.ready()
    assert rig.port.doorbells == set()


async def test_a_doorbell_wakes_the_device_and_a_late_one_does_nothing(make_rig: MakeRig) -> None:
    rig = await make_rig(time="wall")
    await rig.ready()
    (gpa,) = rig.port.doorbells
    rig.offer_read()
    rig.board.ring(gpa, 2, 0)
    with trio.fail_after(5):
        await rig.board.drained()
    assert rig.ring.used_idx() == 1
    rig.driver.function.write_config(Config.COMMAND, 2, 0)
    rig.board.ring(gpa, 2, 0)
    assert not rig.driver.function.device.busy
