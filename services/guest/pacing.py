"""How an idle guest whose clock jumps spares the host.

With `time = "instructions"` an idle processor jumps to its next timer, and a guest that only waits for its terminal
would jump for ever, with a whole core of the host. So guest time may be a minute ahead of the host's; what is jumped
beyond that costs a tenth of it in real time. Nothing of it is seen by the guest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FREE_AHEAD_NS = 60_000_000_000
SPEED = 10
MIN_WAIT_NS = 5_000_000
"""Shorter waits are put off until they have added up to this."""
MAX_WAIT_NS = 50_000_000
"""A message of kvm or ultravisor ends a wait, so this only bounds how long other work is held up."""
_NS_PER_MS = 1_000_000


class Pacer:
    """Of one processor; `host_ns` is the host's monotonic clock."""

    def __init__(self, host_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._host_ns = host_ns
        self._ahead_ns = 0
        self._last_host_ns = host_ns()
        self._owed_ns = 0

    def wait_ms(self, jumped_ns: int) -> int:
        """How long to wait after guest time jumped by `jumped_ns`; 0 for not at all."""
        now_ns = self._host_ns()
        self._ahead_ns = max(0, self._ahead_ns + jumped_ns - (now_ns - self._last_host_ns))
        self._last_host_ns = now_ns
        if self._ahead_ns <= FREE_AHEAD_NS:
            self._owed_ns = 0
            return 0
        self._owed_ns += jumped_ns // SPEED
        if self._owed_ns < MIN_WAIT_NS:
            return 0
        wait_ns, self._owed_ns = min(self._owed_ns, MAX_WAIT_NS), 0
        return wait_ns // _NS_PER_MS
