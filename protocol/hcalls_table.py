"""The table of hypercalls and the registers that several of them share.

The declarations are split by subject over `protocol.hcalls` and `protocol.hcalls_*`. Import `HCALLS` from
`protocol.hcalls`, which loads them all.
"""

from __future__ import annotations

from protocol.declare import Caller, CallTable, Kind, Reg, Space

HCALLS = CallTable(Space.HCALL)

GUEST = (Caller.VM, Caller.SVM)
HVCALL_H = "Linux hvcall.h"

FLAGS = Reg("flags", Kind.FLAGS)
UNIT = Reg("unit_address")
"""Unit address of a virtual I/O device, from its device tree node."""


def words(*names: str) -> tuple[Reg, ...]:
    """Plain 64-bit registers of these names."""
    return tuple(Reg(name) for name in names)


def declare_unhandled(number: int, name: str, args: tuple[Reg, ...] = (), results: tuple[Reg, ...] = ()) -> None:
    """Add a call that no process answers, so that traces and audit lines know its name and registers.

    Its reason stands in `protocol.unhandled`; a guest that tries it gets H_FUNCTION.
    """
    HCALLS.declare(number, name, args=args, results=results, callers=GUEST, source=HVCALL_H)
