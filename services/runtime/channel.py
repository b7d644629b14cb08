"""A ZeroMQ socket under trio.

ZMQ_FD is edge-triggered, and *any* libzmq call on the socket may consume the edge: a reader that sleeps on the
descriptor can miss a message whose edge a sibling task's send ate. So one class owns the socket, one task reads it,
and after every send the reader is woken when there is something to read.

libzmq's own thread costs several times more for a message that comes alone than for one of a burst, since each wakes
it anew. So answers that the reader itself gives are sent together: when nothing more is to be read, or as soon as
`_SEND_BURST` of them wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import trio
import zmq

from protocol.errors import PeerError
from protocol.wire import MAX_BUNDLED, bundle

MAX_BACKLOG = 1024
_SLEEP_CAP_SECONDS = 1.0
_BURST = 64
_SEND_BURST = 16
# As plain integers: an operation on the library's enums costs as much as a call into it.
_IN = int(zmq.POLLIN)
_IN_OR_OUT = int(zmq.POLLIN | zmq.POLLOUT)
_EVENTS = int(zmq.EVENTS)
_RCVMORE = int(zmq.RCVMORE)
_NOBLOCK = int(zmq.NOBLOCK)


class ZmqChannel:
    """Frames in and out of one DEALER socket; used by one trio thread only.

    A send never waits: what the socket does not take is kept in order and sent later. A peer that lets more than
    `MAX_BACKLOG` messages pile up is refused with PeerError.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.bundles = False
        """Whether one-frame messages that leave together share a frame; the owner unbundles."""
        self._socket = socket
        self._fd: int = socket.FD
        self._get: Callable[[int], Any] = socket.getsockopt
        self._recv = socket.recv
        self._backlog: deque[Sequence[bytes]] = deque()
        self._held: list[Sequence[bytes]] = []
        self._sleeping: trio.CancelScope | None = None
        self._n_received = 0

    def send(self, frames: Sequence[bytes]) -> None:
        """Send one message, now or as soon as the peer takes it; raises PeerError when too many wait."""
        if self._held:
            self._send_held()
        self._put(frames)
        self._poke()

    def offer(self, frames: Sequence[bytes]) -> bool:
        """Send one message if the peer takes it now, else drop it; whether it went out."""
        if self._held:
            self._send_held()
        sent = not self._backlog and self._try_send(frames)
        self._poke()
        return sent

    def send_many(self, messages: Sequence[Sequence[bytes]]) -> None:
        """As `send` for each of `messages`, together."""
        if self._held:
            self._send_held()
        if len(self._backlog) + len(messages) > MAX_BACKLOG:
            raise PeerError(f"{MAX_BACKLOG} messages wait for a peer that does not read")
        self._put_many(messages)
        self._poke()

    def send_from_reader(self, frames: Sequence[bytes]) -> None:
        """As `send`, by the task that reads and in no hurry: goes out with what else it answers before it waits."""
        if len(self._backlog) + len(self._held) >= MAX_BACKLOG:
            raise PeerError(f"{MAX_BACKLOG} messages wait for a peer that does not read")
        self._held.append(frames)
        if len(self._held) >= _SEND_BURST:
            self._send_held()

    @property
    def n_queued(self) -> int:
        """Messages that the peer has not taken yet."""
        return len(self._backlog) + len(self._held)

    def hurry(self) -> None:
        """What was sent by `send_from_reader` goes out now: also by another task, for the reader may sleep."""
        if self._held:
            self._send_held()
            self._poke()

    async def receive(self) -> list[bytes]:
        """The next message. Only one task reads a channel."""
        while True:
            frames = self._try_receive()
            self._n_received = 0 if frames is None else (self._n_received + 1) % _BURST
            if frames is not None:
                if not self._n_received:
                    await trio.lowlevel.checkpoint()
                return frames
            if not self._looks_again():
                await self._sleep()

    async def serve(self, take: Callable[[list[bytes]], int]) -> NoReturn:
        """Hand what comes to `take`, which does not wait and returns how many messages it was, until cancelled.

        Only one task reads a channel.

        One scope serves many messages, since entering one costs as much as a message; a poke ends it.
        """
        while True:
            with trio.CancelScope() as scope:
                await self._serve_until_poked(take, scope)

    async def _serve_until_poked(self, take: Callable[[list[bytes]], int], scope: trio.CancelScope) -> None:
        n_in_burst = 0
        while True:
            frames = None if n_in_burst == 1 and self._is_alone() else self._try_receive()
            if frames is not None:
                n_in_burst += take(frames)
                if n_in_burst < _BURST:
                    continue
                # A flood must not keep the loop from its other work.
                self._send_held()
                await trio.lowlevel.checkpoint()
            elif not self._looks_again():
                self._sleeping = scope
                try:
                    await trio.lowlevel.wait_readable(self._fd)
                finally:
                    self._sleeping = None
            n_in_burst = 0

    def _is_alone(self) -> bool:
        """After a message: whether to stop reading. Most come alone, and then to look is cheaper than to be refused.

        An answer that is held goes out first, and one look after it serves for both.
        """
        return bool(self._held) or not self._get(_EVENTS) & _IN

    async def watch(self) -> NoReturn:
        """Once a second, wake a reader that sleeps although there is something to do: an edge was missed."""
        while True:
            await trio.sleep(_SLEEP_CAP_SECONDS)
            self._poke()

    def close(self) -> None:
        """Close the socket; messages that still wait are dropped."""
        if not self._socket.closed:
            trio.lowlevel.notify_closing(self._fd)
            self._socket.close(linger=0)

    def _try_receive(self) -> list[bytes] | None:
        if self._backlog:
            self._flush()
        try:
            frames = [self._recv(_NOBLOCK)]
        except zmq.Again:
            return None
        while self._get(_RCVMORE):
            frames.append(self._recv())
        return frames

    def _looks_again(self) -> bool:
        """Before the reader sleeps: send what is held. Whether there is something to do after all.

        What was just tried may have consumed an edge: of a message, or of a peer that can take one now.
        """
        if not self._held and not self._backlog:
            return False
        self._send_held()
        return self._has_work()

    def _put(self, frames: Sequence[bytes]) -> None:
        if self._backlog or not self._try_send(frames):
            if len(self._backlog) >= MAX_BACKLOG:
                raise PeerError(f"{MAX_BACKLOG} messages wait for a peer that does not read")
            self._backlog.append(frames)

    def _send_held(self) -> None:
        held, self._held = self._held, []
        self._put_many(held)

    def _put_many(self, messages: Sequence[Sequence[bytes]]) -> None:
        """Nothing is done between two sends, so that libzmq's thread, once awake, finds the next and stays awake."""
        if self.bundles and len(messages) > 1:
            messages = [
                (bundle([frame for (frame,) in messages[i : i + MAX_BUNDLED]]),)
                for i in range(0, len(messages), MAX_BUNDLED)
            ]
        n_sent = 0
        if not self._backlog:
            send = self._socket.send
            try:
                for frames in messages:
                    if len(frames) == 1:
                        send(frames[0], _NOBLOCK)
                    else:
                        self._socket.send_multipart(frames, zmq.NOBLOCK)
                    n_sent += 1
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                raise PeerError(f"the link is closed: {error.strerror}") from None
        self._backlog.extend(messages[n_sent:])

    def _try_send(self, frames: Sequence[bytes]) -> bool:
        try:
            if len(frames) == 1:
                self._socket.send(frames[0], _NOBLOCK)
            else:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise PeerError(f"the link is closed: {error.strerror}") from None
        return True

    def _flush(self) -> None:
        while self._backlog and self._try_send(self._backlog[0]):
            self._backlog.popleft()

    def _poke(self) -> None:
        """Wake the reader when there is something to do, whose edge our own call may have consumed."""
        if self._sleeping is not None and self._has_work():
            self._sleeping.cancel()

    def _has_work(self) -> bool:
        return bool(self._get(_EVENTS) & (_IN_OR_OUT if self._backlog else _IN))

    async def _sleep(self) -> None:
        with trio.CancelScope(deadline=trio.current_time() + _SLEEP_CAP_SECONDS) as scope:
            self._sleeping = scope
            try:
                await trio.lowlevel.wait_readable(self._fd)
            finally:
                self._sleeping = None
