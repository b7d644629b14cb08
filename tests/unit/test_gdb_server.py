"""One connection of GDB: acknowledgements, stops that are told later, interrupts, and what it leaves behind."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator

import pytest
import structlog
import trio
import trio.testing

from services.runtime.gdb.packets import encode
from services.runtime.gdb.server import Debuggers
from services.runtime.gdb.target import Stop, StopKind, Target
from tests.unit.gdb_target import PlayedTarget

LOG = structlog.get_logger()
SECONDS = 5.0


class Client:
    """GDB's end."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))

    async def ask(self, data: bytes) -> bytes:
        await self.stream.send_all(encode(data))
        return await self.hear()

    async def hear(self) -> bytes:
        """The next packet's data, without escapes; acknowledgements are passed over."""
        received = b""
        with trio.fail_after(SECONDS):
            while b"#" not in received[:-2]:
                piece = await self.stream.receive_some(4096)
                if not piece:
                    raise EOFError(received)
                received += piece
        return received[received.index(b"$") + 1 : received.index(b"#")]

    async def hear_bytes(self, n: int) -> bytes:
        received = b""
        with trio.fail_after(SECONDS):
            while len(received) < n:
                received += await self.stream.receive_some(n - len(received))
        return received


class World:
    """A server that debuggers come to."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.targets: list[PlayedTarget] = []
        self.clients: list[Client] = []
        self.refuses = False
        self.debuggers = Debuggers(self._make, nursery, LOG)

    def _make(self) -> Target:
        self.targets.append(PlayedTarget())
        self.targets[-1].refuses_to_halt = self.refuses
        return self.targets[-1]

    def connect(self) -> Client:
        ours, theirs = socket.socketpair()
        fd = os.dup(theirs.fileno())
        theirs.close()
        self.debuggers.take(fd)
        self.clients.append(Client(ours))
        return self.clients[-1]

    async def resumed(self) -> PlayedTarget:
        """The target, as soon as it runs."""
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(SECONDS):
            await self.targets[-1].resumed.wait()
        return self.targets[-1]

    async def released(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert self.targets[-1].released


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        yield world
        nursery.cancel_scope.cancel()
    for client in world.clients:
        await trio.aclose_forcefully(client.stream)


async def test_packets_are_acknowledged_until_gdb_wants_none(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(encode(b"qC"))
    assert await client.hear_bytes(8) == b"+" + encode(b"QC1")

    assert await client.ask(b"QStartNoAckMode") == b"OK"
    await client.stream.send_all(b"+$qC#00")

    assert await client.hear_bytes(7) == encode(b"QC1")


async def test_a_bad_checksum_is_asked_for_again_and_a_lost_answer_sent_again(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(b"$qC#00")
    assert await client.hear_bytes(1) == b"-"

    await client.ask(b"qC")
    await client.stream.send_all(b"-")

    assert await client.hear() == b"QC1"


async def test_a_stop_is_told_when_it_comes(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(encode(b"c"))
    await client.hear_bytes(1)
    target = await world.resumed()

    target.stop_with(Stop(StopKind.TRAP))

    assert (await client.hear()).startswith(b"T05")
    assert (await client.ask(b"qC")) == b"QC1"


async def test_what_a_stop_has_to_say_comes_before_it(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(encode(b"c"))
    (await world.resumed()).stop_with(Stop(StopKind.CRASHED, text="guest crashed: no memory"))

    heard = await client.hear()

    assert bytes.fromhex(heard[1:].decode()) == b"guest crashed: no memory\n"


async def test_an_interrupt_ends_a_run(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(encode(b"c"))
    await world.resumed()

    await client.stream.send_all(b"\x03")

    assert (await client.hear()).startswith(b"T02")


async def test_an_interrupt_of_what_stands_is_nothing(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(b"\x03")

    assert await client.ask(b"qC") == b"QC1"


@pytest.mark.parametrize("while_running", [False, True])
async def test_a_debugger_that_disappears_leaves_the_target_released(world: World, while_running: bool) -> None:
    client = world.connect()
    await client.ask(b"qC")
    if while_running:
        await client.stream.send_all(encode(b"c"))
        await world.resumed()

    await client.stream.aclose()

    await world.released()


async def test_a_second_debugger_is_turned_away_and_the_next_one_taken(world: World) -> None:
    first = world.connect()
    assert await first.ask(b"qC") == b"QC1"
    second = world.connect()
    with pytest.raises(EOFError):
        await second.hear()
    assert await first.ask(b"qC") == b"QC1"

    await first.stream.aclose()
    await world.released()
    await trio.testing.wait_all_tasks_blocked()

    assert await world.connect().ask(b"qC") == b"QC1"


async def test_s5_a_debugger_that_does_not_wait_for_a_stop_is_let_go(world: World) -> None:
    client = world.connect()
    await client.stream.send_all(encode(b"c") + encode(b"g"))

    with pytest.raises(EOFError):
        await client.hear()
    await world.released()


async def test_a_target_that_refuses_is_left_at_once(world: World) -> None:
    world.refuses = True

    with pytest.raises(EOFError):
        await world.connect().hear()


async def test_whoever_detaches_finds_the_target_released_and_is_served_no_more(world: World) -> None:
    client = world.connect()
    await client.ask(b"QStartNoAckMode")

    await client.stream.send_all(encode(b"D") + encode(b"Z0,1000,4"))

    assert await client.hear() == b"OK"
    assert world.targets[0].released == 1
    with pytest.raises(EOFError):
        await client.hear()
    assert not world.targets[0].points


async def test_l1_a_release_lasts_as_long_as_it_takes_and_keeps_the_next_debugger_out(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    client = world.connect()
    await client.ask(b"qC")
    target = world.targets[0]
    target.may_be_released = trio.Event()
    await client.stream.send_all(encode(b"D"))
    assert await client.hear() == b"OK"

    await trio.sleep(1000)
    with pytest.raises(EOFError):
        await world.connect().hear()
    target.may_be_released.set()
    await world.released()

    assert await world.connect().ask(b"qC") == b"QC1"


@pytest.mark.parametrize("packet", [b"k", b"vKill;1"])
async def test_kill_ends_the_connection_and_the_target_does_not_run_on(
    world: World, packet: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    client = world.connect()
    await client.stream.send_all(encode(packet))

    if packet != b"k":
        assert await client.hear() == b"OK"
    with pytest.raises(EOFError):
        await client.hear()
    await trio.sleep(1)
    assert world.targets[0].orders == ["halt", "kill"]
    assert not world.targets[0].released
    world.debuggers.close()
    await trio.sleep(60)
    assert not world.targets[0].released


async def test_l1_what_was_killed_and_does_not_end_is_let_go(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    client = world.connect()
    await client.stream.send_all(encode(b"k"))
    with pytest.raises(EOFError):
        await client.hear()

    await trio.sleep(60)

    await world.released()
