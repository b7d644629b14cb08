"""Calls that travel and are served together: groups, bundles, gathered handlers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from protocol.codes import UCode
from protocol.errors import PeerGone
from protocol.links import ULTRAVISOR_KVM
from protocol.ucalls import UV_PAGE_IN, UV_PAGE_OUT
from protocol.wire import MAX_BUNDLED, MAX_OPEN_CALLS, bundle
from services.runtime.link import Batch
from tests.unit.link_rig import linked

PAGES = [[1, 0, gpa, 0, 16] for gpa in range(16)]


async def test_results_of_a_group_come_in_the_order_of_its_calls(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on(UV_PAGE_IN, lambda _envelope, registers: [UCode.U_SUCCESS, registers[2]])
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        with trio.fail_after(5):
            results = await ends.lower.call_many(UV_PAGE_IN, PAGES)

        assert results == [[UCode.U_SUCCESS, gpa] for gpa in range(16)]
        assert ends.lower.open_calls == 0
        nursery.cancel_scope.cancel()


async def test_an_empty_group_calls_nobody(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends:
        assert await ends.lower.call_many(UV_PAGE_IN, []) == []


async def test_calls_that_came_together_are_served_together_by_their_first_register(tmp_path: Path) -> None:
    batches: list[list[int]] = []

    async def serve(batch: Batch) -> list[list[int]]:
        batches.append([registers[0] for _, registers in batch])
        return [[UCode.U_SUCCESS, registers[1]] for _, registers in batch]

    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on_together(UV_PAGE_OUT, serve)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        with trio.fail_after(5):
            results = await ends.lower.call_many(UV_PAGE_OUT, [[n % 2 + 1, n] for n in range(8)])

        assert results == [[UCode.U_SUCCESS, n] for n in range(8)]
        assert sorted(batches) == [[1] * 4, [2] * 4]
        nursery.cancel_scope.cancel()


async def test_calls_without_registers_are_gathered_too(tmp_path: Path) -> None:
    async def serve(batch: Batch) -> list[list[int]]:
        return [[UCode.U_PARAMETER]] * len(batch)

    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on_together(UV_PAGE_OUT, serve)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        with trio.fail_after(5):
            assert await ends.lower.call_many(UV_PAGE_OUT, [[], []]) == [[UCode.U_PARAMETER]] * 2
        nursery.cancel_scope.cancel()


async def test_gathered_calls_over_the_limit_are_busy(tmp_path: Path) -> None:
    gate = trio.Event()

    async def serve(batch: Batch) -> list[list[int]]:
        await gate.wait()
        return [[UCode.U_SUCCESS]] * len(batch)

    codes: list[int] = []
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on_together(UV_PAGE_OUT, serve)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        async def ask() -> None:
            result = await ends.lower.call_registers(UV_PAGE_OUT, [1, 0, 0, 0, 16])
            codes.append(result[0])
            if result[0] == UCode.U_BUSY:
                gate.set()

        with trio.fail_after(5):
            async with trio.open_nursery() as callers:
                for _ in range(MAX_OPEN_CALLS + 3):
                    callers.start_soon(ask)
        nursery.cancel_scope.cancel()
    assert sorted(codes) == [UCode.U_SUCCESS] * MAX_OPEN_CALLS + [UCode.U_BUSY] * 3


async def test_a_failing_gathered_handler_answers_every_call(tmp_path: Path) -> None:
    async def serve(_batch: Batch) -> list[list[int]]:
        raise ValueError("a mistake of the handler")

    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on_together(UV_PAGE_OUT, serve)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        with trio.fail_after(5):
            results = await ends.lower.call_many(UV_PAGE_OUT, PAGES)

        assert len(results) == len(PAGES)
        assert all(result[0] != UCode.U_SUCCESS for result in results)
        nursery.cancel_scope.cancel()


async def test_a_lost_peer_ends_a_group_once(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on(UV_PAGE_IN, lambda _envelope, registers: [0] if registers[2] else None)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        async def lose() -> None:
            while ends.lower.open_calls != 1:
                await trio.lowlevel.checkpoint()
            ends.lower.peer_is("gone")

        with trio.fail_after(5):
            nursery.start_soon(lose)
            with pytest.raises(PeerGone):
                await ends.lower.call_many(UV_PAGE_IN, PAGES)
        assert ends.lower.open_calls == 0
        nursery.cancel_scope.cancel()


async def test_a_cancelled_group_leaves_no_open_call(tmp_path: Path) -> None:
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on(UV_PAGE_IN, lambda _envelope, _registers: None)
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        with trio.move_on_after(0.05) as scope:
            await ends.lower.call_many(UV_PAGE_IN, PAGES)

        assert scope.cancelled_caught
        assert ends.lower.open_calls == 0
        nursery.cancel_scope.cancel()


async def test_the_tap_sees_each_message_of_a_bundle(tmp_path: Path) -> None:
    seen: list[tuple[bool, int]] = []

    def tap(outward: bool, frames: Sequence[bytes]) -> None:
        (frame,) = frames
        seen.append((outward, msgspec.msgpack.decode(frame)[2]))

    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on(UV_PAGE_IN, lambda _envelope, _registers: [0])
        ends.upper.tap = tap
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        with trio.fail_after(5):
            await ends.lower.call_many(UV_PAGE_IN, PAGES)

        assert sorted(seen) == [(False, UV_PAGE_IN.number)] * 16 + [(True, UV_PAGE_IN.number)] * 16
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "frame",
    [bundle([b"x"])[:-1], bundle([b""] * (MAX_BUNDLED + 1)), bundle([bundle([b"inner"])]), bundle([b"\x00"])],
    ids=["cut", "too many", "nested", "no message"],
)
async def test_a_bad_bundle_is_refused_and_the_link_goes_on(tmp_path: Path, frame: bytes) -> None:
    async with linked(tmp_path, ULTRAVISOR_KVM) as ends, trio.open_nursery() as nursery:
        ends.upper.on(UV_PAGE_IN, lambda _envelope, _registers: [0])
        await nursery.start(ends.upper.run)
        await nursery.start(ends.lower.run)

        ends.raw.send([frame])

        with trio.fail_after(5):
            assert await ends.lower.call_many(UV_PAGE_IN, PAGES[:2]) == [[0], [0]]
        assert ends.upper.refused == 1
        nursery.cancel_scope.cancel()
