"""64-bit registers as signed codes and back."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_SIGN = 1 << 63


def to_register(value: int) -> int:
    """`value` as an unsigned 64-bit register."""
    return value & _MASK


def to_signed(register: int) -> int:
    """The two's complement meaning of a register."""
    return register - (_SIGN << 1) if register & _SIGN else register
