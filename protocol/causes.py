"""Cause ids: who gives them, so that no two are alike in a cluster.

    bits 48-63  lpid
    bit  47     set for a migration, which no call of the guest began
    bits 40-46  incarnation of the VM, its lowest bits: it begins to count anew with each
    bits  0-39  a count

0 is no cause: what nobody asked for.
"""

from __future__ import annotations

_LPID_SHIFT = 48
_INCARNATION_SHIFT = 40
_INCARNATION_MASK = 0x7F
_MIGRATION = 1 << 47


def first_cause(lpid: int, incarnation: int) -> int:
    """What the processor of a VM counts its calls from."""
    return lpid << _LPID_SHIFT | (incarnation & _INCARNATION_MASK) << _INCARNATION_SHIFT


def lpid_of(cause: int) -> int | None:
    """Whose partition a cause began in; None for what nobody asked for."""
    return cause >> _LPID_SHIFT or None


def migration_cause(lpid: int, incarnation: int, number: int) -> int:
    """That of the VM's `number`-th migration from where it runs in this incarnation."""
    return first_cause(lpid, incarnation) | _MIGRATION | number
