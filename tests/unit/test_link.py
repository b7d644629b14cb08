"""Links between two ends in one trio loop, over real sockets with CURVE and ZAP."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

from protocol import messages as m
from protocol.codes import HCode, UCode
from protocol.errors import PeerGone
from protocol.ethernet import MAX_FRAME_BYTES
from protocol.hcalls import H_GET_TCE, H_RANDOM
from protocol.links import KVM_GUEST, QEMU_QEMU, ULTRAVISOR_GUEST
from protocol.roles import Role
from protocol.startup import LinkEntry
from protocol.ucalls import UV_PAGE_OUT
from protocol.wire import MAX_OPEN_CALLS, Envelope, MessageKind, encode
from services.runtime.channel import ZmqChannel
from services.runtime.link import Link
from services.runtime.sockets import bind_socket, connect_socket
from services.runtime.zap import ZapServer
from tests.unit.link_rig import closing, key_pair, linked


async def test_a_call_gets_the_reply_of_its_handler(tmp_path: Path) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        ends.upper.on(H_GET_TCE, lambda _envelope, args: [HCode.H_SUCCESS, args[1]])
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        with trio.fail_after(5):
            assert await ends.lower.call_registers(H_GET_TCE, [0, 7, 8]) == [0, 7]
        nursery.cancel_scope.cancel()


async def test_replies_match_their_calls_in_any_order(tmp_path: Path) -> None:
    gates = {n: trio.Event() for n in range(10)}

    async def wait_turn(_envelope: Envelope, args: list[int]) -> list[int]:
        await gates[args[0]].wait()
        return [0, args[0]]

    results: list[int] = []
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        ends.upper.on_waiting(H_GET_TCE, wait_turn)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        async def ask(n: int) -> None:
            assert await ends.lower.call_registers(H_GET_TCE, [n]) == [0, n]
            results.append(n)
            if n > 0:
                gates[n - 1].set()

        with trio.fail_after(5):
            async with trio.open_nursery() as callers:
                for n in range(10):
                    callers.start_soon(ask, n)
                gates[9].set()
        nursery.cancel_scope.cancel()
    assert results == list(range(9, -1, -1))


async def test_two_tasks_calling_at_once_lose_no_wakeup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wakes a reader later that has slept through a message: it would be the end of this test."""
    monkeypatch.setattr("services.runtime.channel._SLEEP_CAP_SECONDS", 1000.0)
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        ends.upper.on(H_RANDOM, lambda _envelope, _args: [0, 1])
        ends.lower.on(m.MAP_INVALIDATE, lambda _envelope, _body: m.Status(0))
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        async def down() -> None:
            for _ in range(1000):
                await ends.upper.call(m.MAP_INVALIDATE, m.InvalidateBody([m.Range(0, 1)]))

        async def up() -> None:
            for _ in range(1000):
                await ends.lower.call_registers(H_RANDOM, [0])

        with trio.fail_after(20):
            async with trio.open_nursery() as callers:
                for _ in range(2):
                    callers.start_soon(up)
                    callers.start_soon(down)
        nursery.cancel_scope.cancel()


async def test_beyond_64_open_calls_the_next_is_busy(tmp_path: Path) -> None:
    release = trio.Event()

    async def never_quick(_envelope: Envelope, _args: list[int]) -> list[int]:
        await release.wait()
        return [0]

    codes: list[int] = []
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        ends.upper.on_waiting(H_GET_TCE, never_quick)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        async def ask() -> None:
            code = (await ends.lower.call_registers(H_GET_TCE, []))[0]
            codes.append(code)
            if code == HCode.H_BUSY:
                release.set()

        with trio.fail_after(5):
            async with trio.open_nursery() as callers:
                for _ in range(MAX_OPEN_CALLS + 1):
                    callers.start_soon(ask)
        nursery.cancel_scope.cancel()
    assert sorted(codes) == [0] * MAX_OPEN_CALLS + [HCode.H_BUSY]


@pytest.mark.parametrize("state", ["gone", "stopped", "unresponsive"])
async def test_a_lost_peer_ends_open_calls_by_name(tmp_path: Path, state: str) -> None:
    async def forever(_envelope: Envelope, _args: list[int]) -> list[int]:
        await trio.sleep_forever()
        raise AssertionError

    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        ends.upper.on_waiting(H_GET_TCE, forever)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        async def lose() -> None:
            while not ends.lower.open_calls:
                await trio.lowlevel.checkpoint()
            ends.lower.peer_is(state)

        nursery.start_soon(lose)
        with trio.fail_after(5), pytest.raises(PeerGone, match=f"upper is {state}"):
            await ends.lower.call_registers(H_GET_TCE, [])
        nursery.cancel_scope.cancel()


async def test_a_lasting_call_outlasts_a_stop_of_its_peer_and_ends_with_its_death(tmp_path: Path) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        results: list[list[int]] = []

        async def ask() -> None:
            results.append(await ends.lower.call_registers_lasting(H_GET_TCE, []))

        async def forever(_envelope: Envelope, _args: list[int]) -> list[int]:
            await trio.sleep_forever()
            raise AssertionError

        ends.upper.on(H_GET_TCE, lambda _envelope, _args: [HCode.H_SUCCESS])
        ends.upper.on_waiting(H_RANDOM, forever)
        await nursery.start(ends.lower.run)
        with trio.fail_after(5):
            async with trio.open_nursery() as callers:
                callers.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                ends.lower.peer_is("stopped")
                # Also one that is made only now.
                callers.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                assert ends.lower.open_calls == 2
                ends.lower.peer_is("running")
                await nursery.start(ends.upper.run)
        assert results == [[HCode.H_SUCCESS]] * 2

        nursery.start_soon(_die_when_asked, ends.lower)
        with trio.fail_after(5), pytest.raises(PeerGone, match="upper is failed"):
            await ends.lower.call_registers_lasting(H_RANDOM, [])
        nursery.cancel_scope.cancel()


async def _die_when_asked(link: Link) -> None:
    while not link.open_calls:
        await trio.lowlevel.checkpoint()
    link.peer_is("unresponsive")
    assert link.open_calls
    link.peer_is("failed")


async def test_a_call_without_reply_reaches_a_peer_that_was_held_up(tmp_path: Path) -> None:
    """UV_RETURN above all: nothing else would tell the ultravisor, and it is said once."""
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        came = trio.Event()
        ends.upper.on(H_GET_TCE, lambda _envelope, _args: came.set())
        ends.lower.peer_is("stopped")
        ends.lower.send_call(H_GET_TCE.number, 0, [], 0)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        with trio.fail_after(5):
            await came.wait()
        ends.lower.peer_is("failed")
        with pytest.raises(PeerGone, match="upper is failed"):
            ends.lower.send_call(H_GET_TCE.number, 0, [], 0)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"\x95\x01\x00"],
        [encode(MessageKind.CALL, H_GET_TCE.number, 999, 0, ["x"])],
        [encode(MessageKind.CALL, H_GET_TCE.number, 999, 0, [1] * 100)],
        [encode(MessageKind.CALL, 0x99999, 999, 0, None)],
        [encode(MessageKind.EVENT, m.VCPU_START.number, 0, 0, [0, 0, {}])],
        [encode(MessageKind.REPLY, 1, 12345, 0, None)],
        [b"a", b"b", b"c"],
        [b"\x96\x01\x00\x1c\x70\x00" + b"\x91" * 5000 + b"\xc0"],
        [b"\x96\x01\x00\x1c\x70\x00\x91\xa2\xff\xfe"],
    ],
)
async def test_s5_malformed_input_never_ends_the_reader(tmp_path: Path, frames: list[bytes]) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        ends.upper.on(H_GET_TCE, lambda _envelope, _args: [0])
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        ends.raw.send(frames)
        with trio.fail_after(5):
            assert await ends.lower.call_registers(H_GET_TCE, [1]) == [0]
        nursery.cancel_scope.cancel()


async def test_an_ultracall_of_another_caller_is_refused_with_u_permission(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_GUEST) as ends, trio.open_nursery() as nursery:
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        with trio.fail_after(5):
            assert await ends.lower.call_registers(UV_PAGE_OUT, [1, 2, 3, 0, 16]) == [UCode.U_PERMISSION]
        nursery.cancel_scope.cancel()


def test_a_handler_for_a_call_that_the_link_does_not_carry_is_a_mistake() -> None:
    link = Link.__new__(Link)
    link.kind = KVM_GUEST
    link._inbound = KVM_GUEST.inbound(Role.KVM)
    with pytest.raises(ValueError, match="does not carry UV_PAGE_OUT"):
        link.on(UV_PAGE_OUT, lambda _envelope, _args: None)


async def test_a_peer_with_another_key_is_not_let_in(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    mine, right, wrong = key_pair("l"), key_pair("l"), key_pair("l")
    endpoint = f"ipc://{tmp_path}/s"
    entry = LinkEntry(
        id="l", kind=KVM_GUEST.name, endpoint=endpoint, vm=None, peer="p", peer_public_key=right.public_key, binds=True
    )
    async with closing(context), trio.open_nursery() as nursery:
        zap = ZapServer(context)
        await nursery.start(zap.run)
        bound = ZmqChannel(bind_socket(context, zap, entry, mine))
        as_client = LinkEntry(
            id="l",
            kind=KVM_GUEST.name,
            endpoint=endpoint,
            vm=None,
            peer="k",
            peer_public_key=mine.public_key,
            binds=False,
        )
        intruder = ZmqChannel(connect_socket(context, as_client, wrong))
        friend = ZmqChannel(connect_socket(context, as_client, right))
        intruder.send([b"intruder"])
        friend.send([b"friend"])
        with trio.fail_after(5):
            assert await bound.receive() == [b"friend"]
        with trio.move_on_after(0.3) as silence:
            await bound.receive()
        assert silence.cancelled_caught
        for channel in (bound, intruder, friend):
            channel.close()
        nursery.cancel_scope.cancel()


async def test_an_offered_event_is_taken_or_lost_at_once(tmp_path: Path) -> None:
    """A peer that does not read costs its sender nothing (L1): nothing is kept for it beyond the sockets' marks."""
    body = m.NetFramesBody([bytes(60)])
    async with linked(tmp_path, QEMU_QEMU) as ends, trio.open_nursery() as nursery:
        came = trio.Event()
        ends.lower.on(m.NET_FRAMES, lambda _envelope, _body: came.set())
        await nursery.start(ends.upper.run)
        with trio.fail_after(10):
            while not ends.upper.offer_event(m.NET_FRAMES, body):
                await trio.lowlevel.checkpoint()
            while ends.upper.offer_event(m.NET_FRAMES, body):
                await trio.lowlevel.checkpoint()
        await nursery.start(ends.lower.run)
        with trio.fail_after(10):
            await came.wait()
            while not ends.upper.offer_event(m.NET_FRAMES, body):
                await trio.lowlevel.checkpoint()
        ends.upper.peer_is("stopped")
        assert not ends.upper.offer_event(m.NET_FRAMES, body)
        ends.upper.peer_is("running")
        assert ends.upper.offer_event(m.NET_FRAMES, body)
        nursery.cancel_scope.cancel()


async def test_frames_beyond_the_declared_number_or_length_are_refused(tmp_path: Path) -> None:
    async with linked(tmp_path, QEMU_QEMU) as ends, trio.open_nursery() as nursery:
        came, counts = trio.Event(), list[int]()

        def take(_envelope: Envelope, body: m.NetFramesBody) -> None:
            counts.append(len(body.frames))
            came.set()

        ends.upper.on(m.NET_FRAMES, take)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        for frames in ([], [bytes(1)] * (m.MAX_NET_FRAMES + 1), [bytes(MAX_FRAME_BYTES + 1)], [bytes(1)]):
            ends.lower.send_event(m.NET_FRAMES, m.NetFramesBody(frames))
        with trio.fail_after(5):
            await came.wait()
        assert counts == [1]
        assert ends.upper.refused == 3
        nursery.cancel_scope.cancel()
