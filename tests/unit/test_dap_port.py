"""The launcher's part of debuggers: who may come in beside whom, and what ends the relay of an editor and debugpy."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from deploy.child import Child
from deploy.cluster_run import ClusterRun
from deploy.control_channel import ControlChannel
from deploy.dap_port import dap_frame, open_port, relay
from deploy.debug_session import serve_prompt
from deploy.plan import ProcessPlan
from deploy.states import ProcessState
from protocol import control
from protocol import debugging as said
from protocol.errors import UserError
from protocol.roles import Role
from tests.unit.link_rig import LOG
from tests.unit.until import until


@dataclass(frozen=True, slots=True)
class Relayed:
    """A relay under way, from outside; `left` is the launcher's word that debugpy has let its process go."""

    editor: trio.SocketStream
    process: trio.SocketStream
    left: trio.Event
    ended: trio.Event


def stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a stream."""
    ours, theirs = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    return trio.SocketStream(ours), trio.SocketStream(theirs)


@pytest.fixture
async def relayed() -> AsyncIterator[Relayed]:
    """A relay; what it raises fails the test."""
    editor, editors_end = stream_pair()
    debugpy, process = stream_pair()
    made = Relayed(editor, process, trio.Event(), trio.Event())

    async def run() -> None:
        async with editors_end, debugpy:
            await relay(editors_end, debugpy, made.left)
        made.ended.set()

    async with editor, process, trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield made
        nursery.cancel_scope.cancel()


async def test_the_end_of_debugpy_ends_the_relay_and_nothing_else(relayed: Relayed) -> None:
    """A process that is killed takes neither the launcher nor other processes with it."""
    await relayed.editor.send_all(dap_frame({"command": "threads"}))
    assert b"threads" in await relayed.process.receive_some(4096)

    await relayed.process.aclose()

    with trio.fail_after(5):
        await relayed.ended.wait()
        assert await relayed.editor.receive_some(1) == b""


async def test_what_an_editor_asks_after_its_disconnect_is_not_passed_on(
    relayed: Relayed, autojump_clock: MockClock
) -> None:
    disconnect, pause = dap_frame({"command": "disconnect"}), dap_frame({"command": "pause"})
    await relayed.editor.send_all(disconnect + pause)
    await relayed.editor.send_all(pause)
    await trio.sleep(1)
    assert await relayed.process.receive_some(4096) == disconnect

    relayed.left.set()
    await relayed.process.send_all(b"the answer")
    assert await relayed.editor.receive_some(4096) == b"the answer"

    with trio.fail_after(5):
        await relayed.ended.wait()
    assert await relayed.process.receive_some(4096) == b""


async def test_a_relay_is_there_until_debugpy_has_let_its_process_go(
    relayed: Relayed, autojump_clock: MockClock
) -> None:
    await relayed.editor.aclose()
    assert b'"disconnect"' in await relayed.process.receive_some(4096)
    await trio.sleep(100)
    assert not relayed.ended.is_set()

    relayed.left.set()

    with trio.fail_after(1):
        await relayed.ended.wait()


class PlayedUltravisor:
    """A process that debuggers may enter, and the audit log that says so."""

    def __init__(self, nursery: trio.Nursery) -> None:
        plan = ProcessPlan(Role.ULTRAVISOR, "alpha")
        self.child = Child(plan, 1, cast(ControlChannel, self))
        self.child.ready.set()
        self.child.change(ProcessState.RUNNING)
        self.noted: list[str] = []
        self.log_works = True
        self.notes = trio.Event()
        """The audit log answers from then on."""
        self.entered: list[tuple[control.DebugMode, trio.SocketStream]] = []
        self.run = cast(
            ClusterRun,
            SimpleNamespace(
                vms={},
                living=lambda: [self.child],
                is_debuggable=lambda plan: True,
                child=lambda owner, role: self.child,
                is_current=lambda child: True,
                peers_of=lambda child: [],
                following_waits=True,
                log=LOG,
                nursery=nursery,
            ),
        )
        self._nursery = nursery

    def send(self, packet: control.ToProcess, fds: list[int] | None = None) -> None:
        """As ControlChannel."""
        if isinstance(packet, control.Query):
            self._nursery.start_soon(self._note, packet)
        elif isinstance(packet, control.Debug):
            assert fds is not None
            end = trio.socket.from_stdlib_socket(socket.socket(fileno=socket.dup(fds[0])))
            self.entered.append((packet.mode, trio.SocketStream(end)))

    async def _note(self, query: control.Query) -> None:
        await self.notes.wait()
        if not self.log_works:
            self.child.answered(control.Answer(query.id, error="no room"))
            return
        self.noted.append(query.arguments["event"])
        self.child.answered(control.Answer(query.id))

    async def entry(self, number: int) -> tuple[control.DebugMode, trio.SocketStream]:
        """The debugger that came in as that one, counted from 0."""
        await until(lambda: len(self.entered) > number)
        return self.entered[number]

    async def debugpy(self, number: int, message: said.FromProcess) -> None:
        """What debugpy says on the stream on which it was to listen."""
        mode, stream = await self.entry(number)
        assert mode is control.DebugMode.DAP
        await stream.send_all(said.frame(message))


@pytest.fixture
async def ultravisor() -> AsyncIterator[PlayedUltravisor]:
    """One that runs."""
    async with trio.open_nursery() as nursery:
        played = PlayedUltravisor(nursery)
        yield played
        nursery.cancel_scope.cancel()
    for _, stream in played.entered:
        await stream.aclose()


async def outcome_of(order: Any, *arguments: object) -> Any:  # noqa: ANN401
    """What an order gives, or why it is refused."""
    try:
        return await order(*arguments)
    except UserError as error:
        return str(error)


async def in_parallel(played: PlayedUltravisor, *orders: tuple[Any, ...]) -> list[Any]:
    """The outcomes of orders of which each comes while the one before is being noted."""
    found: list[Any] = [None] * len(orders)

    async def give(number: int) -> None:
        found[number] = await outcome_of(*orders[number])

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for number in range(len(orders)):
                nursery.start_soon(give, number)
                await trio.sleep(0.05)
            played.notes.set()
            await played.debugpy(0, said.Listening())
    return found


async def test_orders_for_a_port_that_overlap_get_the_same_one(ultravisor: PlayedUltravisor) -> None:
    order = (open_port, ultravisor.run, ultravisor.child, 0)

    first, second = await in_parallel(ultravisor, order, order)

    assert first is second is ultravisor.child.dap_port
    assert ultravisor.noted == ["debugger-port"]
    assert len(ultravisor.entered) == 1


async def test_no_prompt_opens_while_a_port_is_being_opened(ultravisor: PlayedUltravisor) -> None:
    operator, launcher = stream_pair()
    async with operator, launcher:
        made, refused = await in_parallel(
            ultravisor,
            (open_port, ultravisor.run, ultravisor.child, 0),
            (serve_prompt, ultravisor.run, ultravisor.child, launcher, b"hello"),
        )

    assert refused == f"alpha/ultravisor listens for editors already ({made.place}): attach one of them"
    assert ultravisor.noted == ["debugger-port"]


async def test_a_port_is_kept_while_debugpy_is_slow(ultravisor: PlayedUltravisor, autojump_clock: MockClock) -> None:
    order = (open_port, ultravisor.run, ultravisor.child, 0)
    ultravisor.notes.set()
    assert await outcome_of(*order) == "alpha/ultravisor: debugpy did not start within 10 s"

    await ultravisor.debugpy(0, said.Listening())
    assert await outcome_of(*order) is ultravisor.child.dap_port
    assert len(ultravisor.entered) == 1


async def test_a_port_that_was_refused_is_asked_for_anew(ultravisor: PlayedUltravisor) -> None:
    order = (open_port, ultravisor.run, ultravisor.child, 0)
    ultravisor.notes.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ultravisor.debugpy, 0, said.Refused("not installed"))
        assert await outcome_of(*order) == "alpha/ultravisor: not installed"
    await ultravisor.entered[0][1].aclose()
    await until(lambda: ultravisor.child.dap_port is None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ultravisor.debugpy, 1, said.Listening())
        assert await outcome_of(*order) is ultravisor.child.dap_port


async def opened_port(played: PlayedUltravisor) -> int:
    """The port for editors of a process in which debugpy listens."""
    played.notes.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(played.debugpy, 0, said.Listening())
        made = await open_port(played.run, played.child, 0)
    return made.port


async def test_an_editor_comes_in_once_it_is_noted(ultravisor: PlayedUltravisor) -> None:
    port = await opened_port(ultravisor)
    ultravisor.notes = trio.Event()
    async with await trio.open_tcp_stream("127.0.0.1", port) as editor:
        await editor.send_all(dap_frame({"command": "initialize"}))
        await trio.sleep(0.05)
        assert len(ultravisor.entered) == 1
        ultravisor.notes.set()
        mode, debugpy = await ultravisor.entry(1)
        assert mode is control.DebugMode.DAP_CLIENT
        assert b"initialize" in await debugpy.receive_some(4096)
    await debugpy.aclose()
    await until(lambda: len(ultravisor.noted) == 3)

    assert ultravisor.noted == ["debugger-port", "debugger-attached", "debugger-detached"]


async def test_where_an_editor_cannot_be_noted_none_comes_in(ultravisor: PlayedUltravisor) -> None:
    port = await opened_port(ultravisor)
    ultravisor.log_works = False
    async with await trio.open_tcp_stream("127.0.0.1", port) as editor:
        with trio.fail_after(5):
            assert await editor.receive_some(1) == b""

    assert len(ultravisor.entered) == 1
    assert ultravisor.child.debugger is None


async def test_an_editor_comes_in_when_the_one_before_has_left(ultravisor: PlayedUltravisor) -> None:
    """So no word of its leaving is late, and ends the session of the next."""
    port = await opened_port(ultravisor)
    async with await trio.open_tcp_stream("127.0.0.1", port):
        _, debugpy = await ultravisor.entry(1)
    async with debugpy:
        assert b'"disconnect"' in await debugpy.receive_some(4096)
        async with await trio.open_tcp_stream("127.0.0.1", port) as early:
            assert await early.receive_some(1) == b""
        await ultravisor.debugpy(0, said.Detached())
        await until(lambda: ultravisor.child.debugger is None)
    async with await trio.open_tcp_stream("127.0.0.1", port):
        _, debugpy = await ultravisor.entry(2)
        assert ultravisor.child.debugger is not None
    await debugpy.aclose()
