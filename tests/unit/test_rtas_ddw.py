"""Dynamic DMA windows: what a guest may make, where it lies, what a reset leaves. Yardstick: QEMU and enable_ddw."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codes import RtasStatus
from protocol.geometry import PAGE_BYTES
from protocol.startup import DeviceEntry, DiskEntry, IommuDomain
from services.qemu.board import Board
from services.qemu.rtas_ddw import DMA64_BASE, MAX_WINDOW_TCES
from services.qemu.testing import TestPort, TestRam, board_entry
from shared.tce import WINDOWS_PER_DOMAIN

MIB = 1 << 20
BUID = 0x800000020000000
CONFIG_ADDR = 1 << 11
DEVICE = [CONFIG_ADDR, BUID >> 32, BUID & 0xFFFFFFFF]
FIRST, SECOND = 0x80000000, 0x80000001
OK, BAD, HARDWARE = RtasStatus.SUCCESS, RtasStatus.PARAMETER_ERROR, RtasStatus.HARDWARE_ERROR


class Rig:
    """A board with one function in slot 1, or `devices`, and `memory_bytes` of RAM that nobody touches."""

    def __init__(self, memory_bytes: int = 256 * MIB, devices: Sequence[DeviceEntry] = ()) -> None:
        entry = board_entry([DiskEntry(name="d", path="")], devices, memory_bytes=memory_bytes, time="wall")
        self.port = TestPort()
        self.disk = os.memfd_create("disk")
        os.ftruncate(self.disk, MIB)
        self.board = Board(entry, TestRam(PAGE_BYTES).accessor, {"d": self.disk}, self.port)
        self.port.board = self.board

    async def power_on(self) -> None:
        """The default window, as the process makes it."""
        for window in self.board.default_windows():
            assert await self.port.create_window(window)

    async def rtas(self, name: str, args: list[int], n_rets: int) -> tuple[int, list[int]]:
        status, *rets = await self.board.rtas(name, args, n_rets)
        return status - (1 << 32) if status >> 31 else status, rets

    async def query(self) -> list[int]:
        status, rets = await self.rtas("ibm,query-pe-dma-window", DEVICE, 5)
        assert status == OK
        return rets

    async def create(self, page_shift: int, window_shift: int) -> tuple[int, list[int]]:
        return await self.rtas("ibm,create-pe-dma-window", [*DEVICE, page_shift, window_shift], 4)

    async def remove(self, liobn: int) -> int:
        return (await self.rtas("ibm,remove-pe-dma-window", [liobn], 1))[0]

    def windows(self) -> list[tuple[int, int]]:
        """(liobn, base) of every window in use."""
        return [(table.liobn, table.base) for domain in self.board.bridge.domains for table in domain.windows]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.power_on()
    yield rig


async def test_one_window_is_left_beside_the_default_one(rig: Rig) -> None:
    left, largest, page_sizes, migration = await rig.query()
    assert (left, largest, migration) == (1, MAX_WINDOW_TCES, 0)
    assert page_sizes == 0b111 | 1 << 8


async def test_a_page_size_that_ram_does_not_divide_into_is_not_offered() -> None:
    rig = Rig(250 * MIB)
    await rig.power_on()
    assert (await rig.query())[2] == 0b11 | 1 << 8
    assert (await rig.create(24, 28))[0] == BAD


async def test_the_second_window_lies_at_the_64_bit_base(rig: Rig) -> None:
    assert await rig.create(24, 28) == (OK, [SECOND, DMA64_BASE >> 32, 0])
    (window,) = [window for window in rig.port.windows.values() if window.liobn == SECOND]
    assert (window.page_shift, window.n_tces) == (24, 16)
    assert rig.windows() == [(FIRST, 0), (SECOND, DMA64_BASE)]
    assert (await rig.create(24, 28))[0] == HARDWARE
    assert (await rig.query())[0] == 0


async def test_without_the_default_window_the_first_new_one_takes_its_place(rig: Rig) -> None:
    await rig.create(16, 28)
    assert await rig.remove(FIRST) == OK
    assert rig.windows() == [(SECOND, DMA64_BASE)]
    assert await rig.create(12, 30) == (OK, [FIRST, DMA64_BASE >> 32, 0])


async def test_the_last_window_that_goes_brings_the_default_one_back(rig: Rig) -> None:
    await rig.create(16, 28)
    await rig.remove(FIRST)
    assert await rig.remove(SECOND) == OK
    assert rig.windows() == [(FIRST, 0)]


async def test_a_guest_that_gives_up_the_default_window_alone_gets_its_next_one_at_bus_address_0(rig: Rig) -> None:
    assert await rig.remove(FIRST) == OK
    assert rig.windows() == []
    assert (await rig.query())[0] == 2
    assert await rig.create(24, 28) == (OK, [FIRST, 0, 0])

    assert await rig.remove(FIRST) == OK
    assert rig.windows() == [(FIRST, 0)]
    assert (await rig.create(24, 28))[1][0] == SECOND


async def test_a_reset_brings_back_a_default_window_that_was_given_up(rig: Rig) -> None:
    await rig.remove(FIRST)
    await rig.board.reset()
    assert rig.windows() == [(FIRST, 0)]


async def test_reset_leaves_the_default_window_empty(rig: Rig) -> None:
    rig.board.bridge.bus_domain.windows[0].store(5, 0x10003)
    assert (await rig.rtas("ibm,reset-pe-dma-window", DEVICE, 1))[0] == OK
    assert rig.windows() == [(FIRST, 0)]
    assert rig.board.bridge.bus_domain.windows[0].entry(5) == 0


async def test_reset_leaves_the_default_window_alone(rig: Rig) -> None:
    await rig.create(16, 28)
    assert (await rig.rtas("ibm,reset-pe-dma-window", DEVICE, 1))[0] == OK
    assert rig.windows() == [(FIRST, 0)]
    await rig.create(16, 28)
    await rig.remove(FIRST)
    await rig.board.reset()
    assert rig.windows() == [(FIRST, 0)]


@pytest.mark.parametrize(
    ("page_shift", "window_shift", "status"),
    [
        (12, 11, BAD),
        (13, 28, BAD),
        (34, 36, BAD),
        (12, 37, HARDWARE),
        (12, 60, BAD),
        (0, 28, BAD),
        (12, 0xFFFFFFFF, BAD),
    ],
)
async def test_a_shift_that_is_not_offered_makes_nothing(
    rig: Rig, page_shift: int, window_shift: int, status: RtasStatus
) -> None:
    assert (await rig.create(page_shift, window_shift))[0] == status
    assert rig.windows() == [(FIRST, 0)]


async def test_a_window_that_kvm_does_not_make_is_a_hardware_error(rig: Rig) -> None:
    rig.port.board = None
    assert (await rig.create(16, 28))[0] == HARDWARE
    assert rig.windows() == [(FIRST, 0)]


async def test_s5_other_devices_bridges_and_liobns_are_parameter_errors(rig: Rig) -> None:
    for device in ([CONFIG_ADDR, 0, 0], [31 << 11, *DEVICE[1:]], [1 << 16 | CONFIG_ADDR, *DEVICE[1:]]):
        assert (await rig.rtas("ibm,query-pe-dma-window", device, 5))[0] == BAD
        assert (await rig.rtas("ibm,create-pe-dma-window", [*device, 16, 28], 4))[0] == BAD
        assert (await rig.rtas("ibm,reset-pe-dma-window", device, 1))[0] == BAD
    for liobn in (SECOND, 0, 0x80000100, 0xFFFFFFFF):
        assert await rig.remove(liobn) == BAD


@given(st.lists(st.tuples(st.sampled_from(["create", "remove", "reset"]), st.integers(0, 2)), max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_a_guest_does_there_are_never_more_than_two_windows(steps: list[tuple[str, int]]) -> None:
    rig = Rig()
    await rig.power_on()
    for what, number in steps:
        if what == "create":
            await rig.create((12, 16, 24)[number], 28)
        elif what == "remove":
            await rig.remove(FIRST + number)
        else:
            await rig.rtas("ibm,reset-pe-dma-window", DEVICE, 1)
        windows = rig.windows()
        assert len(windows) <= WINDOWS_PER_DOMAIN
        assert len({liobn for liobn, _ in windows}) == len(windows)
        assert set(rig.port.windows) == {liobn for liobn, _ in windows}


OWN_DEVICE = [2 << 11, *DEVICE[1:]]
OWN_FIRST, OWN_SECOND = 0x80000004, 0x80000005


@pytest.fixture
async def mixed() -> AsyncIterator[Rig]:
    """A device that translates as the bus, in slot 1, and one with a domain of its own, in slot 2."""
    rig = Rig(devices=[DeviceEntry(kind="virtio-rng"), DeviceEntry(kind="virtio-rng", iommu_domain=IommuDomain.OWN)])
    await rig.power_on()
    yield rig


async def test_a_domain_of_its_own_starts_with_a_default_window_of_its_own(mixed: Rig) -> None:
    assert mixed.windows() == [(FIRST, 0), (OWN_FIRST, 0)]


async def test_each_device_queries_and_makes_windows_of_its_own_domain(mixed: Rig) -> None:
    made = await mixed.rtas("ibm,create-pe-dma-window", [*OWN_DEVICE, 16, 28], 4)

    assert made == (OK, [OWN_SECOND, DMA64_BASE >> 32, 0])
    assert (await mixed.rtas("ibm,query-pe-dma-window", OWN_DEVICE, 5))[1][0] == 0
    assert (await mixed.query())[0] == 1
    assert await mixed.create(16, 28) == (OK, [SECOND, DMA64_BASE >> 32, 0])
    assert mixed.windows() == [(FIRST, 0), (SECOND, DMA64_BASE), (OWN_FIRST, 0), (OWN_SECOND, DMA64_BASE)]


async def test_the_last_window_of_a_domain_that_goes_brings_that_domain_s_default_back(mixed: Rig) -> None:
    await mixed.rtas("ibm,create-pe-dma-window", [*OWN_DEVICE, 16, 28], 4)
    await mixed.remove(OWN_FIRST)
    assert mixed.windows() == [(FIRST, 0), (OWN_SECOND, DMA64_BASE)]

    assert await mixed.remove(OWN_SECOND) == OK

    assert mixed.windows() == [(FIRST, 0), (OWN_FIRST, 0)]


async def test_a_reset_of_one_domain_leaves_the_other_and_one_of_the_machine_neither(mixed: Rig) -> None:
    for device in (DEVICE, OWN_DEVICE):
        await mixed.rtas("ibm,create-pe-dma-window", [*device, 16, 28], 4)

    assert (await mixed.rtas("ibm,reset-pe-dma-window", OWN_DEVICE, 1))[0] == OK
    assert mixed.windows() == [(FIRST, 0), (SECOND, DMA64_BASE), (OWN_FIRST, 0)]

    await mixed.board.reset()
    assert mixed.windows() == [(FIRST, 0), (OWN_FIRST, 0)]
