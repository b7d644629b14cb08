"""Which pages an operator's question is about: `gpa`, and for some `n` pages from there."""

from __future__ import annotations

from typing import Any

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES, gfn_of

MAX_PAGES_A_QUERY = 4096


def gfn_asked(arguments: dict[str, Any], n_pages: int) -> int:
    """The frame of `gpa` in a RAM of `n_pages`; raises UserError when it lies outside."""
    gpa = int(arguments["gpa"])
    if not 0 <= gfn_of(gpa) < n_pages:
        raise UserError(f"gpa {gpa:#x} is outside RAM of {n_pages * PAGE_BYTES:#x} bytes")
    return gfn_of(gpa)


def gfns_asked(arguments: dict[str, Any], n_pages: int) -> range:
    """The frames of `n` pages (default 1) from `gpa`, MAX_PAGES_A_QUERY of them at most, none outside RAM."""
    first = gfn_asked(arguments, n_pages)
    n_asked = max(0, min(int(arguments.get("n", 1)), MAX_PAGES_A_QUERY, n_pages - first))
    return range(first, first + n_asked)
