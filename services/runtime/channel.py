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
from collections.abc import Sequence

import trio
import zmq

from protocol.errors import PeerError

MAX_BACKLOG = 1024
_SLEEP_CAP_SECONDS = 1.0
_BURST = 64
_SEND_BURST = 16


class ZmqChannel:
    """Frames in and out of one DEALER socket; used by one trio thread only.

    A send never waits: what the socket does not take is kept in order and sent later. A peer that lets more than
    `MAX_BACKLOG` messages pile up is refused with PeerError.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._fd: int = socket.FD
        self._backlog: deque[Sequence[bytes]] = deque()
        self._held: list[Sequence[bytes]] = []
        self._sleeping: trio.CancelScope | None = None
        self._received_in_burst = 0
        self.missed_edges = 0

    def send(self, frames: Sequence[bytes]) -> None:
        """Send one message, now or as soon as the peer takes it; raises PeerError when too many wait."""
        if self._held:
            self._send_held()
        self._put(frames)
        self._poke()

    def send_many(self, messages: Sequence[Sequence[bytes]]) -> None:
        """As `send` for each of `messages`, together."""
        if self._held:
            self._send_held()
        for frames in messages:
            self._put(frames)
        self._poke()

    def send_from_reader(self, frames: Sequence[bytes]) -> None:
        """As `send`, by the task that reads and in no hurry: goes out with what else it answers before it waits."""
        if len(self._backlog) + len(self._held) >= MAX_BACKLOG:
            raise PeerError(f"{MAX_BACKLOG} messages wait for a peer that does not read")
        self._held.append(frames)
        if len(self._held) >= _SEND_BURST:
            self._send_held()

    async def receive(self) -> list[bytes]:
        """The next message. Only one task calls this."""
        while True:
            if self._backlog:
                self._flush()
            try:
                frames = [self._socket.recv(zmq.NOBLOCK)]
            except zmq.Again:
                self._received_in_burst = 0
                if self._held:
                    self._send_held()
                    if self._has_work():
                        continue
                await self._sleep()
                continue
            while self._socket.getsockopt(zmq.RCVMORE):
                frames.append(self._socket.recv())
            self._received_in_burst += 1
            if self._received_in_burst >= _BURST:
                # A flood must not keep the loop from its other work.
                self._received_in_burst = 0
                if self._held:
                    self._send_held()
                await trio.lowlevel.checkpoint()
            return frames

    def close(self) -> None:
        """Close the socket; messages that still wait are dropped."""
        if not self._socket.closed:
            trio.lowlevel.notify_closing(self._fd)
            self._socket.close(linger=0)

    def _put(self, frames: Sequence[bytes]) -> None:
        if self._backlog or not self._try_send(frames):
            if len(self._backlog) >= MAX_BACKLOG:
                raise PeerError(f"{MAX_BACKLOG} messages wait for a peer that does not read")
            self._backlog.append(frames)

    def _send_held(self) -> None:
        held, self._held = self._held, []
        for frames in held:
            if self._backlog or not self._try_send(frames):
                self._backlog.append(frames)

    def _try_send(self, frames: Sequence[bytes]) -> bool:
        try:
            if len(frames) == 1:
                self._socket.send(frames[0], zmq.NOBLOCK)
            else:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _flush(self) -> None:
        while self._backlog and self._try_send(self._backlog[0]):
            self._backlog.popleft()

    def _poke(self) -> None:
        """Wake the reader when our own call consumed the edge that would have woken it."""
        if self._sleeping is not None and self._has_work():
            self._sleeping.cancel()

    def _has_work(self) -> bool:
        wanted = zmq.POLLIN | zmq.POLLOUT if self._backlog else zmq.POLLIN
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & wanted)

    async def _sleep(self) -> None:
        with trio.CancelScope(deadline=trio.current_time() + _SLEEP_CAP_SECONDS) as scope:
            self._sleeping = scope
            try:
                await trio.lowlevel.wait_readable(self._fd)
            finally:
                self._sleeping = None
        if scope.cancelled_caught and trio.current_time() >= scope.deadline:
            self._count_missed_edge()

    def _count_missed_edge(self) -> None:
        if self._has_work():
            self.missed_edges += 1
