"""How the late qemu tells the boot stage that a large read has begun."""

from __future__ import annotations

BEGUN = b"\x01"
"""The first byte of the buffer, from then on."""
LOOK_SECONDS = 0.001
