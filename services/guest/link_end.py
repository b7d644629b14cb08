"""The processor's end of a link, used blocking by the processor's own thread.

A hop through trio would cost more than the call. The thread sleeps on both of its links at once (see inbox.py); this
class only sends, receives without waiting, and pairs replies with calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import zmq

from protocol.errors import MalformedMessage, UnexpectedMessage
from protocol.links import LinkKind
from protocol.refusals import reply_of_code
from protocol.roles import Role
from protocol.wire import Envelope, MessageKind, decode, encode
from services.runtime.tracer import Tap
from services.runtime.watch import Watcher

# As plain integers: an operation on the library's enums costs as much as a call into it.
_NOBLOCK = int(zmq.NOBLOCK)
_RCVMORE = int(zmq.RCVMORE)
_EVENTS = int(zmq.EVENTS)
_IN = int(zmq.POLLIN)


class LinkEnd:
    """One link of a processor. `peer_state` is `up` or what became of the peer."""

    def __init__(self, socket: zmq.Socket[bytes], kind: LinkKind, link_id: str, peer: str) -> None:
        self.socket = socket
        self.fd: int = socket.FD
        self._unlooked = True
        """Whether something may have come that the descriptor does not tell any more."""
        self._recv = socket.recv
        self._put = socket.send
        self._get: Callable[[int], Any] = socket.getsockopt
        self.id = link_id
        self.peer = peer
        self.kind = kind
        self.peer_state = "up"
        self.tap: Tap | None = None
        """Set and taken away by another thread: looked at once for each message."""
        self.watch: Watcher | None = None
        self.serve_later: Callable[[Envelope], None] = lambda envelope: None
        """Has the processor serve a message; from any thread."""
        self._inbound = kind.inbound(Role.GUEST)
        self.n_calls = 0
        """Made so far; the last one's correlation id."""

    def send_call(self, number: int, body: Any, cause: int) -> int | None:  # noqa: ANN401
        """Send a call; its correlation id, or None when the peer takes no more messages."""
        self.n_calls = correlation = self.n_calls + 1
        return correlation if self._send(MessageKind.CALL, number, correlation, cause, body) else None

    def send_event(self, number: int, body: Any, cause: int) -> None:  # noqa: ANN401
        """Send an event; lost when the peer takes no more messages."""
        self._send(MessageKind.EVENT, number, 0, cause, body)

    def reply(self, envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        """Answer a call of the peer."""
        if envelope.kind is MessageKind.CALL:
            self._send(MessageKind.REPLY, envelope.number, envelope.correlation, envelope.cause, body)

    def serve_now(self, envelope: Envelope) -> None:
        """Have a message served that a watcher has kept."""
        self.serve_later(envelope)

    def refuse_now(self, envelope: Envelope, code: int) -> None:
        """Answer a call that a watcher has kept with `code` alone; in the processor's thread."""
        self.reply(envelope, reply_of_code(envelope.number, code))

    def may_have_message(self) -> bool:
        """Whether `receive` may give something; when not, the descriptor tells of the next message."""
        if self._unlooked:
            self._unlooked = bool(self._get(_EVENTS) & _IN)
        return self._unlooked

    def receive(self) -> Envelope | None:
        """The next message, or None; raises MalformedMessage, UnexpectedMessage."""
        try:
            frame = self._recv(_NOBLOCK)
        except zmq.Again:
            self._unlooked = False
            return None
        self._unlooked = True
        if self._get(_RCVMORE):
            self._refuse_parts(frame)
        tap = self.tap
        if tap is not None:
            tap(False, (frame,))
        envelope = decode(frame)
        if envelope.kind is not MessageKind.REPLY and envelope.number not in self._inbound:
            raise UnexpectedMessage(f"number {envelope.number:#x} is not carried in this direction")
        return envelope

    def _refuse_parts(self, first: bytes) -> NoReturn:
        frames = [first]
        while self._get(_RCVMORE):
            frames.append(self._recv())
        tap = self.tap
        if tap is not None:
            tap(False, frames)
        raise MalformedMessage(f"{len(frames)} frames where one is declared")

    def _send(self, kind: MessageKind, number: int, correlation: int, cause: int, body: Any) -> bool:  # noqa: ANN401
        frame = encode(kind, number, correlation, cause, body)
        tap = self.tap
        if tap is not None:
            tap(True, (frame,))
        self._unlooked = True
        try:
            self._put(frame, _NOBLOCK)
        except zmq.Again:
            return False
        return True
