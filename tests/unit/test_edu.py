"""QEMU's educational device through its whole path: board, bridge, BAR, DMA windows. Yardstick: docs/specs/edu."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codes import HCode, RtasStatus
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.rtas import status_word
from protocol.startup import DEFAULT_DMA_BITS, DeviceEntry
from services.qemu.board import Board, BoardState
from services.qemu.edu import EduPciState, EduState
from services.qemu.testing import TestEdu, TestPort, TestRam, board_entry
from shared.edu import (
    BAR_BYTES,
    BUFFER_ADDRESS,
    BUFFER_BYTES,
    FIRST_WIDE,
    IDENTIFICATION,
    EduDma,
    EduIrq,
    EduRegister,
    EduStatus,
)
from shared.host_view import HostState
from shared.pci import MSI_ENABLE, Command, Config, MsiField
from shared.tce import TcePermission, TceTable, tce

RAM_BYTES = 16 * PAGE_BYTES
SLOT1 = 1 << 11
BUID_HIGH, BUID_LOW = 0x8000000, 0x20000000
LSI, FIRST_MSI = 0x1201, 0x1300
IOBA = 0x4000000
"""Where RAM lies on the bus, one to one from here."""
FROM_RAM = EduDma(0)
HIGH_WORD = (1 << 64) - 1
PATTERN = random.Random(1).randbytes(RAM_BYTES)


@dataclass
class Rig:
    """A board with one edu, its driver, and the table of the bus."""

    ram: TestRam
    board: Board
    port: TestPort
    edu: TestEdu
    table: TceTable

    def map_all(self, permission: TcePermission = TcePermission.READ | TcePermission.WRITE, ioba: int = IOBA) -> None:
        for page in range(RAM_BYTES >> 12):
            self.table.store((ioba >> 12) + page, tce(page << 12, permission))

    def fault(self) -> str:
        """The one fault, as the operator reads it in log and status."""
        (told,) = self.port.faults
        assert self.board.faults() == dict(self.port.faults)
        return told[1]


def new_rig(*, time: str = "instructions", dma_bits: int = DEFAULT_DMA_BITS) -> Rig:
    entry = board_entry([], [DeviceEntry(kind="edu", name="edu", dma_bits=dma_bits)], memory_bytes=RAM_BYTES, time=time)
    ram, port = TestRam(RAM_BYTES), TestPort()
    board = Board(entry, ram.accessor, {}, port, assign_bars=True)
    (window,) = board.default_windows()
    table = TceTable(window, memoryview(bytearray(window.n_tces * 8)))
    board.add_dma_window(table)
    rig = Rig(ram, board, port, TestEdu(board, board.functions[0]), table)
    rig.map_all()
    return rig


MakeRig = Callable[..., Rig]


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    async with trio.open_nursery() as nursery:

        def make(*, time: str = "instructions", dma_bits: int = DEFAULT_DMA_BITS) -> Rig:
            rig = new_rig(time=time, dma_bits=dma_bits)
            nursery.start_soon(rig.board.run)
            return rig

        yield make
        nursery.cancel_scope.cancel()


# Registers.


async def test_it_is_found_as_qemu_s_and_says_that_it_is_alive(make_rig: MakeRig) -> None:
    rig = make_rig()
    config = rig.edu.function.read_config

    assert (config(Config.VENDOR_ID, 2), config(Config.DEVICE_ID, 2)) == (0x1234, 0x11E8)
    assert config(Config.REVISION, 4) == 0x00FF0010
    assert rig.edu.load(EduRegister.IDENTIFICATION) == IDENTIFICATION == 0x010000ED
    await rig.edu.store(EduRegister.LIVENESS, 0x12345678)
    assert rig.edu.load(EduRegister.LIVENESS) == 0xEDCBA987


@pytest.mark.parametrize("number", [0, 1, 5, 12, 13, 33, 34, 35, 1000, 0xFFFFFFFF])
async def test_a_factorial_has_32_bits_and_takes_no_time(make_rig: MakeRig, number: int) -> None:
    rig = make_rig()

    await rig.edu.store(EduRegister.FACTORIAL, number)

    assert rig.edu.load(EduRegister.STATUS) == 0
    assert rig.edu.load(EduRegister.FACTORIAL) == (math.factorial(number) & 0xFFFFFFFF if number < 2000 else 0)


async def test_a_driver_has_to_wait_for_a_factorial_and_cannot_start_another(make_rig: MakeRig) -> None:
    rig = make_rig(time="wall")

    await rig.edu.store(EduRegister.FACTORIAL, 5)
    await rig.edu.store(EduRegister.FACTORIAL, 7)
    await rig.edu.store(EduRegister.STATUS, EduStatus.IRQ_WHEN_DONE)
    assert rig.edu.load(EduRegister.STATUS) == EduStatus.IRQ_WHEN_DONE | EduStatus.COMPUTING
    await rig.board.drained()

    assert rig.edu.load(EduRegister.FACTORIAL) == 120
    assert rig.edu.load(EduRegister.IRQ_STATUS) == EduIrq.FACTORIAL
    assert rig.edu.load(EduRegister.STATUS) == EduStatus.IRQ_WHEN_DONE
    assert rig.port.levels == {LSI: True}


async def test_a_driver_cannot_say_that_the_device_computes(make_rig: MakeRig) -> None:
    rig = make_rig()

    await rig.edu.store(EduRegister.STATUS, 0xFFFFFFFF)

    assert rig.edu.load(EduRegister.STATUS) == EduStatus.IRQ_WHEN_DONE


async def test_the_high_half_of_a_wide_register_comes_with_an_access_of_eight_bytes_alone(make_rig: MakeRig) -> None:
    rig = make_rig()
    at = rig.edu.gpa + EduRegister.DMA_SOURCE
    await rig.edu.store(EduRegister.DMA_SOURCE, 0x1122334455667788)

    assert rig.board.mmio_load(at, 4) == (HCode.H_SUCCESS, 0x55667788)
    assert rig.board.mmio_load(at + 4, 4) == (HCode.H_SUCCESS, 0xFFFFFFFF)
    await rig.board.mmio_store(at + 4, 4, 1)
    await rig.board.mmio_store(at, 4, 7)
    assert rig.edu.load(EduRegister.DMA_SOURCE) == 7


# Interrupts.


async def test_the_line_is_up_until_every_cause_is_acknowledged(make_rig: MakeRig) -> None:
    rig = make_rig()

    await rig.edu.store(EduRegister.IRQ_RAISE, 0x30)
    await rig.edu.store(EduRegister.IRQ_ACKNOWLEDGE, 0x10)
    assert rig.edu.load(EduRegister.IRQ_STATUS) == 0x20
    assert rig.port.levels == {LSI: True}

    await rig.edu.store(EduRegister.IRQ_ACKNOWLEDGE, 0x20)
    assert rig.port.levels == {LSI: False}


async def enable_messages(rig: Rig) -> None:
    """As Linux: ask the platform for the message, then set the capability's enable bit."""
    ok, *granted = await rig.board.rtas("ibm,change-msi", [SLOT1, BUID_HIGH, BUID_LOW, 3, 1, 1], 4)
    assert (ok, granted) == (0, [1, 2, 1])
    capability = rig.edu.function.read_config(Config.CAPABILITIES, 1)
    rig.edu.function.write_config(capability + MsiField.CONTROL, 2, MSI_ENABLE)


async def test_with_a_message_there_is_an_edge_and_no_level(make_rig: MakeRig) -> None:
    rig = make_rig()
    await enable_messages(rig)

    await rig.edu.store(EduRegister.IRQ_RAISE, 1)
    await rig.edu.store(EduRegister.IRQ_RAISE, 2)

    assert rig.port.edges == [FIRST_MSI, FIRST_MSI]
    assert rig.port.levels.get(LSI, False) is False


async def test_messages_take_the_line_down_that_was_up(make_rig: MakeRig) -> None:
    rig = make_rig()
    await rig.edu.store(EduRegister.IRQ_RAISE, 1)
    assert rig.port.levels == {LSI: True}

    await enable_messages(rig)

    assert rig.port.levels == {LSI: False}


async def test_change_msi_gives_it_one_message_and_no_msix(make_rig: MakeRig) -> None:
    rig = make_rig()
    device = [SLOT1, BUID_HIGH, BUID_LOW]

    assert await rig.board.rtas("ibm,change-msi", [*device, 1, 8, 1], 4) == [0, 1, 2, 1]
    assert await rig.board.rtas("ibm,query-interrupt-source-number", [*device, 0], 3) == [0, FIRST_MSI, 1]
    assert (await rig.board.rtas("ibm,change-msi", [*device, 4, 1, 1], 4))[0] == status_word(RtasStatus.PARAMETER_ERROR)
    assert await rig.board.rtas("ibm,change-msi", [*device, 1, 0, 1], 4) == [0, 0, 2, 1]
    assert not rig.board.bridge.msis.blocks


async def test_without_bus_mastering_there_is_no_message(make_rig: MakeRig) -> None:
    rig = make_rig()
    await enable_messages(rig)
    rig.edu.function.write_config(Config.COMMAND, 2, Command.MEMORY)

    await rig.edu.store(EduRegister.IRQ_RAISE, 1)

    assert rig.port.edges == []


# DMA.


async def test_a_block_goes_to_the_buffer_and_back(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.ram.bytes[0x1800:0x1864] = bytes(range(100))

    await rig.edu.transfer(IOBA + 0x1800, BUFFER_ADDRESS + 8, 100, FROM_RAM)
    assert rig.edu.load(EduRegister.DMA_COMMAND) == 0
    assert rig.edu.load(EduRegister.IRQ_STATUS) == 0
    await rig.edu.transfer(BUFFER_ADDRESS + 8, IOBA + 0x2FFF, 100, EduDma.TO_RAM | EduDma.IRQ_WHEN_DONE)

    assert rig.ram.bytes[0x2FFF : 0x2FFF + 100] == bytes(range(100))
    assert rig.edu.load(EduRegister.DMA_COMMAND) == EduDma.TO_RAM | EduDma.IRQ_WHEN_DONE
    assert rig.edu.load(EduRegister.IRQ_STATUS) == EduIrq.DMA
    assert rig.port.faults == []


async def test_only_what_it_writes_is_marked_for_the_host(make_rig: MakeRig) -> None:
    rig = make_rig()

    await rig.edu.transfer(IOBA + 3 * PAGE_BYTES, BUFFER_ADDRESS, BUFFER_BYTES, FROM_RAM)
    assert not any(rig.ram.dirty)
    await rig.edu.transfer(BUFFER_ADDRESS, IOBA + 2 * PAGE_BYTES - 1, 2, EduDma.TO_RAM)

    assert [gfn for gfn, mark in enumerate(rig.ram.dirty) if mark] == [1, 2]


async def test_a_page_that_the_host_has_not_is_asked_for(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.ram.view[1] = HostState.ABSENT

    await rig.edu.transfer(BUFFER_ADDRESS, IOBA + PAGE_BYTES, 16, EduDma.TO_RAM)

    assert rig.ram.wanted == [1]
    assert rig.port.faults == []


async def test_a_page_without_the_permission_is_a_fault_and_the_next_transfer_is_served(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.map_all(TcePermission.READ)
    rig.ram.bytes[0x1000:0x1010] = b"read this please"

    await rig.edu.transfer(BUFFER_ADDRESS, IOBA, 16, EduDma.TO_RAM | EduDma.IRQ_WHEN_DONE)
    assert "the device may not write ioba 0x4000000" in rig.fault()
    assert rig.edu.load(EduRegister.IRQ_STATUS) == EduIrq.DMA
    assert not any(rig.ram.dirty)

    await rig.edu.transfer(IOBA + 0x1000, BUFFER_ADDRESS, 16, FROM_RAM)
    assert rig.edu.function.device.state.buffer[:16] == b"read this please"


async def test_a_transfer_that_faults_on_its_second_page_copies_nothing(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.table.store((IOBA >> 12) + 1, 0)
    before = bytes(rig.ram.bytes)

    await rig.edu.transfer(BUFFER_ADDRESS, IOBA + 0xFF0, 32, EduDma.TO_RAM)
    await rig.edu.transfer(IOBA + 0xFF0, BUFFER_ADDRESS, 32, FROM_RAM)

    assert rig.ram.bytes == before
    assert rig.edu.function.device.state.buffer == bytes(BUFFER_BYTES)
    assert len(rig.port.faults) == 2


async def test_a_guest_address_is_no_bus_address(make_rig: MakeRig) -> None:
    rig = make_rig()

    await rig.edu.transfer(0x1000, BUFFER_ADDRESS, 16, FROM_RAM)

    assert "the device may not read ioba 0x1000" in rig.fault()


@pytest.mark.parametrize(("dma_bits", "reached"), [(28, False), (29, False), (30, True), (64, True)])
async def test_the_device_has_no_more_address_bits_than_it_was_given(
    make_rig: MakeRig, dma_bits: int, reached: bool
) -> None:
    rig = make_rig(dma_bits=dma_bits)
    rig.map_all(ioba=0x20000000)

    await rig.edu.transfer(BUFFER_ADDRESS, 0x20000000, 4, EduDma.TO_RAM)

    assert any(rig.ram.dirty) is reached
    if not reached:
        assert rig.fault() == f"DMA: 4 bytes at ioba 0x20000000 are beyond the device's {dma_bits} address bits"


async def test_the_last_byte_counts_for_the_address_bits(make_rig: MakeRig) -> None:
    rig = make_rig(dma_bits=12)
    rig.map_all(ioba=0)

    await rig.edu.transfer(0xFF0, BUFFER_ADDRESS, 16, FROM_RAM)
    assert rig.port.faults == []
    await rig.edu.transfer(0xFF0, BUFFER_ADDRESS, 17, FROM_RAM)
    assert "beyond the device's 12 address bits" in rig.fault()


async def test_without_bus_mastering_it_reaches_no_memory(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.edu.function.write_config(Config.COMMAND, 2, Command.MEMORY)

    await rig.edu.transfer(IOBA, BUFFER_ADDRESS, 16, FROM_RAM)

    assert "master" in rig.fault()


# S5: hostile drivers.


@pytest.mark.parametrize(
    ("buffer", "count"),
    [
        (BUFFER_ADDRESS, BUFFER_BYTES + 1),
        (BUFFER_ADDRESS, HIGH_WORD),
        (BUFFER_ADDRESS, 1 << 40),
        (BUFFER_ADDRESS + BUFFER_BYTES - 3, 4),
        (BUFFER_ADDRESS - 1, 4),
        (0, 4),
        (HIGH_WORD, 1),
        (HIGH_WORD - BUFFER_BYTES, HIGH_WORD),
    ],
)
@pytest.mark.parametrize("direction", [FROM_RAM, EduDma.TO_RAM])
async def test_s5_what_leaves_the_buffer_is_a_fault_with_a_name(
    make_rig: MakeRig, buffer: int, count: int, direction: EduDma
) -> None:
    rig = make_rig()
    ends = (buffer, IOBA) if direction else (IOBA, buffer)

    await rig.edu.transfer(*ends, count, direction)

    assert rig.fault() == f"DMA: {count} bytes at device address {buffer:#x} are outside the device's buffer"
    assert not any(rig.ram.dirty)


async def test_s5_a_transfer_that_fails_again_and_again_is_one_line_for_the_operator(make_rig: MakeRig) -> None:
    rig = make_rig()

    for _ in range(100):
        await rig.edu.transfer(IOBA, 0, 4, FROM_RAM)

    assert len(rig.port.faults) == 1


async def test_s5_memory_that_kvm_does_not_give_is_a_fault(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.ram.view[0] = HostState.ABSENT
    rig.ram.refuse = True

    await rig.edu.transfer(IOBA, BUFFER_ADDRESS, 4, FROM_RAM)

    assert rig.fault() == "DMA: kvm does not give the page"


class Held:
    """Memory whose frames come when `gate` opens."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = trio.Event()
        self._give = rig.ram.accessor._want
        rig.ram.view[0] = HostState.ABSENT
        monkeypatch.setattr(rig.ram.accessor, "_want", self._want)

    async def _want(self, gfns: list[int]) -> None:
        await self.gate.wait()
        await self._give(gfns)


async def test_s5_nothing_of_a_transfer_under_way_can_be_changed(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(time="wall")
    held = Held(rig, monkeypatch)
    await rig.edu.transfer(BUFFER_ADDRESS, IOBA, 8, EduDma.TO_RAM)
    await trio.testing.wait_all_tasks_blocked()

    await rig.edu.transfer(IOBA, 0, HIGH_WORD, FROM_RAM)
    assert rig.edu.load(EduRegister.DMA_COMMAND) == EduDma.RUN | EduDma.TO_RAM
    assert rig.edu.load(EduRegister.DMA_COUNT) == 8
    held.gate.set()
    await rig.board.drained()

    assert rig.edu.load(EduRegister.DMA_COMMAND) == EduDma.TO_RAM
    assert rig.port.faults == []


async def test_s5_a_factorial_is_computed_behind_a_transfer_under_way(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(time="wall")
    held = Held(rig, monkeypatch)
    await rig.edu.transfer(IOBA, BUFFER_ADDRESS, 8, FROM_RAM)
    await trio.testing.wait_all_tasks_blocked()
    await rig.edu.store(EduRegister.FACTORIAL, 5)
    held.gate.set()

    await rig.board.drained()

    assert rig.edu.load(EduRegister.FACTORIAL) == 120


async def test_a_reset_waits_for_the_transfer_under_way_and_drops_what_it_brings(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(time="wall")
    held = Held(rig, monkeypatch)
    rig.ram.bytes[:4] = b"data"
    await rig.edu.transfer(IOBA, BUFFER_ADDRESS, 4, EduDma.IRQ_WHEN_DONE)
    await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.board.reset)
        await trio.testing.wait_all_tasks_blocked()
        assert rig.edu.function.device.state.command & EduDma.RUN
        held.gate.set()

    assert rig.edu.function.device.state == EduState()
    assert rig.port.levels.get(LSI, False) is False


async def test_a_reset_makes_a_transfer_that_has_not_begun_never_happen() -> None:
    rig = new_rig(time="wall")
    await rig.edu.transfer(BUFFER_ADDRESS, IOBA, 8, EduDma.TO_RAM)
    await rig.board.reset()
    rig.board.bridge.assign_bars()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.board.run)
        await rig.board.drained()
        nursery.cancel_scope.cancel()

    assert not any(rig.ram.dirty)


async def test_a_reset_takes_interrupts_and_faults_and_the_message_back(make_rig: MakeRig) -> None:
    rig = make_rig()
    await rig.edu.transfer(IOBA, 0, 4, FROM_RAM)
    await rig.edu.store(EduRegister.IRQ_RAISE, 1)
    await enable_messages(rig)

    await rig.board.reset()

    assert rig.port.levels == {LSI: False}
    assert rig.board.faults() == {}
    assert not rig.edu.function.msi.enabled and not rig.board.bridge.msis.blocks
    rig.board.bridge.assign_bars()
    assert rig.edu.load(EduRegister.IRQ_STATUS) == 0


async def test_a_saved_device_goes_on_in_another_board(make_rig: MakeRig) -> None:
    rig, other = make_rig(), make_rig()
    rig.ram.bytes[:5] = b"saved"
    await rig.edu.transfer(IOBA, BUFFER_ADDRESS, 5, FROM_RAM)
    await rig.edu.store(EduRegister.IRQ_RAISE, 8)
    await rig.edu.transfer(IOBA, 0, 4, FROM_RAM)

    saved = msgspec.msgpack.decode(msgspec.msgpack.encode(rig.board.save()), type=BoardState)
    other.board.load(saved)

    assert other.port.levels == {LSI: True}
    assert other.board.faults() == rig.board.faults()
    assert other.edu.load(EduRegister.IRQ_STATUS) == 8
    await other.edu.transfer(BUFFER_ADDRESS, IOBA + 0x100, 5, EduDma.TO_RAM)
    assert other.ram.bytes[0x100:0x105] == b"saved"


async def test_a_saved_device_of_another_kind_or_shape_is_refused(make_rig: MakeRig) -> None:
    rig = make_rig()
    saved = rig.board.save()
    (function,) = saved.functions.values()
    assert isinstance(function, EduPciState)
    rng = Board(
        board_entry([], [DeviceEntry(kind="virtio-rng")], memory_bytes=RAM_BYTES), rig.ram.accessor, {}, TestPort()
    )

    with pytest.raises(ValueError, match="other devices"):
        rig.board.load(rng.save())
    with pytest.raises(ValueError, match="none of vm1/edu"):
        running = msgspec.structs.replace(function.device, command=int(EduDma.RUN))
        rig.edu.function.device.load_state(running)


ACCESSES = st.tuples(
    st.booleans(),
    st.one_of(st.sampled_from(list(EduRegister)), st.integers(0, 0xA0), st.integers(0, BAR_BYTES - 1)),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(
        st.sampled_from([0, 1, 3, 5, 7, 0x80, IOBA, BUFFER_ADDRESS, BUFFER_ADDRESS + 4000, 96, 4096]),
        st.integers(0, HIGH_WORD),
    ),
)


@given(st.lists(ACCESSES, max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_s5_registers_in_any_order_and_width_are_answered(accesses: list[tuple[bool, int, int, int]]) -> None:
    rig = new_rig()
    liveness = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.board.run)
        for storing, offset, size, value in accesses:
            at = rig.edu.gpa + offset - offset % size
            if storing:
                assert await rig.board.mmio_store(at, size, value & (1 << size * 8) - 1) == HCode.H_SUCCESS
                if at == rig.edu.gpa + EduRegister.LIVENESS and size == 4:
                    liveness = ~value & 0xFFFFFFFF
            else:
                code, loaded = rig.board.mmio_load(at, size)
                assert code == HCode.H_SUCCESS and 0 <= loaded < 1 << size * 8
                if size < 4 or (size == 8 and at < rig.edu.gpa + FIRST_WIDE):
                    assert loaded == (1 << size * 8) - 1
            state = rig.edu.function.device.state
            # What it was told is done, and it is the same device as before.
            assert not state.command & EduDma.RUN and not state.status & EduStatus.COMPUTING
            assert len(state.buffer) == BUFFER_BYTES
            assert rig.edu.load(EduRegister.IDENTIFICATION) == IDENTIFICATION
            assert rig.edu.load(EduRegister.LIVENESS) == liveness
            assert rig.port.levels.get(LSI, False) is bool(state.irq_status)
        nursery.cancel_scope.cancel()


@given(st.integers(0, 3 * PAGE_BYTES), st.integers(0, BUFFER_BYTES + 8), st.integers(0, BUFFER_BYTES), st.booleans())
@settings(max_examples=150, deadline=None)
async def test_a_transfer_moves_exactly_its_bytes_or_none(at: int, count: int, place: int, to_ram: bool) -> None:
    rig = new_rig()
    rig.ram.bytes[:] = PATTERN
    device = rig.edu.function.device
    device.state.buffer = PATTERN[100_000 : 100_000 + BUFFER_BYTES]
    ram, buffer = bytearray(PATTERN), bytearray(device.state.buffer)
    fits = place + count <= BUFFER_BYTES
    if fits and to_ram:
        ram[at : at + count] = buffer[place : place + count]
    elif fits:
        buffer[place : place + count] = ram[at : at + count]
    ends = (BUFFER_ADDRESS + place, IOBA + at) if to_ram else (IOBA + at, BUFFER_ADDRESS + place)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.board.run)
        await rig.edu.transfer(*ends, count, EduDma.TO_RAM if to_ram else FROM_RAM)
        nursery.cancel_scope.cancel()

    assert (rig.ram.bytes, device.state.buffer) == (ram, bytes(buffer))
    assert bool(rig.port.faults) is not fits
    written = {gfn for gfn in range(RAM_BYTES >> PAGE_SHIFT) if rig.ram.dirty[gfn]}
    assert written == ({byte >> PAGE_SHIFT for byte in range(at, at + count)} if fits and to_ram else set())
