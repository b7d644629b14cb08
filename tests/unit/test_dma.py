"""Device addresses: straight, or through TCE windows."""

import pytest

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES
from protocol.messages import TceWindowBody
from services.qemu.dma import BypassSpace, DmaFault, IommuSpace
from services.qemu.testing import TestRam
from shared.host_view import HostState
from shared.tce import TcePermission, TceTable, tce

RW = TcePermission.READ | TcePermission.WRITE
IOBA = 0x4000


def iommu(ram: TestRam, entries: dict[int, int], base: int = 0) -> IommuSpace:
    table = TceTable(TceWindowBody(0x80000000, 12, base, 64), memoryview(bytearray(64 * 8)))
    for index, value in entries.items():
        table.store(index, value)
    return IommuSpace(ram.accessor, [table])


async def test_bypass_reads_and_writes_guest_addresses() -> None:
    ram = TestRam(2 * PAGE_BYTES)
    space = BypassSpace(ram.accessor)

    await space.write(0x100, b"payload")

    assert ram.bytes[0x100:0x107] == b"payload"
    assert await space.read(0x100, 7) == b"payload"
    assert ram.dirty[0] and not ram.dirty[1]


async def test_an_absent_frame_is_asked_for() -> None:
    ram = TestRam(2 * PAGE_BYTES)
    ram.view[1] = HostState.ABSENT
    space = BypassSpace(ram.accessor)

    assert space.views_now(PAGE_BYTES, 8, writing=False) is None
    await space.store_u16(PAGE_BYTES, 0x1234)

    assert ram.wanted == [1]
    assert await space.load_u16(PAGE_BYTES) == 0x1234


@pytest.mark.parametrize("address", [2 * PAGE_BYTES - 4, 1 << 63, (1 << 64) - 1])
async def test_bypass_outside_ram_is_a_guest_fault(address: int) -> None:
    space = BypassSpace(TestRam(2 * PAGE_BYTES).accessor)

    with pytest.raises(GuestFault):
        await space.read(address, 8)
    with pytest.raises(GuestFault):
        await space.write(address, bytes(8))


async def test_iommu_gathers_scattered_pages() -> None:
    ram = TestRam(2 * PAGE_BYTES)
    space = iommu(ram, {4: tce(0x9000, RW), 5: tce(0x3000, RW)})

    await space.write(IOBA + 0xFFE, b"abcd")

    assert ram.bytes[0x9FFE:0xA000] == b"ab"
    assert ram.bytes[0x3000:0x3002] == b"cd"
    assert await space.read(IOBA + 0xFFE, 4) == b"abcd"
    views = space.views_now(IOBA + 0xFFE, 4, writing=False)
    assert views is not None and [bytes(view) for view in views] == [b"ab", b"cd"]


def test_adjacent_guest_pages_make_one_view() -> None:
    space = iommu(TestRam(2 * PAGE_BYTES), {4: tce(0x3000, RW), 5: tce(0x4000, RW)})

    assert space.spans(IOBA, 0x2000, writing=True) == [(0x3000, 0x2000)]


@pytest.mark.parametrize(("permission", "writing"), [(TcePermission.READ, True), (TcePermission.WRITE, False)])
def test_a_missing_permission_is_a_fault(permission: TcePermission, writing: bool) -> None:
    space = iommu(TestRam(2 * PAGE_BYTES), {4: tce(0x3000, permission)})

    with pytest.raises(GuestFault):
        space.check(IOBA, 1, writing=writing)


async def test_a_write_that_faults_on_its_second_page_changes_nothing() -> None:
    ram = TestRam(2 * PAGE_BYTES)
    space = iommu(ram, {4: tce(0x3000, RW), 5: tce(1 << 40, RW)})

    with pytest.raises(GuestFault):
        await space.write(IOBA + 0xFFF, b"xy")

    assert not any(ram.bytes)


def test_an_address_in_no_window_is_a_dma_fault() -> None:
    with pytest.raises(DmaFault):
        iommu(TestRam(PAGE_BYTES), {}, base=0).spans(1 << 59, 16, writing=False)


def test_the_second_window_serves_its_own_addresses() -> None:
    ram = TestRam(2 * PAGE_BYTES)
    space = iommu(ram, {0: tce(0x1000, RW)})
    space.windows = [*space.windows, *iommu(ram, {0: tce(0x5000, RW)}, base=1 << 59).windows]

    assert space.spans((1 << 59) + 8, 4, writing=True) == [(0x5008, 4)]
    assert space.spans(8, 4, writing=True) == [(0x1008, 4)]
