"""What a link does with handlers that fail, results that no message can carry, and with messages that nobody takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import PeerGone
from protocol.hcalls import H_GET_TCE, H_RANDOM
from protocol.wire import Envelope, MessageKind, encode
from services.runtime.link import Batch, Link
from tests.unit.link_rig import linked

TOO_LARGE = 1 << 64


def _at_once(link: Link) -> None:
    link.on(H_GET_TCE, lambda _envelope, _args: [TOO_LARGE])


def _waiting(link: Link) -> None:
    async def serve(_envelope: Envelope, _args: list[int]) -> list[int]:
        return [TOO_LARGE]

    link.on_waiting(H_GET_TCE, serve)


def _together(link: Link) -> None:
    async def serve(batch: Batch) -> list[list[int]]:
        return [[TOO_LARGE]] * len(batch)

    link.on_together(H_GET_TCE, serve)


def _broken(link: Link) -> None:
    def serve(_envelope: Envelope, _args: list[int]) -> list[int]:
        raise RuntimeError("a bug")

    link.on(H_GET_TCE, serve)


@pytest.mark.parametrize("register", [_at_once, _waiting, _together, _broken])
async def test_s5_a_handler_without_a_result_that_a_message_can_carry_is_an_error_for_its_caller_only(
    tmp_path: Path, register: Callable[[Link], None]
) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        register(ends.upper)
        ends.upper.on(H_RANDOM, lambda _envelope, _args: [0, 5])
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        with trio.fail_after(5):
            assert await ends.lower.call_registers(H_GET_TCE, []) == [HCode.H_HARDWARE]
            assert await ends.lower.call_registers(H_RANDOM, []) == [0, 5]
        nursery.cancel_scope.cancel()


async def test_s7_a_call_that_could_not_be_sent_does_not_wait_for_an_answer(tmp_path: Path) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        await nursery.start(ends.lower.run)
        while not ends.lower.refused:
            ends.lower.send_event(m.GUEST_CRASHED, m.CrashBody(0, ""))
        with trio.fail_after(5):
            with pytest.raises(PeerGone, match="upper is unresponsive"):
                await ends.lower.call_registers(H_RANDOM, [])
            with pytest.raises(PeerGone, match="upper is unresponsive"):
                await ends.lower.call_many(H_RANDOM, [[], []])
        assert ends.lower.open_calls == 0
        nursery.cancel_scope.cancel()


async def test_what_is_said_on_a_closed_link_is_lost_and_breaks_nothing(tmp_path: Path) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        await nursery.start(ends.lower.run)
        nursery.cancel_scope.cancel()
    ends.lower.send_event(m.GUEST_CRASHED, m.CrashBody(0, ""))
    assert ends.lower.refused == 1


async def test_s5_an_event_is_not_called_a_call_is_no_event_and_a_reply_has_its_call(tmp_path: Path) -> None:
    async with linked(tmp_path) as ends, trio.open_nursery() as nursery:
        came = list[object]()
        ends.upper.on(m.GUEST_CRASHED, lambda _envelope, body: came.append(body))
        ends.upper.on(H_GET_TCE, lambda _envelope, args: came.append(args))
        ends.upper.on(H_RANDOM, lambda _envelope, _args: [0, 5])
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        as_event = encode(MessageKind.EVENT, H_GET_TCE.number, 0, 0, [1])
        never_asked = encode(MessageKind.REPLY, H_RANDOM.number, 1, 0, [0])
        as_call = encode(MessageKind.CALL, m.GUEST_CRASHED.number, 1, 0, m.CrashBody(0, ""))
        with trio.fail_after(5):
            for sent in (as_event, never_asked, as_call):
                ends.raw.send([sent])
            # Its call has the number of the one above, so that it gets the answer to that.
            assert await ends.lower.call_registers(H_RANDOM, []) == [HCode.H_FUNCTION]
            assert await ends.lower.call_registers(H_RANDOM, []) == [0, 5]
        assert came == []
        assert ends.upper.refused == 3
        nursery.cancel_scope.cancel()
