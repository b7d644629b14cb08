"""Numbers that look random and are the same in every run with the same seed."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def next_random(value: int) -> int:
    """xorshift64: the number after `value`, never 0 for a value that is not 0."""
    value ^= value << 13 & _MASK
    value ^= value >> 7
    return value ^ value << 17 & _MASK
