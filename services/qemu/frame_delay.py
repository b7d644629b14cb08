"""Ethernet frames on their way to the qemu of another host, over a link that has a shape.

A peer whose link never had one is not here at all: its frames go out as they come.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import trio

from protocol.messages import MAX_NET_FRAMES
from services.qemu.network import MAX_BATCH_BYTES, Drop, PeerPort
from services.qemu.shaping import Shaper
from shared.link_shape import LinkShape

MAX_FLIGHT_BYTES = 4 << 20
"""On the way to one peer: with a long latency and no bandwidth nothing else bounds them."""


class _Flying(NamedTuple):
    due: float
    frame: bytes
    port: PeerPort


class FrameDelay:
    """All frames to one peer, whatever their network: they share the link. A task of `nursery` lives while some fly."""

    def __init__(self, shaper: Shaper, nursery: trio.Nursery) -> None:
        self._shaper, self._nursery = shaper, nursery
        self._flying: deque[_Flying] = deque()
        self._n_bytes = 0
        self._delivers = False

    def set_shape(self, shape: LinkShape) -> None:
        """Another shape from now on. A cut takes along what is on its way."""
        self._shaper.shape = shape
        if shape.down:
            self._lose_all()

    def send(self, frames: list[bytes], port: PeerPort) -> None:
        """Take frames that `port` sends, each to arrive later or never."""
        if self._shaper.shape.is_plain and not self._flying:
            port.deliver(frames)
            return
        now = trio.current_time()
        for frame in frames:
            due = self._shaper.datagram(len(frame), now) if self._n_bytes < MAX_FLIGHT_BYTES else None
            if due is None:
                port.traffic.dropped[Drop.LINK] += 1
                continue
            self._flying.append(_Flying(due, frame, port))
            self._n_bytes += len(frame)
        if self._flying and not self._delivers:
            self._delivers = True
            self._nursery.start_soon(self._deliver)

    async def _deliver(self) -> None:
        try:
            while self._flying:
                await trio.sleep_until(self._flying[0].due)
                self._deliver_due(trio.current_time())
        finally:
            self._delivers = False

    def _deliver_due(self, now: float) -> None:
        while self._flying and self._flying[0].due <= now:
            port = self._flying[0].port
            port.deliver(self._take_batch(port, now))

    def _take_batch(self, port: PeerPort, now: float) -> list[bytes]:
        """What arrives from `port` now, as much as one message takes."""
        frames = [self._take()]
        n_bytes = len(frames[0])
        while self._flying and len(frames) < MAX_NET_FRAMES:
            due, frame, own_port = self._flying[0]
            if due > now or own_port is not port or n_bytes + len(frame) > MAX_BATCH_BYTES:
                break
            frames.append(self._take())
            n_bytes += len(frame)
        return frames

    def _take(self) -> bytes:
        frame = self._flying.popleft().frame
        self._n_bytes -= len(frame)
        return frame

    def _lose_all(self) -> None:
        for flying in self._flying:
            flying.port.traffic.dropped[Drop.LINK] += 1
        self._flying.clear()
        self._n_bytes = 0
