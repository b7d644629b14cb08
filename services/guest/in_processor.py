"""The main thread's way to have something done in the processor's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import outcome
import trio

from protocol.errors import HostFault

T = TypeVar("T")
Post = Callable[[Callable[[], None]], None]
"""Has something run in the processor's thread, soon."""


async def in_processor(post: Post, work: Callable[[], T], seconds: float) -> T:
    """What `work` gives or raises there; raises HostFault when the processor does not come to it within `seconds`, or
    leaves it because it is started anew or ended. Late or not, it is done."""
    done = trio.Event()
    results: list[outcome.Outcome[T]] = []
    token = trio.lowlevel.current_trio_token()

    def run() -> None:
        results.append(outcome.capture(work))
        token.run_sync_soon(done.set)

    post(run)
    with trio.move_on_after(seconds):
        await done.wait()
    if not results:
        raise HostFault("the processor does not answer")
    result = results[0]
    if isinstance(result, outcome.Error) and not isinstance(result.error, Exception):
        raise HostFault("the processor has begun anew")
    return result.unwrap()
