"""The guest owner's view of a VM for GDB: plaintext and all registers, from the processor itself.

The protocol is served by the main thread, the processor belongs to its own: each question is posted there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from services.guest.debugger import Debugger, User
from services.guest.in_processor import Post, in_processor
from services.runtime.gdb.target import Point, PointKind, Stop
from shared.gdb_registers import Description, Values

_ANSWER_SECONDS = 5.0
_OWNER = User.OWNER
T = TypeVar("T")


class OwnerTarget:
    """`post` has something run in the processor's thread; `killed` ends the VM."""

    def __init__(self, debugger: Debugger, post: Post, killed: Callable[[], Awaitable[None]]) -> None:
        self._debugger = debugger
        self._post = post
        self._killed = killed
        self._token = trio.lowlevel.current_trio_token()
        self._points: frozenset[Point] = frozenset()
        self._stop: Stop | None = None
        self._stopped = trio.Event()
        self._values: Values | None = None
        """Of the registers, as long as nothing can have changed them."""

    @property
    def description(self) -> Description:
        """As Target."""
        return self._debugger.description

    async def halt(self) -> Stop:
        """As Target; raises Refused while the host debugs."""
        if self._stop is None:
            await self._in_processor(self._take)
        return await self._wait()

    def _take(self) -> None:
        self._debugger.take(_OWNER, self._told)
        self._debugger.halt(_OWNER)

    def _told(self, stop: Stop) -> None:
        # With the registers, which every debugger asks for next.
        self._token.run_sync_soon(self._note, stop, self._debugger.values())

    def _note(self, stop: Stop, values: Values) -> None:
        self._stop, self._values = stop, values
        self._stopped.set()

    async def registers(self) -> Values:
        """As Target."""
        if self._values is None:
            self._values = await self._in_processor(self._debugger.values)
        return self._values

    async def set_register(self, number: int, value: int) -> None:
        """As Target."""
        self._values = None
        await self._in_processor(partial(self._debugger.set_register, number, value))

    async def read(self, address: int, n_bytes: int) -> bytes:
        """As Target."""
        return await self._in_processor(partial(self._debugger.read, address, n_bytes))

    async def write(self, address: int, data: bytes) -> None:
        """As Target."""
        await self._in_processor(partial(self._debugger.write, address, data))

    async def insert(self, point: Point) -> None:
        """As Target."""
        await self._set_points(self._points | {_one_kind(point)})

    async def remove(self, point: Point) -> None:
        """As Target."""
        await self._set_points(self._points - {_one_kind(point)})

    async def _set_points(self, points: frozenset[Point]) -> None:
        if points != self._points:
            await self._in_processor(partial(self._debugger.set_points, _OWNER, points))
            self._points = points

    async def resume(self, *, step: bool) -> Stop:
        """As Target."""
        await self.halt()
        self._stop, self._values, self._stopped = None, None, trio.Event()
        # Whatever comes of it is told as a stop: a step is one way there and one back.
        self._post(partial(self._debugger.go, _OWNER, step=step))
        return await self._wait()

    async def _wait(self) -> Stop:
        await self._stopped.wait()
        assert self._stop is not None
        return self._stop

    async def interrupt(self) -> None:
        """As Target."""
        await self._in_processor(partial(self._debugger.halt, _OWNER))

    async def release(self) -> None:
        """As Target."""
        self._points, self._stop, self._values, self._stopped = frozenset(), None, None, trio.Event()
        await self._in_processor(partial(self._debugger.release, _OWNER))

    async def kill(self) -> None:
        """As Target."""
        await self._killed()

    async def monitor(self, words: list[str]) -> str:
        """As Target."""
        self._values = None
        return await self._in_processor(partial(self._debugger.monitor, words))

    async def _in_processor(self, work: Callable[[], T]) -> T:
        return await in_processor(self._post, work, _ANSWER_SECONDS)


def _one_kind(point: Point) -> Point:
    """The two kinds of breakpoint are the same, however long GDB takes the instruction for."""
    return point if point.kind.is_watch else Point(PointKind.HARDWARE, point.address, 0)
