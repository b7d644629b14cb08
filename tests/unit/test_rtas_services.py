"""RTAS services that the device model answers."""

import os
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codes import RtasStatus
from protocol.geometry import PAGE_BYTES
from protocol.roles import Role
from protocol.rtas import RTAS, SERVED_BY, status_word
from protocol.startup import DiskEntry
from services.qemu.board import Board
from services.qemu.rtas import NVRAM_BYTES, READING_NS, RtasState
from services.qemu.testing import TestPort, TestRam, board_entry
from services.qemu.virtio_pci import VirtioPciFunction
from shared.pci import Config

HIGH, LOW = 0x8000000, 0x20000000
SLOT1 = 1 << 11
OK = 0
PARAMETER_ERROR = status_word(RtasStatus.PARAMETER_ERROR)
HARDWARE_ERROR = status_word(RtasStatus.HARDWARE_ERROR)
NS = 1_000_000_000


class Rig:
    """A board with one disk that does not run."""

    def __init__(self, fd: int, time: str = "wall") -> None:
        self.ram, self.port = TestRam(PAGE_BYTES), TestPort()
        entry = board_entry([DiskEntry(name="d", path="")], memory_bytes=256 << 20, time=time)
        self.board = Board(entry, self.ram.accessor, {"d": fd}, self.port)


@pytest.fixture
def rig() -> Iterator[Rig]:
    fd = os.memfd_create("disk")
    yield Rig(fd)
    os.close(fd)


def test_the_answered_services_are_those_declared_for_this_process(rig: Rig) -> None:
    declared = {RTAS.by_number[number].name for number, role in SERVED_BY.items() if role is Role.QEMU}

    assert rig.board.rtas_services.names == declared


async def test_an_unknown_service_is_a_parameter_error(rig: Rig) -> None:
    assert await rig.board.rtas("ibm,suspend-me", [], 1) == [PARAMETER_ERROR]
    assert await rig.board.rtas_token(0x3000, [], 1) == [PARAMETER_ERROR]


async def test_configuration_space_is_read_and_written_through_rtas(rig: Rig) -> None:
    read = RTAS.by_name["ibm,read-pci-config"].number

    assert await rig.board.rtas_token(read, [SLOT1 | Config.VENDOR_ID, HIGH, LOW, 2], 2) == [OK, 0x1AF4]
    assert await rig.board.rtas("read-pci-config", [SLOT1 | Config.DEVICE_ID, 2], 2) == [OK, 0x1042]
    assert await rig.board.rtas("ibm,write-pci-config", [SLOT1 | Config.COMMAND, HIGH, LOW, 2, 0x1FFFE], 1) == [OK]
    assert await rig.board.rtas("ibm,read-pci-config", [SLOT1 | Config.COMMAND, HIGH, LOW, 2], 2) == [OK, 0x546]


@pytest.mark.parametrize(
    "args",
    [
        [2 << 11, HIGH, LOW, 4],
        [1 << 16 | SLOT1, HIGH, LOW, 4],
        [SLOT1, HIGH, LOW + 1, 4],
        [SLOT1, HIGH, LOW, 3],
        [SLOT1 | 2, HIGH, LOW, 4],
        [SLOT1 | 1 << 28, HIGH, LOW, 4],
        [SLOT1, HIGH, LOW],
    ],
)
async def test_a_configuration_access_that_is_none_is_a_parameter_error(rig: Rig, args: list[int]) -> None:
    assert await rig.board.rtas("ibm,read-pci-config", args, 2) == [PARAMETER_ERROR, 0]


async def test_change_msi_grants_what_the_device_has_and_query_names_the_sources(rig: Rig) -> None:
    granted = await rig.board.rtas("ibm,change-msi", [SLOT1, HIGH, LOW, 4, 8, 1], 4)
    second = await rig.board.rtas("ibm,query-interrupt-source-number", [SLOT1, HIGH, LOW, 1], 3)
    beyond = await rig.board.rtas("ibm,query-interrupt-source-number", [SLOT1, HIGH, LOW, 2], 3)

    assert granted == [OK, 2, 2, 2]
    assert second == [OK, 0x1301, 1]
    assert beyond[0] == HARDWARE_ERROR
    assert rig.port.sources == {0x1300: False, 0x1301: False}


async def test_change_msi_to_zero_takes_the_sources_back(rig: Rig) -> None:
    await rig.board.rtas("ibm,change-msi", [SLOT1, HIGH, LOW, 1, 2, 1], 3)

    assert await rig.board.rtas("ibm,change-msi", [SLOT1, HIGH, LOW, 1, 0, 7], 3) == [OK, 0, 8]
    assert (await rig.board.rtas("ibm,query-interrupt-source-number", [SLOT1, HIGH, LOW, 0], 3))[0] == HARDWARE_ERROR
    function = rig.board.functions[0]
    assert isinstance(function, VirtioPciFunction) and function.msix.message(0) == (0, 0)


async def test_plain_msi_and_unknown_functions_are_parameter_errors(rig: Rig) -> None:
    for function in (0, 2, 3, 5, 99):
        rets = await rig.board.rtas("ibm,change-msi", [SLOT1, HIGH, LOW, function, 1, 1], 4)
        assert rets[0] == PARAMETER_ERROR


async def test_the_clock_keeps_what_was_set(rig: Rig) -> None:
    rig.port.now_ns = 1_000 * NS
    assert await rig.board.rtas("get-time-of-day", [], 8) == [OK, 1970, 1, 1, 0, 16, 40, 0]

    assert await rig.board.rtas("set-time-of-day", [2024, 2, 29, 12, 30, 15, 5], 1) == [OK]
    rig.port.now_ns += 2 * NS

    assert await rig.board.rtas("get-time-of-day", [], 8) == [OK, 2024, 2, 29, 12, 30, 17, 5]


async def test_with_instruction_time_the_clock_shows_no_time_of_the_host_and_moves_by_readings() -> None:
    with os.fdopen(os.memfd_create("disk")) as disk:
        rig = Rig(disk.fileno(), time="instructions")
        rig.port.now_ns = 1_000 * NS
        first = await rig.board.rtas("get-time-of-day", [], 8)
        rig.port.now_ns += 5 * NS

        assert first == [OK, 2026, 1, 1, 0, 0, 0, 0]
        assert await rig.board.rtas("get-time-of-day", [], 8) == [OK, 2026, 1, 1, 0, 0, 0, READING_NS]
        assert await rig.board.rtas("set-time-of-day", [2024, 2, 29, 12, 30, 15, 5], 1) == [OK]
        assert await rig.board.rtas("get-time-of-day", [], 8) == [OK, 2024, 2, 29, 12, 30, 15, 5]


@pytest.mark.parametrize("year", [1, 1600, 1700, 2300, 2600, 9999])
async def test_whatever_date_was_set_the_clock_can_be_saved(rig: Rig, year: int) -> None:
    await rig.board.rtas("set-time-of-day", [year, 1, 1, 0, 0, 0, 0], 1)

    state = rig.board.rtas_services.save()

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=RtasState) == state


@pytest.mark.parametrize("date", [[2023, 2, 29, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [2024, 1, 1, 0, 0, 0, NS]])
async def test_no_date_is_a_parameter_error(rig: Rig, date: list[int]) -> None:
    assert await rig.board.rtas("set-time-of-day", date, 1) == [PARAMETER_ERROR]


async def test_nvram_keeps_what_was_stored(rig: Rig) -> None:
    rig.ram.bytes[0x100:0x105] = b"saved"
    assert await rig.board.rtas("nvram-store", [NVRAM_BYTES - 5, 0x100, 5], 2) == [OK, 5]

    assert await rig.board.rtas("nvram-fetch", [NVRAM_BYTES - 5, 0x200, 5], 2) == [OK, 5]
    assert rig.ram.bytes[0x200:0x205] == b"saved"
    assert await rig.board.rtas("nvram-fetch", [NVRAM_BYTES - 4, 0x200, 5], 2) == [PARAMETER_ERROR, 0]
    assert await rig.board.rtas("nvram-fetch", [0, PAGE_BYTES - 4, 5], 2) == [PARAMETER_ERROR, 0]


async def test_system_parameters_have_their_length_in_front_and_are_cut_to_fit(rig: Rig) -> None:
    assert await rig.board.rtas("ibm,get-system-parameter", [20, 0x100, 64], 1) == [OK]
    n_bytes = int.from_bytes(rig.ram.bytes[0x100:0x102], "big")
    text = bytes(rig.ram.bytes[0x102 : 0x102 + n_bytes])
    assert text == b"MaxEntCap=1,DesMem=256,DesProcs=1,MaxPlatProcs=1\0"

    rig.ram.bytes[0x200:0x208] = b"\xff" * 8
    assert await rig.board.rtas("ibm,get-system-parameter", [48, 0x200, 4], 1) == [OK]
    assert rig.ram.bytes[0x200:0x202] == b"\0\x10" and rig.ram.bytes[0x204:0x208] == b"\xff" * 4

    assert await rig.board.rtas("ibm,get-system-parameter", [1, 0x100, 64], 1) == [PARAMETER_ERROR]
    assert await rig.board.rtas("ibm,get-system-parameter", [20, 0x100, 1], 1) == [PARAMETER_ERROR]


async def test_system_parameters_cannot_be_set(rig: Rig) -> None:
    rets = await rig.board.rtas("ibm,set-system-parameter", [20, 0x100], 1)

    assert rets == [status_word(RtasStatus.NOT_AUTHORIZED)]


async def test_power_and_death_reach_the_process(rig: Rig) -> None:
    rig.ram.bytes[0x100:0x10A] = b"panic\n\xff\0xy"

    assert await rig.board.rtas("power-off", [0, 0], 1) == [OK]
    assert await rig.board.rtas("system-reboot", [], 1) == [OK]
    assert await rig.board.rtas("ibm,os-term", [0x100], 1) == [OK]
    assert await rig.board.rtas("ibm,os-term", [PAGE_BYTES], 1) == [PARAMETER_ERROR]

    assert rig.port.events == ["power-off", "reboot", "os-term panic.."]


async def test_characters_processors_events_and_error_handling(rig: Rig) -> None:
    assert await rig.board.rtas("display-character", [0x141], 1) == [OK]
    assert bytes(rig.port.displayed) == b"A"
    assert await rig.board.rtas("query-cpu-stopped-state", [0], 2) == [OK, 2]
    assert await rig.board.rtas("query-cpu-stopped-state", [1], 2) == [PARAMETER_ERROR, 0]
    assert await rig.board.rtas("event-scan", [0, 0, 0, 0], 1) == [RtasStatus.NO_ERRORS_FOUND]
    assert await rig.board.rtas("ibm,set-eeh-option", [SLOT1, HIGH, LOW, 1], 1) == [PARAMETER_ERROR]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
async def test_any_words_get_exactly_the_words_that_were_asked_for(rig: Rig, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(rig.board.rtas_services.names)))
    word = st.one_of(st.integers(0, 64), st.sampled_from([SLOT1, HIGH, LOW]), st.integers(0, 0xFFFFFFFF))
    args = data.draw(st.lists(word, max_size=16))
    n_rets = data.draw(st.integers(0, 16))

    rets = await rig.board.rtas(name, args, n_rets)

    assert len(rets) == n_rets
    assert all(0 <= ret <= 0xFFFFFFFF for ret in rets)
