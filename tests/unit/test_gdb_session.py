"""What each packet of GDB means, over a target that is played."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.gdb.packets import MAX_PACKET_BYTES
from services.runtime.gdb.session import _HANDLERS, Leave, Reply, Resume, Session
from services.runtime.gdb.target import Point, PointKind, Stop, StopKind
from services.runtime.gdb.target_xml import target_xml
from shared.gdb_registers import MODEL, POWER, Description, Values, pack, unpack
from tests.unit.gdb_target import BASE, N_BYTES, PlayedTarget


@pytest.fixture
def target() -> PlayedTarget:
    return PlayedTarget()


@pytest.fixture
def session(target: PlayedTarget) -> Session:
    return Session(target)


async def text(session: Session, data: bytes) -> bytes:
    reply = await session.answer(data)
    assert isinstance(reply, bytes)
    return reply


# -- registers --------------------------------------------------------------------------------------------------------

ALL = b"0000000000000001" + b"xx" * 8 + b"0000000000001234" + b"00005678" + b"0000000000009abc" + b"0007"


async def test_registers_come_in_their_declared_order_and_missing_ones_as_x(session: Session) -> None:
    assert await text(session, b"g") == ALL
    assert await text(session, b"p2") == b"0000000000001234"
    assert await text(session, b"p1") == b"xx" * 8


async def test_registers_travel_in_the_byte_order_of_the_processor() -> None:
    session = Session(PlayedTarget(little_endian=True))

    assert await text(session, b"p2") == b"3412000000000000"
    assert await text(session, b"P2=0102000000000000") == b"OK"
    assert await text(session, b"p2") == b"0102000000000000"


async def test_all_registers_are_written_where_they_differ(session: Session, target: PlayedTarget) -> None:
    assert await text(session, b"G" + ALL.replace(b"1234", b"4321")) == b"OK"
    assert target.registers_now == [1, None, 0x4321, 0x5678, 0x9ABC, 7]


async def test_a_refused_write_says_why(session: Session) -> None:
    assert await text(session, b"P1=0000000000000000") == b"E.r1 is not to be had"
    assert await text(session, b"qRcmd," + b"why".hex().encode()) == b"r1 is not to be had\n".hex().encode()


async def test_registers_that_are_refused_are_an_error_number(session: Session, target: PlayedTarget) -> None:
    target.refuses_registers = True

    assert await text(session, b"g") == b"E03"
    assert await session.stopped(Stop(StopKind.TRAP)) == b"T05thread:1;"


# -- memory -----------------------------------------------------------------------------------------------------------


async def test_memory_is_read_and_written(session: Session) -> None:
    assert await text(session, b"m1010,4") == b"10111213"
    assert await text(session, b"M1010,2:aabb") == b"OK"
    assert await text(session, b"X1012,2:}\x03") == b"OK"
    assert await text(session, b"m1010,4") == b"aabb7d03"
    assert await text(session, b"X1010,0:") == b"OK"


async def test_memory_that_is_not_there_is_one_clear_error(session: Session) -> None:
    assert await text(session, b"m0,4") == b"E0e"
    assert await text(session, b"M0,1:00") == b"E.nothing at 0x0"


async def test_a_read_is_bounded(session: Session, target: PlayedTarget) -> None:
    assert len(await text(session, b"m1000,ffffffffffffffff")) <= MAX_PACKET_BYTES
    assert all(isinstance(order, tuple) and order[2] <= MAX_PACKET_BYTES for order in target.orders)


async def test_what_is_read_again_and_again_is_asked_for_once_a_stop(session: Session, target: PlayedTarget) -> None:
    for _ in range(5):
        await text(session, b"m1010,4")
    assert len(target.orders) == 1

    await session.answer(b"vCont;s:1")
    target.memory[0x10] = 0xFF
    assert await text(session, b"m1010,1") == b"ff"


async def test_what_devices_write_is_seen_a_little_later(
    session: Session, target: PlayedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.runtime.gdb.block_cache.FRESH_SECONDS", -1)
    await text(session, b"m1010,1")
    target.memory[0x10] = 0xFF

    assert await text(session, b"m1010,1") == b"ff"


async def test_a_read_over_the_end_of_a_block_gives_what_is_before_it(session: Session) -> None:
    assert await text(session, b"m1ffe,8") == b"feff"


# -- points -----------------------------------------------------------------------------------------------------------


async def test_points_are_set_and_removed(session: Session, target: PlayedTarget) -> None:
    assert await text(session, b"Z0,1000,4") == b"OK"
    assert await text(session, b"Z2,2000,8") == b"OK"
    assert target.points == {Point(PointKind.SOFTWARE, 0x1000, 4), Point(PointKind.WRITE, 0x2000, 8)}
    assert await text(session, b"z0,1000,4") == b"OK"
    assert target.points == {Point(PointKind.WRITE, 0x2000, 8)}


@pytest.mark.parametrize("data", [b"Z3,1000,8", b"Z9,1000,4"])
async def test_points_of_an_unknown_kind_get_the_empty_reply(session: Session, data: bytes) -> None:
    assert await text(session, data) == b""


MALFORMED = """Z2,1000,0 Z2,1000,1001 Z2,ffffffffffffffff,8 Z0,1000 Z0 Z0,x,4 m, m-1,4 m1 mfffffffffffffffff,1
M1000,2:00 M1000,1:0g X1000,3:ab P2=00 P9=00 pff p vCont;x"""


@pytest.mark.parametrize("data", MALFORMED.encode().split())
async def test_malformed_arguments_are_an_error_number(session: Session, data: bytes) -> None:
    assert await text(session, data) == b"E16"


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "step"),
    [(b"c", False), (b"s", True), (b"vCont;c", False), (b"vCont;s:1;c", True), (b"C05", False), (b"S05", True)],
)
async def test_every_way_to_go_on(session: Session, data: bytes, step: bool) -> None:
    assert await session.answer(data) == Resume(step)


async def test_going_on_elsewhere_sets_the_program_counter(session: Session, target: PlayedTarget) -> None:
    assert await session.answer(b"s2000") == Resume(True)
    assert target.registers_now[2] == 0x2000


async def test_a_stop_tells_what_gdb_asks_next(session: Session) -> None:
    stop = Stop(StopKind.TRAP, PointKind.WRITE, 0x2004)

    assert await session.stopped(stop) == b"T05thread:1;watch:2004;2:0000000000001234;4:0000000000009abc;"
    assert (await text(session, b"?")).startswith(b"T02thread:1;")


async def test_detach_and_kill(session: Session, target: PlayedTarget) -> None:
    assert await session.answer(b"D;1") == Leave(b"OK")
    assert await session.answer(b"k") == Leave(kills=True)
    assert await session.answer(b"vKill;1") == Leave(b"OK", kills=True)
    assert target.orders == ["kill", "kill"]


# -- queries ----------------------------------------------------------------------------------------------------------


async def test_what_gdb_asks_first(session: Session) -> None:
    features = await text(session, b"qSupported:multiprocess+;xmlRegisters=i386")
    assert b"qXfer:features:read+" in features
    assert f"PacketSize={MAX_PACKET_BYTES:x}".encode() in features
    assert await text(session, b"vMustReplyEmpty") == b""
    assert await text(session, b"vCont?") == b"vCont;c;C;s;S"
    assert await text(session, b"qfThreadInfo") == b"m1"
    assert await text(session, b"qsThreadInfo") == b"l"
    assert await text(session, b"qC") == b"QC1"
    assert await text(session, b"qAttached") == b"1"
    assert await text(session, b"Hg0") == b"OK"
    assert await text(session, b"Hg7") == b"E22"
    assert await text(session, b"T1") == b"OK"
    assert session.acknowledges
    assert await text(session, b"QStartNoAckMode") == b"OK"
    assert not session.acknowledges


@pytest.mark.parametrize(
    "data", [b"", b"qCRC:0,4", b"qSymbol::", b"!", b"vFlashErase:0,1", b"qTStatus", b"\xff", b"QC"]
)
async def test_an_unknown_packet_gets_the_empty_reply(session: Session, data: bytes) -> None:
    assert await text(session, data) == b""


async def test_the_description_comes_in_parts(session: Session, target: PlayedTarget) -> None:
    whole, offset = b"", 0
    while True:
        part = await text(session, b"qXfer:features:read:target.xml:%x,40" % offset)
        whole += part[1:]
        offset += len(part) - 1
        if part[:1] == b"l":
            break

    assert whole == target_xml(target.description)
    assert await text(session, b"qXfer:features:read:other.xml:0,40") == b"E00"
    assert await text(session, b"qXfer:features:read:target.xml:ffffff,40") == b"l"


@pytest.mark.parametrize("description", [POWER, MODEL])
def test_the_description_says_every_register_in_order(description: Description) -> None:
    root = ET.fromstring(target_xml(description).decode().replace('<!DOCTYPE target SYSTEM "gdb-target.dtd">', ""))

    registers = [(reg.get("name"), reg.get("bitsize")) for reg in root.iter("reg")]
    assert root.findtext("architecture") == "powerpc:common64"
    assert registers == [(register.name, str(register.bits)) for register in description.registers]
    assert next(root.iter("feature")).get("name") == "org.gnu.gdb.power.core"


async def test_monitor_commands(session: Session) -> None:
    assert bytes.fromhex((await text(session, b"qRcmd," + b"spr 1".hex().encode())).decode()) == b"['spr', '1']\n"
    assert bytes.fromhex((await text(session, b"qRcmd," + b"bad".hex().encode())).decode()) == b"no such command\n"
    assert await text(session, b"qRcmd,zz") == b"E16"


async def test_every_packet_of_the_protocol_has_one_handler(session: Session) -> None:
    assert len({id(handler) for handler in _HANDLERS.values()}) == len(_HANDLERS)


NAMES = st.sampled_from([*_HANDLERS, b"q", b"v", b"Q"])
RESTS = st.one_of(st.binary(max_size=24), st.from_regex(rb"[0-9a-f]{1,9},[0-9a-f]{1,5}"))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(NAMES, RESTS), max_size=8))
def test_s5_any_packets_get_an_answer(packets: list[tuple[bytes, bytes]]) -> None:
    async def ask() -> list[Reply]:
        session = Session(PlayedTarget())
        return [await session.answer(name + rest) for name, rest in packets]

    for reply in trio.run(ask):
        assert isinstance(reply, bytes | Resume | Leave)
        assert not isinstance(reply, bytes) or len(reply) <= MAX_PACKET_BYTES


# -- values -----------------------------------------------------------------------------------------------------------


@given(st.data(), st.booleans())
def test_values_survive_a_message(data: st.DataObject, little_endian: bool) -> None:
    values = tuple(
        data.draw(st.none() | st.integers(0, (1 << register.bits) - 1)) for register in POWER.registers[-40:]
    )
    whole = Values(little_endian, (*(0 for _ in POWER.registers[:-40]), *values))

    packed, missing = pack(POWER, whole)

    assert unpack(POWER, little_endian, packed, missing) == whole


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes of registers"):
        unpack(POWER, False, bytes(POWER.n_bytes - 1), [])


def test_memory_is_big_enough_for_the_tests() -> None:
    assert BASE + N_BYTES > 0x2000 + 8
