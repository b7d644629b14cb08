"""What a tlbie or tlbiel of the guest invalidates, of a TLB that caches single translations and no tree walks.

Source: Power ISA 3.0B, book III, 5.9.3.3 (tlbie, tlbiel); page sizes as radix trees have them (`mmu.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from services.guest.machine.mmu import KERNEL
from services.guest.machine.registers import RB_SHIFT, RS_SHIFT
from services.guest.machine.replaced import TLBIEL

_RIC_SHIFT, _PRS_BIT, _R_BIT = 18, 1 << 17, 1 << 16
_RIC_TLB, _RIC_WALKS, _RIC_ALL = 0, 1, 2
_IS_SHIFT, _AP_SHIFT, _SET_MASK = 10, 5, 0xFFF << 12
_IS_ADDRESS, _IS_PROCESS = 0, 1
_PID_SHIFT = 32
_ADDRESS_MASK = ((1 << 64) - 1) & -(1 << 12)
_PAGE_SHIFTS = {0b000: 12, 0b101: 16, 0b001: 21, 0b010: 30}
"""By actual page size (AP)."""


class Whole(Enum):
    """Not a part of the TLB."""

    NOTHING = "nothing"
    EVERYTHING = "everything"


@dataclass(frozen=True, slots=True)
class OfPage:
    """One page of 1 << `shift` bytes, which begins at `address`, of process `pid` (the kernel's are of process 0)."""

    address: int
    shift: int
    pid: int


@dataclass(frozen=True, slots=True)
class OfProcess:
    """All pages of process `pid`."""

    pid: int


Invalidation = Whole | OfPage | OfProcess


class Gprs(Protocol):
    """General registers."""

    def __getitem__(self, number: int, /) -> int:
        """One of them, unsigned."""


def invalidation(word: int, gprs: Gprs) -> Invalidation:
    """Of the instruction `word`, a tlbie or tlbiel, with these general registers. Never less than it says."""
    rb, rs = gprs[word >> RB_SHIFT & 31], gprs[word >> RS_SHIFT & 31]
    ric, scope = word >> _RIC_SHIFT & 3, rb >> _IS_SHIFT & 3
    if ric == _RIC_WALKS:
        return Whole.NOTHING
    if TLBIEL.matches(word) and scope != _IS_ADDRESS and rb & _SET_MASK:
        # Such a loop goes over the sets of the TLB: this one has a single set, whose number is 0.
        return Whole.NOTHING
    if ric not in (_RIC_TLB, _RIC_ALL) or not word & _PRS_BIT or not word & _R_BIT:
        return Whole.EVERYTHING
    pid = rs >> _PID_SHIFT
    if scope == _IS_PROCESS and pid:
        return OfProcess(pid)
    shift = _PAGE_SHIFTS.get(rb >> _AP_SHIFT & 7)
    if scope != _IS_ADDRESS or shift is None:
        return Whole.EVERYTHING
    address = rb & _ADDRESS_MASK & -(1 << shift)
    return OfPage(address, shift, 0 if address & KERNEL else pid)
