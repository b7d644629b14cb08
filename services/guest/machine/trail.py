"""A digest of a run: at which instruction each call and device access came.

Two runs that are the same have the same trail; one number is compared instead of lists of hundreds of thousands.
"""

from __future__ import annotations

import hashlib
from struct import Struct

from services.guest.exits import Hypercall, MmioLoad, MmioStore, Ultracall

DIGEST_BYTES = 16
_entry = Struct("<BQQ")
_KINDS = {Hypercall: 0, Ultracall: 1, MmioLoad: 2, MmioStore: 3}


class Trail:
    """Of one processor since its start. One that was saved goes on with `n_exits` and `digest` of then: a running hash
    cannot be saved, so the digest takes the place of all that it was made from."""

    def __init__(self, n_exits: int = 0, digest: bytes = b"") -> None:
        self.n_exits = n_exits
        self._saved = (n_exits, digest)
        self._hash = hashlib.blake2b(digest, digest_size=DIGEST_BYTES)

    def add(self, n_instructions: int, exit_: Hypercall | Ultracall | MmioLoad | MmioStore) -> None:
        """One more, after `n_instructions` since the start."""
        what = exit_.number if isinstance(exit_, Hypercall | Ultracall) else exit_.gpa
        self.n_exits += 1
        self._hash.update(_entry.pack(_KINDS[type(exit_)], n_instructions, what))

    @property
    def digest(self) -> bytes:
        """Of all exits until now."""
        n_saved, digest = self._saved
        return digest if digest and self.n_exits == n_saved else self._hash.digest()

    def __str__(self) -> str:
        """Number of exits and digest."""
        return f"{self.n_exits}:{self.digest.hex()}"
