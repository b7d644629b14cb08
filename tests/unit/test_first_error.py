"""One error of several tasks comes out as it is, and never in the place of a cancellation."""

from __future__ import annotations

import pytest
import trio

from protocol.errors import UserError
from services.runtime.first_error import first_error_nursery


async def fail() -> None:
    raise UserError("the reason")


async def fail_when_cancelled() -> None:
    try:
        await trio.sleep_forever()
    finally:
        await fail()


async def test_one_error_of_several_tasks_comes_out_as_it_is() -> None:
    with pytest.raises(UserError, match="the reason"):
        async with first_error_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(fail_when_cancelled)


async def test_error_of_the_program_comes_out_in_its_group() -> None:
    with pytest.raises(BaseExceptionGroup):
        async with first_error_nursery() as nursery:
            nursery.start_soon(fail)
            raise ZeroDivisionError


async def test_cancelled_from_outside_it_ends_without_the_error_that_came_meanwhile() -> None:
    with trio.CancelScope() as scope:
        async with first_error_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail_when_cancelled)
            scope.cancel()
    assert scope.cancelled_caught
