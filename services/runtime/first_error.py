"""A nursery whose tasks end it with one error, not with a group of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from protocol.errors import PefboxError


@asynccontextmanager
async def first_error_nursery() -> AsyncIterator[trio.Nursery]:
    """As trio.open_nursery, but the first error of our own comes out as it is.

    Who cancels it from outside wants none: what came meanwhile is dropped.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        ours, others = group.split(PefboxError)
        if ours is None:
            raise
        if others is not None:
            cancelled, unforeseen = others.split(trio.Cancelled)
            if unforeseen is not None or cancelled is None:
                raise
            raise cancelled from None
        error: BaseException = ours
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
