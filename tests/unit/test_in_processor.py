"""What the main thread has done in the processor's: given back, raised, late, or left as the processor began anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio.testing

from protocol.errors import GuestFault, HostFault
from services.guest.in_processor import in_processor


class Abandoned(BaseException):
    """As what unwinds the engine."""


def at_once(work: Callable[[], None]) -> None:
    work()


def fails(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


async def test_it_gives_and_raises_what_was_done() -> None:
    assert await in_processor(at_once, lambda: 7, 1.0) == 7
    with pytest.raises(GuestFault, match="no memory"):
        await in_processor(at_once, fails(GuestFault("no memory")), 1.0)


async def test_s5_a_processor_that_begins_anew_ends_nothing_here() -> None:
    with pytest.raises(HostFault, match="begun anew"):
        await in_processor(at_once, fails(Abandoned()), 1.0)


async def test_a_processor_that_comes_late_does_it_all_the_same(autojump_clock: trio.testing.MockClock) -> None:
    posted: list[Callable[[], None]] = []
    done: list[int] = []

    with pytest.raises(HostFault, match="does not answer"):
        await in_processor(posted.append, lambda: done.append(1), 1.0)

    posted[0]()
    assert done == [1]
