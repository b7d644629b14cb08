"""Memory that is used again for one large thing after the other.

To get a new megabyte from the system, page by page, takes longer than to copy it, and longer than to seal it.
"""

from __future__ import annotations


class Room:
    """Takes no memory before it is used, and then as much as the largest thing in it."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray())

    def of(self, n_bytes: int) -> memoryview:
        """So much of it, with any content: what was in it before is over."""
        if len(self._memory) < n_bytes:
            self._memory = memoryview(bytearray(n_bytes))
        return self._memory[:n_bytes]
