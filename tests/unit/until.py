"""Waits of unit tests."""

from __future__ import annotations

from collections.abc import Callable

import trio


async def until(holds: Callable[[], bool]) -> None:
    """Returns as soon as it `holds`."""
    with trio.fail_after(5):
        while True:
            if holds():
                return
            await trio.sleep(0.01)
