"""What a detached launcher tells whoever started it."""

from __future__ import annotations

import msgspec


class Outcome(msgspec.Struct, frozen=True):
    """Said once: the cluster's name when it is up, else the one line that says why not."""

    cluster: str | None = None
    error: str | None = None
