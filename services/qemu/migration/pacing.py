"""How fast bytes may leave: a bandwidth limit that forgives a short burst.

Time is nanoseconds of any clock that does not go back, given by the caller.
"""

from __future__ import annotations

NS = 1_000_000_000
BURST_NS = 100_000_000
"""What was not used is kept for so long (QEMU's BUFFER_DELAY is 100 ms, too)."""


class Pacer:
    """At most `bytes_per_second` over any time longer than a burst; 0 is no limit."""

    def __init__(self, bytes_per_second: int, now_ns: int) -> None:
        self._rate = bytes_per_second
        self._paid_until_ns = now_ns

    def set_rate(self, bytes_per_second: int, now_ns: int) -> None:
        """Another limit from now on; what is owed under the old one is not."""
        self._rate = bytes_per_second
        self._paid_until_ns = now_ns

    def spend(self, n_bytes: int, now_ns: int) -> int:
        """`n_bytes` leave now; nanoseconds to wait before the next ones."""
        if not self._rate:
            return 0
        self._paid_until_ns = max(self._paid_until_ns, now_ns - BURST_NS) + n_bytes * NS // self._rate
        return max(0, self._paid_until_ns - now_ns)
