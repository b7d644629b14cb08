"""Breaks at a link end: what is kept, passed, refused or dropped, and what a link without breaks does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from protocol.breaks import MAX_KEPT
from protocol.codes import HCode, UCode
from protocol.control import BreakHit
from protocol.errors import UserError
from protocol.hcalls import H_CPPR
from protocol.links import ULTRAVISOR_GUEST, ULTRAVISOR_KVM, LinkKind
from protocol.messages import GUEST_CRASHED
from protocol.ucalls import UV_ESMB_GET_FILE, UV_PAGE_OUT, UV_RETURN
from protocol.wire import Envelope, MessageKind
from services.runtime import breakpoints
from services.runtime.breakpoints import Breakpoints
from services.runtime.link import DEFERRED
from services.runtime.watch import MAX_TEXT_CHARS, Watch, describe
from tests.unit.link_rig import LOG, Ends, linked
from tests.unit.until import until

ARGS = [1, 0x10000, 0x1230000, 0, 16]


@dataclass
class Rig:
    """A link whose upper end has breaks."""

    ends: Ends
    breaks: Breakpoints
    hits: list[BreakHit] = field(default_factory=list)
    served: list[list[int]] = field(default_factory=list)

    async def set(self, text: str, action: str = "stop", code: str | None = None, **more: int) -> None:
        await self.breaks.set({"id": 1, "text": text, "action": action, "code": code, **more})

    async def until_kept(self, n: int) -> None:
        """So many messages have come and are kept."""
        await until(lambda: len(self.hits) >= n)

    async def page_out(self) -> list[int]:
        with trio.fail_after(5):
            return await self.ends.lower.call_registers(UV_PAGE_OUT, ARGS)


@asynccontextmanager
async def broken(tmp_path: Path, kind: LinkKind = ULTRAVISOR_KVM) -> AsyncIterator[Rig]:
    async with linked(tmp_path, kind) as ends, trio.open_nursery() as nursery:
        hits: list[BreakHit] = []
        watch = Watch(lambda: [ends.upper, ends.lower])
        breaks = Breakpoints("alpha/ultravisor", watch, {1: "vm1", 2: "vm2"}, LOG, hits.append)
        rig = Rig(ends, breaks, hits)

        def serve(_envelope: object, registers: list[int]) -> list[int]:
            rig.served.append(registers)
            return [UCode.U_SUCCESS]

        ends.upper.on(UV_PAGE_OUT, serve)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)
        yield rig
        nursery.cancel_scope.cancel()


async def test_a_link_is_watched_only_while_a_break_is_set(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        assert rig.ends.upper.watch is None
        await rig.set("any", "count")
        assert rig.ends.upper.watch is not None
        await rig.breaks.delete({"id": 1})
        assert rig.ends.upper.watch is None


async def test_a_stopped_message_is_kept_and_told_until_it_passes_and_others_go_on(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig, trio.open_nursery() as nursery:
        await rig.set("ucall UV_PAGE_OUT if vm == 'vm1'", nth=1)
        nursery.start_soon(rig.page_out)
        await rig.until_kept(1)
        assert rig.served == []
        (hit,) = rig.hits
        assert (hit.id, hit.message, hit.vm) == (1, 1, "vm1")
        assert "gpa=0x1230000" in hit.text
        assert await rig.page_out() == [UCode.U_SUCCESS]

        assert await rig.breaks.release({"message": 1}) == {"passed": True}
        assert await rig.breaks.release({"message": 1}) == {"passed": False}
    assert rig.served == [ARGS, ARGS]


async def test_a_deleted_break_lets_go_what_it_kept(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig, trio.open_nursery() as nursery:
        await rig.set("ucall UV_PAGE_OUT if sender == 'lower' and receiver == 'alpha/ultravisor'")
        nursery.start_soon(rig.page_out)
        await rig.until_kept(1)
        assert await rig.breaks.delete({"id": 1}) == {"passed": [1]}
    assert rig.served == [ARGS]


async def test_a_call_is_answered_with_a_code_and_not_served(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        await rig.set("ucall UV_PAGE_OUT", "fail", "U_RETRY")
        assert await rig.page_out() == [UCode.U_RETRY]
        assert rig.served == []
        assert await rig.breaks.counts({}) == {"1": 1}


async def test_a_reflected_hypercall_is_answered_by_uv_return(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        returned: list[list[int]] = []

        def take(_envelope: object, registers: list[int]) -> Any:  # noqa: ANN401
            returned.append(registers)
            return DEFERRED

        rig.ends.upper.on(UV_RETURN, take)
        await rig.set("hcall H_CPPR", "fail", "H_PARAMETER")
        rig.ends.upper.send_call(H_CPPR.number, 77, [1, 0, 5], 0)
        await until(lambda: bool(returned))
        assert [registers[1] for registers in returned] == [77]
        assert returned[0][0] == HCode.H_PARAMETER & (1 << 64) - 1


async def test_a_dropped_call_is_never_answered_and_a_result_can_be_meant(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        await rig.set("ucall UV_PAGE_OUT if result == U_SUCCESS", "count", id=1)
        await rig.set("ucall UV_PAGE_OUT", "drop", nth=2, id=2)
        assert await rig.page_out() == [UCode.U_SUCCESS]
        with trio.move_on_after(0.2):
            await rig.page_out()
            pytest.fail("it was answered")
        assert await rig.breaks.counts({}) == {"1": 1, "2": 2}


async def test_no_more_than_so_many_messages_are_kept(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        await rig.set("ucall UV_PAGE_OUT")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.ends.lower.call_many, UV_PAGE_OUT, [ARGS] * MAX_KEPT)
            await rig.until_kept(MAX_KEPT)
            assert await rig.page_out() == [UCode.U_SUCCESS]
            nursery.cancel_scope.cancel()
        assert len(rig.hits) == MAX_KEPT
        assert rig.served == [ARGS]


async def test_what_was_kept_of_a_link_that_is_closed_is_dropped(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        await rig.set("ucall UV_PAGE_OUT")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.page_out)
            await rig.until_kept(1)
            nursery.cancel_scope.cancel()
        rig.ends.upper.peer_is("closed")
        assert await rig.breaks.release({"message": 1}) == {"passed": True}
        assert rig.served == []


async def test_s5_no_order_that_cannot_be_read_is_set(tmp_path: Path) -> None:
    async with broken(tmp_path) as rig:
        for arguments in ({}, {"id": 1}, {"id": 1, "text": "x"}, {"id": 1, "text": "any", "what": 2}):
            with pytest.raises(UserError):
                await rig.breaks.set(arguments)
        assert rig.ends.upper.watch is None


@pytest.mark.parametrize(
    ("first", "second", "answers", "served"),
    [
        (("stop", None), ("stop", None), [UCode.U_SUCCESS], 1),
        (("stop", None), ("fail", "U_RETRY"), [UCode.U_SUCCESS], 1),
        (("fail", "U_RETRY"), ("stop", None), [UCode.U_RETRY], 0),
        (("fail", "U_RETRY"), ("fail", "U_BUSY"), [UCode.U_RETRY], 0),
        (("count", None), ("fail", "U_RETRY"), [UCode.U_RETRY], 0),
        (("log", None), ("stop", None), [UCode.U_SUCCESS], 1),
    ],
)
async def test_of_several_breaks_that_fit_the_first_that_does_something_decides_and_all_count(
    tmp_path: Path,
    first: tuple[str, str | None],
    second: tuple[str, str | None],
    answers: list[int],
    served: int,
) -> None:
    """A message is never both kept and answered, nor kept twice: it would be served twice."""
    results: list[list[int]] = []
    async with broken(tmp_path) as rig, trio.open_nursery() as nursery:
        await rig.set("ucall UV_PAGE_OUT", first[0], first[1])
        await rig.set("ucall UV_PAGE_OUT", second[0], second[1], id=2)

        async def ask() -> None:
            results.append(await rig.page_out())

        nursery.start_soon(ask)
        await until(lambda: bool(rig.hits or results))
        assert len(rig.hits) <= 1
        for number in (1, 2):
            await rig.breaks.release({"message": number})
        await until(lambda: bool(results))
        assert await rig.breaks.counts({}) == {"1": 1, "2": 1}
    assert results == [answers]
    assert len(rig.served) == served


async def test_s5_a_watcher_that_breaks_lets_the_message_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_end: object, _envelope: object) -> str:
        raise TypeError("nobody thought of this")

    monkeypatch.setattr(breakpoints, "describe", fails)
    async with broken(tmp_path) as rig:
        await rig.set("ucall UV_PAGE_OUT", "log")
        assert await rig.page_out() == [UCode.U_SUCCESS]
        await rig.set("ucall UV_PAGE_OUT", "stop")
        assert await rig.page_out() == [UCode.U_SUCCESS]
        assert rig.hits == []


async def test_a_message_that_is_kept_while_its_break_is_deleted_is_served_once(tmp_path: Path) -> None:
    """In a guest both happen at once, in two threads."""
    async with broken(tmp_path) as rig:
        await rig.set("ucall UV_PAGE_OUT")
        of = rig.breaks._breaks[1]
        await rig.breaks.delete({"id": 1})
        message = envelope_of(UV_PAGE_OUT.number, ARGS)

        assert rig.breaks._act(of, rig.ends.upper, message, "vm1") is True
        assert rig.hits == []
        assert await rig.breaks.release({"message": 1}) == {"passed": False}


def envelope_of(number: int, body: list[Any]) -> Envelope:
    return Envelope(1, MessageKind.CALL, number, 1, 0, msgspec.Raw(msgspec.msgpack.encode(body)))


async def test_s1_of_a_secure_guests_messages_only_what_a_trace_may_hold_is_shown(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_GUEST) as ends:
        private = envelope_of(UV_ESMB_GET_FILE.number, [0, 0x5EC2E7, 0x5EC2E7, 0x5EC2E7])
        undeclared = envelope_of(0x7777, [0x5EC2E7])
        crash = Envelope(
            1, MessageKind.EVENT, GUEST_CRASHED.number, 1, 0, msgspec.Raw(msgspec.msgpack.encode([0, "my 5ec2e7"]))
        )
        for message in (private, undeclared, crash):
            assert "5ec2e7" not in describe(ends.upper, message)
        assert "UV_ESMB_GET_FILE" in describe(ends.upper, private)


async def test_s5_the_text_of_a_message_is_bounded(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends:
        wide: list[Any] = [[["x" * 1000] * 100] * 100] * 5
        assert len(describe(ends.upper, envelope_of(UV_PAGE_OUT.number, wide))) <= MAX_TEXT_CHARS
