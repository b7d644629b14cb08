"""Invalidations of a guest's translations: batches, acknowledgements, and what is left when a caller is taken away."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import PeerGone
from protocol.messages import InvalidateBody, Status
from services.runtime.link import Link
from services.ultravisor.invalidation import MAX_IN_FLIGHT, Invalidator
from shared.gfn_ranges import ranges_of


class Guest:
    """Keeps every invalidation open until it is told to answer."""

    def __init__(self) -> None:
        self.bodies: list[InvalidateBody] = []
        self.answer = trio.Event()
        self.gone = False

    async def call(self, _message: object, body: InvalidateBody, _cause: int) -> Status:
        self.bodies.append(body)
        await self.answer.wait()
        if self.gone:
            raise PeerGone("vm1/guest", "gone")
        return Status()


@given(st.lists(st.integers(0, 200)))
def test_ranges_hold_exactly_the_frames_in_order_and_never_touch(gfns: list[int]) -> None:
    ranges = ranges_of(gfns)

    assert [gfn for part in ranges for gfn in range(part.gfn, part.gfn + part.n)] == sorted(set(gfns))
    assert all(a.gfn + a.n < b.gfn for a, b in pairwise(ranges))


async def test_requests_that_come_meanwhile_travel_together() -> None:
    guest = Guest()
    invalidator = Invalidator(cast(Link, guest))
    results: list[bool] = []

    async def ask(gfn: int) -> None:
        results.append(await invalidator.invalidate([gfn]))

    async with trio.open_nursery() as nursery:
        for gfn in range(MAX_IN_FLIGHT):
            nursery.start_soon(ask, gfn)
            await trio.testing.wait_all_tasks_blocked()
        for gfn in range(10, 20):
            nursery.start_soon(ask, gfn)
        await trio.testing.wait_all_tasks_blocked()
        assert len(guest.bodies) == MAX_IN_FLIGHT
        guest.answer.set()

    assert results == [True] * (MAX_IN_FLIGHT + 10)
    assert len(guest.bodies) == MAX_IN_FLIGHT + 1
    assert sum(part.n for part in guest.bodies[-1].ranges) == 10


async def test_no_acknowledgement_within_a_second_is_none(autojump_clock: trio.testing.MockClock) -> None:
    assert not await Invalidator(cast(Link, Guest())).invalidate([1])
    assert trio.current_time() >= 1.0


async def test_a_dead_guest_acknowledges_nothing() -> None:
    guest = Guest()
    guest.gone = True
    guest.answer.set()

    assert not await Invalidator(cast(Link, guest)).invalidate([1])


async def test_when_the_end_of_a_vm_takes_all_callers_away_the_next_life_can_invalidate() -> None:
    guest = Guest()
    invalidator = Invalidator(cast(Link, guest))

    async with trio.open_nursery() as nursery:
        for gfn in range(MAX_IN_FLIGHT + 3):
            nursery.start_soon(invalidator.invalidate, [gfn])
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    guest.answer.set()

    with trio.fail_after(5):
        assert await invalidator.invalidate([9])
