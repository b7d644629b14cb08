"""The recorder: every frame of every link of a process, appended to one MessagePack log.

One array a frame: `[t_ns, link id, "in" or "out", frame, second frame or nil]`, t_ns on the host's monotonic clock.
Off by default; a link without a tap pays one comparison a message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from protocol import messages as m
from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.links import ULTRAVISOR_GUEST
from protocol.wire import MessageKind, decode, encode

Tap = Callable[[str, str, Sequence[bytes]], None]
_BUFFER_BYTES = 64 * 1024
_SECRET_LINK = f":{ULTRAVISOR_GUEST.name}."
_SECRET = frozenset({(MessageKind.REPLY, m.SVM_FREEZE.number), (MessageKind.CALL, m.SVM_LOAD.number)})
"""Messages with all registers of a secure VM, as their second field."""


class Recorder:
    """Appends frames to an open file descriptor; `flush` is called about twice a second and at the end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self.lost = 0

    def record(self, link: str, direction: str, frames: Sequence[bytes]) -> None:
        """Note one message."""
        payload = frames[1] if len(frames) > 1 else None
        first = _without_registers(frames[0]) if _SECRET_LINK in link else frames[0]
        self._buffer += self._encoder.encode((time.monotonic_ns(), link, direction, first, payload))
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered; a full disk loses it and counts it, the service goes on."""
        if not self._buffer:
            return
        data, self._buffer = bytes(self._buffer), bytearray()
        try:
            os.write(self._fd, data)
        except OSError:
            self.lost += len(data)


def _without_registers(frame: bytes) -> bytes:
    """`frame` as it may be written down: a record is a file, and registers hold what the guest works on (S1)."""
    try:
        envelope = decode(frame)
    except MalformedMessage:
        return frame
    if (envelope.kind, envelope.number) not in _SECRET:
        return frame
    try:
        first, *_ = msgspec.msgpack.decode(envelope.body, type=list[Any])
    except DECODE_ERRORS:
        first = None
    return encode(envelope.kind, envelope.number, envelope.correlation, envelope.cause, [first, b""])
