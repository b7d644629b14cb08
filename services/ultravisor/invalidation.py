"""Taking pages away from a running guest: clear the map entries, then have the guest forget its translations.

Requests that come while invalidations are on their way travel together in the next, so that paging out many pages
costs one round trip a batch. Two may be on their way, so that what the first one freed is worked on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from protocol.errors import PefboxError
from protocol.messages import MAP_INVALIDATE
from services.runtime.link import Link
from shared.gfn_ranges import invalidations_of

ACKNOWLEDGE_SECONDS = 1.0
MAX_IN_FLIGHT = 2


class _Batch:
    def __init__(self) -> None:
        self.gfns: list[int] = []
        self.done = trio.Event()
        self.acknowledged = False


class Invalidator:
    """Invalidations of one guest."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._next = _Batch()
        self._in_flight: list[_Batch] = []

    async def invalidate(self, gfns: Iterable[int], cause: int = 0) -> bool:
        """True when the guest acknowledged that it uses none of `gfns` any more; False after a second without."""
        batch = self._next
        leads = not batch.gfns
        batch.gfns.extend(gfns)
        if not leads:
            await batch.done.wait()
            return batch.acknowledged
        try:
            while len(self._in_flight) >= MAX_IN_FLIGHT:
                await self._in_flight[0].done.wait()
            await self._send(batch, cause)
        finally:
            # Also when the leader was cancelled: nobody may wait for a batch without one.
            if self._next is batch:
                self._next = _Batch()
            batch.done.set()
        return batch.acknowledged

    async def _send(self, batch: _Batch, cause: int) -> None:
        self._next = _Batch()
        self._in_flight.append(batch)
        try:
            for body in invalidations_of(batch.gfns):
                with trio.fail_after(ACKNOWLEDGE_SECONDS):
                    await self._link.call(MAP_INVALIDATE, body, cause)
            batch.acknowledged = True
        except (trio.TooSlowError, PefboxError):
            batch.acknowledged = False
        finally:
            self._in_flight.remove(batch)
