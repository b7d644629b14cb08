"""How a device reaches memory: what it offers, whom it refuses, what moves it behind the IOMMU and out of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.codes import HCode
from protocol.geometry import PAGE_BYTES
from protocol.hcalls import H_SET_DMA_BYPASS
from protocol.messages import TceWindowBody
from protocol.startup import NO_OFFER, PLATFORM_OFFER, AccessPlatform, DiskEntry, DmaOffer
from services.qemu.board import Board
from services.qemu.dma import BypassSpace, IommuSpace
from services.qemu.testing import TestDriver, TestPort, TestRam, TestRing, board_entry
from services.qemu.virtio_access import DeviceMemory, MemoryAccess
from shared.host_view import HostState
from shared.tce import ENTRY_BYTES, TcePermission, TceTable, tce
from shared.virtio import DeviceStatus, Feature, has_feature
from shared.virtio_blk import REQUEST_HEADER, BlkRequest, BlkStatus
from shared.virtio_pci import IOMMU_SWITCH, CommonCfg

PLATFORM = 1 << Feature.ACCESS_PLATFORM
NO_TRANSLATION = 1 << Feature.ACCESS_PLATFORM_NO_TRANSLATION
IDENTITY = 1 << Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS
OPTIONAL_OFFER = DmaOffer(access_platform=AccessPlatform.OPTIONAL)
BYPASS_OFFER = DmaOffer(access_platform=AccessPlatform.REQUIRED, bypass_switch=True)
IDENTITY_OFFER = DmaOffer(access_platform=AccessPlatform.REQUIRED, identity_address=True)
N_PAGES = 16
RING, HEADER, STATUS, DATA = 0x1000, 0x4000, 0x5000, 0x6000
BUID, CONFIG_ADDR = 0x800000020000000, 1 << 11
BOTH = TcePermission.READ | TcePermission.WRITE

offers = st.builds(
    DmaOffer,
    access_platform=st.sampled_from(AccessPlatform),
    no_translation=st.booleans(),
    identity_address=st.booleans(),
    bypass_switch=st.booleans(),
    iommu_switch=st.booleans(),
)


def window(page_shift: int = 16, base: int = 0, n_tces: int = N_PAGES) -> TceTable:
    body = TceWindowBody(0x80000000, page_shift, base, n_tces)
    return TceTable(body, memoryview(bytearray(n_tces * ENTRY_BYTES)))


def map_to_itself(table: TceTable, n_bytes: int) -> None:
    for index in range(n_bytes >> table.page_shift):
        table.store(index, tce(index << table.page_shift, BOTH))


def access(offer: DmaOffer, windows: list[TceTable] | None = None) -> tuple[MemoryAccess, DeviceMemory]:
    ram = TestRam(N_PAGES * PAGE_BYTES).accessor
    memory = DeviceMemory(BypassSpace(ram), IommuSpace(ram, windows or []))
    return MemoryAccess(memory, offer), memory


# -- the rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offer", "chosen", "refusal"),
    [
        (NO_OFFER, 0, None),
        (PLATFORM_OFFER, PLATFORM, None),
        (PLATFORM_OFFER, 0, "does not accept VIRTIO_F_ACCESS_PLATFORM"),
        (OPTIONAL_OFFER, 0, None),
        (OPTIONAL_OFFER, PLATFORM, None),
        (DmaOffer(no_translation=True), NO_TRANSLATION, None),
        (DmaOffer(no_translation=True), 0, None),
        (DmaOffer(access_platform=AccessPlatform.OPTIONAL, no_translation=True), PLATFORM | NO_TRANSLATION, "both"),
        (IDENTITY_OFFER, PLATFORM | IDENTITY, None),
        (IDENTITY_OFFER, PLATFORM, None),
        (DmaOffer(access_platform=AccessPlatform.OPTIONAL, identity_address=True), IDENTITY, "without ACCESS_PLATFORM"),
    ],
)
def test_which_drivers_are_served(offer: DmaOffer, chosen: int, refusal: str | None) -> None:
    said = access(offer)[0].refusal(chosen)
    assert (said is None) if refusal is None else (said is not None and refusal in said)


@given(offers, st.sets(st.sampled_from([PLATFORM, NO_TRANSLATION, IDENTITY])))
def test_whoever_is_served_gets_bus_addresses_only_with_the_bit_and_guest_addresses_only_for_a_reason(
    offer: DmaOffer, bits: set[int]
) -> None:
    rules, memory = access(offer, [full_window()])
    chosen = sum(bits) & rules.features
    if rules.refusal(chosen) is not None:
        return

    space = rules.space(chosen)

    if space is memory.platform:
        assert chosen & PLATFORM
    else:
        assert not chosen & PLATFORM or chosen & IDENTITY
    if offer.access_platform is AccessPlatform.REQUIRED and not offer.no_translation:
        assert chosen & PLATFORM


@given(offers, st.sets(st.sampled_from([PLATFORM, NO_TRANSLATION, IDENTITY])))
def test_a_device_behind_the_iommu_uses_bus_addresses_or_serves_nobody(offer: DmaOffer, bits: set[int]) -> None:
    rules, memory = access(offer)
    rules.put_behind_iommu()
    chosen = sum(bits) & rules.features

    assert rules.features & PLATFORM
    assert not rules.set_bypass(True)
    if rules.refusal(chosen) is None and not chosen & IDENTITY:
        assert rules.space(chosen) is memory.platform


def full_window() -> TceTable:
    table = window()
    map_to_itself(table, N_PAGES * PAGE_BYTES)
    return table


def test_a_promise_that_does_not_hold_is_told() -> None:
    table = full_window()
    rules, memory = access(IDENTITY_OFFER, [table])
    assert rules.broken_promise(PLATFORM | IDENTITY) is None
    assert rules.space(PLATFORM | IDENTITY) is memory.bypass

    table.store(3, tce(4 * PAGE_BYTES, BOTH))
    said = rules.broken_promise(PLATFORM | IDENTITY)
    assert said is not None
    assert "RAM is not mapped to itself" in said
    assert rules.broken_promise(PLATFORM) is None
    assert rules.space(PLATFORM) is memory.platform


@pytest.mark.parametrize("page_shift", [12, 16, 18])
def test_ram_is_mapped_to_itself_when_each_page_is_and_may_be_read_and_written(page_shift: int) -> None:
    n_bytes = N_PAGES * PAGE_BYTES
    table = window(page_shift, n_tces=n_bytes >> page_shift)
    map_to_itself(table, n_bytes)
    assert table.maps_to_itself(n_bytes)
    assert table.maps_to_itself(n_bytes - 1)
    assert not table.maps_to_itself(n_bytes + 1)

    last = (n_bytes >> page_shift) - 1
    for wrong in (0, tce(last << page_shift, TcePermission.READ), tce(0, BOTH)):
        table.store(last, wrong)
        assert not table.maps_to_itself(n_bytes)


def test_a_window_elsewhere_maps_nothing_to_itself() -> None:
    table = window(base=1 << 59)
    map_to_itself(table, N_PAGES * PAGE_BYTES)
    assert not table.maps_to_itself(PAGE_BYTES)


# -- a device on its board ------------------------------------------------------------------------------------------


class Rig:
    """A disk of zeros in slot 1, its driver, and a ring at RING."""

    def __init__(self, offer: DmaOffer, fd: int) -> None:
        self.ram, self.port = TestRam(N_PAGES * PAGE_BYTES), TestPort()
        entry = board_entry([DiskEntry(name="d", path="")], memory_bytes=self.ram.size_bytes, offer=offer)
        self.board = Board(entry, self.ram.accessor, {"d": fd}, self.port, assign_bars=True)
        self.port.board = self.board
        self.driver = TestDriver(self.board, self.board.functions[0])
        self.ring = TestRing.at(self.ram.bytes, 16, RING)

    async def bypass(self, enable: int, *, buid: int = BUID, config_addr: int = CONFIG_ADDR) -> HCode:
        return await self.board.hcalls.call(H_SET_DMA_BYPASS.number, [buid, config_addr, enable])

    async def start(self, features: int, offset: int = 0, bypass: Sequence[int] = ()) -> bool:
        """Whether the device serves a driver that accepts VERSION_1 and `features`.

        H_SET_DMA_BYPASS is called for each of `bypass` before DRIVER_OK.
        """
        served = await self.driver.negotiate(1 << Feature.VERSION_1 | features)
        for enable in bypass:
            assert await self.bypass(enable) == HCode.H_SUCCESS
        if served:
            self.ring.avail_idx = 0
            self.ram.bytes[RING:HEADER] = bytes(HEADER - RING)
            await self.driver.set_queue(self.ring, offset=offset)
            await self.driver.go()
        return served

    async def read(self, offset: int = 0) -> bool:
        """Whether a read of the first sector comes back, with addresses moved by `offset`."""
        self.ram.bytes[HEADER : HEADER + 16] = REQUEST_HEADER.pack(BlkRequest.IN, 0, 0)
        self.ram.bytes[STATUS] = 0xFF
        buffers = [(HEADER + offset, 16, False), (DATA + offset, 512, True), (STATUS + offset, 1, True)]
        self.ring.put_chain(buffers)
        await self.driver.kick()
        return self.ram.bytes[STATUS] == BlkStatus.OK

    @property
    def fault(self) -> str | None:
        return self.board.faults().get("vm1/d")


MakeRig = Callable[[DmaOffer], Awaitable[Rig]]


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 1 << 20)
    async with trio.open_nursery() as nursery:

        async def make(offer: DmaOffer) -> Rig:
            rig = Rig(offer, fd)
            for body in rig.board.default_windows():
                assert await rig.port.create_window(body)
            nursery.start_soon(rig.board.run)
            return rig

        yield make
        nursery.cancel_scope.cancel()
    os.close(fd)


def map_ram(rig: Rig, base: int) -> None:
    """Map the guest's RAM at bus address `base` of the default window."""
    table = rig.board.bridge.bus_domain.windows[0]
    for gpa in range(0, rig.ram.size_bytes, table.page_bytes):
        table.store((base + gpa) // table.page_bytes, tce(gpa, BOTH))


async def test_the_bypass_takes_a_device_out_of_the_iommu_until_it_is_reset(make_rig: MakeRig) -> None:
    rig = await make_rig(BYPASS_OFFER)
    map_ram(rig, 0x10_0000)
    assert await rig.start(PLATFORM, offset=0x10_0000)
    assert await rig.read(0x10_0000)
    assert await rig.bypass(1) == HCode.H_IN_USE

    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    assert await rig.start(PLATFORM, bypass=(1,))
    assert await rig.read()
    assert rig.board.n_iommu_lookups

    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    assert await rig.start(PLATFORM, offset=0x10_0000)
    assert await rig.read(0x10_0000)


async def test_the_bypass_is_taken_back_by_the_call_that_switched_it_on(make_rig: MakeRig) -> None:
    rig = await make_rig(BYPASS_OFFER)
    map_ram(rig, 0x10_0000)
    assert await rig.start(PLATFORM, offset=0x10_0000, bypass=(1, 0))
    assert await rig.read(0x10_0000)


async def test_the_bypass_ends_with_a_reset_of_the_machine(make_rig: MakeRig) -> None:
    rig = await make_rig(BYPASS_OFFER)
    assert await rig.start(PLATFORM, bypass=(1,))
    await rig.board.reset()
    rig.board.bridge.assign_bars()
    assert await rig.start(PLATFORM)
    assert not await rig.read()
    assert rig.fault is not None


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ({"enable": 2}, HCode.H_PARAMETER),
        ({"enable": 1, "buid": 0}, HCode.H_PARAMETER),
        ({"enable": 1, "config_addr": 2 << 11}, HCode.H_PARAMETER),
        ({"enable": 1, "config_addr": CONFIG_ADDR | 4}, HCode.H_PARAMETER),
        ({"enable": 1, "config_addr": 1 << 63}, HCode.H_PARAMETER),
    ],
)
async def test_s5_a_bypass_of_no_device_is_refused(make_rig: MakeRig, call: dict[str, int], code: HCode) -> None:
    rig = await make_rig(BYPASS_OFFER)
    assert await rig.bypass(**call) == code


async def test_a_machine_without_such_a_device_knows_no_such_call(make_rig: MakeRig) -> None:
    rig = await make_rig(PLATFORM_OFFER)
    assert await rig.bypass(1) == HCode.H_FUNCTION


async def test_the_switch_register_puts_a_device_behind_the_iommu_until_the_machine_is_reset(make_rig: MakeRig) -> None:
    rig = await make_rig(DmaOffer(iommu_switch=True))
    assert not has_feature(await rig.driver.features(), Feature.ACCESS_PLATFORM)
    await rig.driver.store(IOMMU_SWITCH, 1)
    assert rig.driver.load(IOMMU_SWITCH) == 1
    assert has_feature(await rig.driver.features(), Feature.ACCESS_PLATFORM)
    assert not await rig.start(0)
    assert await rig.start(PLATFORM)

    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    assert rig.driver.load(IOMMU_SWITCH) == 1
    await rig.board.reset()
    rig.board.bridge.assign_bars()
    assert rig.driver.load(IOMMU_SWITCH) == 0


async def test_an_old_device_has_no_switch_register(make_rig: MakeRig) -> None:
    rig = await make_rig(NO_OFFER)
    await rig.driver.store(IOMMU_SWITCH, 1)
    assert rig.driver.load(IOMMU_SWITCH) == 0
    assert await rig.start(0)
    assert await rig.read()


async def test_a_driver_that_had_settled_its_features_must_begin_again_when_its_device_moves(make_rig: MakeRig) -> None:
    rig = await make_rig(NO_OFFER)
    assert await rig.start(0)
    assert await rig.read()

    rig.board.turned_secure()

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    assert not await rig.read()
    assert rig.fault is not None
    assert "turned secure" in rig.fault
    assert not await rig.start(0)
    map_ram(rig, 0x20_0000)
    assert await rig.start(PLATFORM, offset=0x20_0000)
    assert await rig.read(0x20_0000)


async def test_a_promise_is_checked_when_the_device_starts(make_rig: MakeRig) -> None:
    rig = await make_rig(IDENTITY_OFFER)
    assert await rig.start(PLATFORM | IDENTITY)
    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET

    map_ram(rig, 0)
    assert await rig.start(PLATFORM | IDENTITY)
    lookups = rig.board.n_iommu_lookups
    assert await rig.read()
    assert rig.board.n_iommu_lookups == lookups


async def test_a_promise_broken_later_is_not_looked_at_again(make_rig: MakeRig) -> None:
    rig, other = await make_rig(IDENTITY_OFFER), await make_rig(IDENTITY_OFFER)
    map_ram(rig, 0)
    assert await rig.start(PLATFORM | IDENTITY)
    assert await rig.read()
    rig.board.bridge.bus_domain.windows[0].store(3, 0)
    other.board.load(rig.board.save())

    for board in (rig.board, other.board):
        (states,) = board.reach().values()
        assert sum(states.values()) == N_PAGES
        assert not board.functions[0].device.fault


async def test_where_a_device_is_is_saved_and_loaded(make_rig: MakeRig) -> None:
    rig, other = await make_rig(BYPASS_OFFER), await make_rig(BYPASS_OFFER)
    assert await rig.start(PLATFORM, bypass=(1,))
    other.board.load(rig.board.save())
    assert await other.read()


# -- what a hostile device reaches ----------------------------------------------------------------------------------


async def test_a_device_reaches_all_of_ram_past_the_iommu_and_what_is_mapped_behind_it(make_rig: MakeRig) -> None:
    rig = await make_rig(OPTIONAL_OFFER)
    device = rig.board.functions[0].device.name
    assert rig.board.reach()[device] == {HostState.ABSENT: 0, HostState.PRESENT: 0, HostState.SHARED: 0}

    assert await rig.start(0)
    rig.ram.view[5], rig.ram.view[6] = HostState.ABSENT, HostState.SHARED
    assert rig.board.reach()[device] == {HostState.ABSENT: 1, HostState.PRESENT: 14, HostState.SHARED: 1}

    table = rig.board.bridge.bus_domain.windows[0]
    table.store(7, tce(6 * PAGE_BYTES + 0x1000, TcePermission.READ))
    table.store(8, tce(5 * PAGE_BYTES, TcePermission.NONE))
    for index in range(RING >> 12, HEADER >> 12):
        table.store(index, tce(index << 12, BOTH))
    assert await rig.start(PLATFORM)
    assert rig.board.reach()[device] == {HostState.ABSENT: 0, HostState.PRESENT: 1, HostState.SHARED: 1}
