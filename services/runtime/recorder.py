"""The recorder: every frame of every link of a process, appended to one MessagePack log.

One array a frame: `[t_ns, link id, "in" or "out", frame, second frame or nil]`, t_ns on the host's monotonic clock.
Off by default; a link without a tap pays one comparison a message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import msgspec

Tap = Callable[[str, str, Sequence[bytes]], None]
_BUFFER_BYTES = 64 * 1024


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
        self._buffer += self._encoder.encode((time.monotonic_ns(), link, direction, frames[0], payload))
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
