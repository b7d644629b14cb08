"""One connection of GDB: bytes of a stream, packets, the target's stops, until either side ends it.

A debugger that disappears leaves nothing stopped: however a connection ends, the target is released, however long that
takes. Only what was killed is not to run on until it ends.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import trio

from protocol.errors import PefboxError
from services.runtime.gdb.packets import Decoder, Event, Mark, Packet, encode
from services.runtime.gdb.session import Leave, Resume, Session
from services.runtime.gdb.target import Stop, StopKind, Target
from services.runtime.log import Log

_READ_BYTES = 0x10000
_LEAVE_SECONDS = 0.5
"""A debugger that was closed a moment ago is still being released when the next one comes."""
_DETACH_SECONDS = 2.0
"""GDB hears that it has detached when the target runs, unless that takes longer."""
_KILL_SECONDS = 5.0
"""A target that was killed has ended by then, or it is let go."""


class Debuggers:
    """Serves the connections that come as descriptors, one at a time."""

    def __init__(self, make_target: Callable[[], Target], nursery: trio.Nursery, log: Log) -> None:
        self._make_target = make_target
        self._nursery = nursery
        self._log = log
        self._attached = trio.Semaphore(1, max_value=1)
        """Taken by a connection, given back when its target is released."""
        self._is_over = False

    def take(self, fd: int) -> None:
        """Serve GDB on a connected socket, which is closed when another one is served and does not leave soon."""
        self._nursery.start_soon(self._serve, fd)

    def close(self) -> None:
        """The target is about to end: nobody waits until it is released."""
        self._is_over = True

    async def _serve(self, fd: int) -> None:
        async with _stream(fd) as stream:
            with trio.move_on_after(_LEAVE_SECONDS) as waiting:
                await self._attached.acquire()
            if waiting.cancelled_caught:
                self._log.warning("debugger refused: another one is attached, or is still being released")
                return
            target, leave, released = self._make_target(), Leave(), trio.Event()
            try:
                leave = await self._debug(stream, target)
            finally:
                self._nursery.start_soon(self._release, target, leave, released)
            await _take_leave(stream, leave, released)

    async def _debug(self, stream: trio.SocketStream, target: Target) -> Leave:
        """Until the connection is over; how it ended."""
        self._log.info("debugger attached")
        leave = Leave()
        try:
            # Whoever attaches finds a target that stands still, before the first packet.
            await target.halt()
            leave = await _Connection(stream, target).run()
        except* PefboxError as errors:
            self._log.warning("debugger refused", reason=str(errors.exceptions[0]))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception as error:
            # A debugger's connection may break, and the process goes on.
            self._log.error("debugger's connection broke", exc_info=error)
        return leave

    async def _release(self, target: Target, leave: Leave, released: trio.Event) -> None:
        """A task of its own, which lasts until the target is let go: whoever held it waits for nothing any more."""
        try:
            if leave.kills:
                await trio.sleep(_KILL_SECONDS)
            if not self._is_over:
                await target.release()
        except Exception as error:
            # What held the target may be gone itself, and the connection has ended in any case.
            self._log.warning("debugger not released", reason=str(error))
        self._attached.release()
        released.set()
        self._log.info("debugger left")


async def _take_leave(stream: trio.SocketStream, leave: Leave, released: trio.Event) -> None:
    if not leave.reply:
        return
    if not leave.kills:
        with trio.move_on_after(_DETACH_SECONDS):
            await released.wait()
    with trio.move_on_after(_DETACH_SECONDS), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(encode(leave.reply))


def _stream(fd: int) -> trio.SocketStream:
    stream = socket.socket(fileno=fd)
    stream.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(stream))


class _Connection:
    def __init__(self, stream: trio.SocketStream, target: Target) -> None:
        self._stream = stream
        self._target = target
        self._session = Session(target)
        self._decoder = Decoder()
        self._last = b""
        self._runs = False
        self._sending = trio.Lock()

    async def run(self) -> Leave:
        """Until the connection is over; how it ended."""
        async with trio.open_nursery() as nursery:
            leave = await self._serve(nursery)
            nursery.cancel_scope.cancel()
        return leave

    async def _serve(self, nursery: trio.Nursery) -> Leave:
        while received := await self._stream.receive_some(_READ_BYTES):
            for event in self._decoder.feed(received):
                leave = await self._take(event, nursery)
                if leave is not None:
                    return leave
        return Leave()

    async def _take(self, event: Event, nursery: trio.Nursery) -> Leave | None:
        """None unless the connection is over."""
        if isinstance(event, Packet):
            if self._session.acknowledges:
                await self._put(b"+")
            return await self._answer(event.data, nursery)
        if event is Mark.INTERRUPT:
            if self._runs:
                await self._target.interrupt()
        elif event is Mark.NAK:
            await self._put(self._last)
        elif event is Mark.BAD and self._session.acknowledges:
            await self._put(b"-")
        return None

    async def _answer(self, data: bytes, nursery: trio.Nursery) -> Leave | None:
        if self._runs:
            # Nothing but an interrupt is for a target that runs: a debugger that does not keep to that is let go.
            return Leave()
        reply = await self._session.answer(data)
        if isinstance(reply, Leave):
            return reply
        if isinstance(reply, Resume):
            self._runs = True
            nursery.start_soon(self._resume, reply)
            return None
        await self._send(reply)
        # Only once the answer is out: what was asked for last still has its checksum.
        self._decoder.checked = self._session.acknowledges
        return None

    async def _resume(self, resume: Resume) -> None:
        try:
            stop = await self._target.resume(step=resume.step)
        except PefboxError as error:
            stop = Stop(StopKind.CRASHED, text=str(error))
        if stop.text:
            await self._send(b"O" + f"{stop.text}\n".encode().hex().encode())
        reply = await self._session.stopped(stop)
        self._runs = False
        await self._send(reply)

    async def _send(self, data: bytes) -> None:
        self._last = encode(data)
        await self._put(self._last)

    async def _put(self, data: bytes) -> None:
        # The answer to a stop may be asked for before the task that told of it is done with sending.
        async with self._sending:
            await self._stream.send_all(data)
