"""A digest of a run: at which instruction each call and device access came.

Two runs that are the same have the same trail; one number is compared instead of lists of hundreds of thousands.
"""

from __future__ import annotations

import hashlib
from struct import Struct

from services.guest.exits import Hypercall, MmioLoad, MmioStore, Ultracall

_entry = Struct("<BQQ")
_KINDS = {Hypercall: 0, Ultracall: 1, MmioLoad: 2, MmioStore: 3}


class Trail:
    """Of one processor since its start."""

    def __init__(self) -> None:
        self.n_exits = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, n_instructions: int, exit_: Hypercall | Ultracall | MmioLoad | MmioStore) -> None:
        """One more, after `n_instructions` since the start."""
        what = exit_.number if isinstance(exit_, Hypercall | Ultracall) else exit_.gpa
        self.n_exits += 1
        self._hash.update(_entry.pack(_KINDS[type(exit_)], n_instructions, what))

    def __str__(self) -> str:
        """Number of exits and digest."""
        return f"{self.n_exits}:{self._hash.hexdigest()}"
