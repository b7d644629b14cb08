"""The socket of a bulk channel, behind a link that may have a shape.

Without one it is the socket. With one, what is sent is a segment of a stream that is kept until it may have arrived,
and only then written: so many segments are on their way at once, as many as the window of `Shaper` holds, and the
latency is paid once and not for each. The peer applies the shape to its own direction.
"""

from __future__ import annotations

import socket
from collections import deque

import trio

from services.qemu.shaping import Shaper
from shared.link_shape import LinkShape

LINGER_SECONDS = 2.0
"""For what is on its way when the socket is closed, as a kernel's socket has it."""


class ShapedSocket:
    """A stream socket; `send` raises OSError, or trio.ClosedResourceError after `close`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(connection)
        self._shaper: Shaper | None = None
        self._nursery: trio.Nursery | None = None
        self._flying: deque[tuple[float, bytes]] = deque()
        self._n_bytes = 0
        self._delivers = False
        self._scope = trio.CancelScope()
        self._changed = trio.Event()
        self._error: OSError | None = None
        self._closed = False

    def set_shape(self, shape: LinkShape, shaper: Shaper, nursery: trio.Nursery) -> None:
        """Another shape from now on; `shaper` and `nursery` are for the first one."""
        self._shaper = self._shaper or shaper
        self._nursery = self._nursery or nursery
        self._shaper.shape = shape
        self._wake()

    async def send(self, data: memoryview) -> int:
        """Send some of `data`; returns how much."""
        shaper = self._shaper
        if shaper is None or (shaper.shape.is_plain and not self._flying):
            return await self._socket.send(data)
        await trio.lowlevel.checkpoint()
        while True:
            self._check()
            segment = bytes(data[: shaper.segment_bytes])
            if not self._n_bytes or self._n_bytes + len(segment) <= shaper.window_bytes:
                break
            await self._changed.wait()
        self._keep(segment, shaper)
        return len(segment)

    async def recv_into(self, buffer: memoryview) -> int:
        """As a socket's."""
        return await self._socket.recv_into(buffer)

    def close(self) -> None:
        """Close. What is on its way still arrives, if it does so soon; then the peer finds the socket closed."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        if self._delivers:
            self._scope.deadline = trio.current_time() + LINGER_SECONDS
        else:
            self._socket.close()

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._error is not None:
            raise self._error

    def _keep(self, segment: bytes, shaper: Shaper) -> None:
        self._flying.append((shaper.segment(len(segment), trio.current_time()), segment))
        self._n_bytes += len(segment)
        if not self._delivers:
            assert self._nursery is not None
            self._delivers, self._scope = True, trio.CancelScope()
            self._nursery.start_soon(self._deliver)

    async def _deliver(self) -> None:
        """Write what arrives, until nothing is on its way, or the socket was closed a while ago."""
        try:
            with self._scope:
                while self._flying:
                    await self._deliver_next()
        except OSError as error:
            self._error = error
            self._flying.clear()
            self._n_bytes = 0
        finally:
            self._delivers = False
            self._wake()
            if self._closed:
                self._socket.close()

    async def _deliver_next(self) -> None:
        due, segment = self._flying[0]
        await trio.sleep_until(due)
        while self._shaper is not None and self._shaper.shape.passes_nothing:
            await self._changed.wait()
        rest = memoryview(segment)
        while rest:
            rest = rest[await self._socket.send(rest) :]
        self._flying.popleft()
        self._n_bytes -= len(segment)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
