"""When what is sent over a shaped link arrives, or that it is lost: the plain rules, without a clock of their own.

One Shaper is one direction of one link between two qemus. A link has a line, which what is sent occupies one after the
other for as long as the bandwidth says, and then takes latency and jitter to the other end. Nothing overtakes what was
sent before it, so a late one holds up those behind it. Times are seconds of any clock that does not go back, given by
the caller, as is the random source.
"""

from __future__ import annotations

from random import Random

from shared.link_shape import PLAIN, LinkShape

MAX_QUEUE_BYTES = 256 << 10
MAX_QUEUE_SECONDS = 1.0
"""What waits for the line; a datagram that finds more before it is lost."""
RETRANSMIT_SECONDS = 0.2
"""What a loss costs a stream (Linux: TCP_RTO_MIN)."""
MAX_RETRANSMITS = 10
MAX_WINDOW_BYTES = 4 << 20
_MIN_SEGMENT_BYTES, _MAX_SEGMENT_BYTES = 1 << 10, 64 << 10
_SEGMENT_SECONDS = 0.02
_WINDOW_SECONDS = 0.1
_MS = 1000


class Shaper:
    """One direction of one link."""

    def __init__(self, random: Random, shape: LinkShape = PLAIN) -> None:
        self.shape = shape
        """May be replaced at any time; what is on its way already keeps its time of arrival."""
        self._random = random
        self._line_free = 0.0
        self._last_arrival = 0.0

    def datagram(self, n_bytes: int, now: float) -> float | None:
        """When `n_bytes` that are sent now arrive; None: never."""
        waits = max(0.0, self._line_free - now)
        too_long = waits > MAX_QUEUE_SECONDS or waits * self.shape.bandwidth_bytes_per_second > MAX_QUEUE_BYTES
        if self.shape.passes_nothing or too_long:
            return None
        sent = self._occupy_line(n_bytes, now)
        # It was on the line, and is lost behind it.
        return None if self._loses() else self._arrival(sent)

    def segment(self, n_bytes: int, now: float) -> float:
        """When `n_bytes` of a stream that are sent now arrive, if the link is not cut then; a loss costs time."""
        sent = self._occupy_line(n_bytes, now)
        n_lost = 0
        while n_lost < MAX_RETRANSMITS and not self.shape.passes_nothing and self._loses():
            n_lost += 1
        return self._arrival(sent + n_lost * RETRANSMIT_SECONDS)

    @property
    def segment_bytes(self) -> int:
        """How much of a stream is sent at once: little of it is decided before a change of the bandwidth counts."""
        bandwidth = self.shape.bandwidth_bytes_per_second
        if not bandwidth:
            return _MAX_SEGMENT_BYTES
        return min(max(int(bandwidth * _SEGMENT_SECONDS), _MIN_SEGMENT_BYTES), _MAX_SEGMENT_BYTES)

    @property
    def window_bytes(self) -> int:
        """How much of a stream may be on its way: enough to keep the line busy."""
        bandwidth = self.shape.bandwidth_bytes_per_second
        if not bandwidth:
            return MAX_WINDOW_BYTES
        seconds = (self.shape.latency_ms + self.shape.jitter_ms) / _MS + _WINDOW_SECONDS
        return min(max(int(bandwidth * seconds), 2 * self.segment_bytes), MAX_WINDOW_BYTES)

    def _loses(self) -> bool:
        return bool(self.shape.loss) and self._random.random() < self.shape.loss

    def _occupy_line(self, n_bytes: int, now: float) -> float:
        """When the last of them has left."""
        bandwidth = self.shape.bandwidth_bytes_per_second
        self._line_free = max(self._line_free, now) + (n_bytes / bandwidth if bandwidth else 0.0)
        return self._line_free

    def _arrival(self, sent: float) -> float:
        delay_ms = self.shape.latency_ms + self.shape.jitter_ms * self._random.random()
        self._last_arrival = max(self._last_arrival, sent + delay_ms / _MS)
        return self._last_arrival
