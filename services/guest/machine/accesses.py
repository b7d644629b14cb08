"""Loads and stores decoded from their instruction words, to perform them on devices.

The engine stops at an access to an address that is no RAM; this module says what the instruction would have done.
Source: Power ISA 3.0B, book I, 3.3 (fixed-point storage access) and appendix of opcodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Order = Literal["big", "little"]


@dataclass(frozen=True, slots=True)
class Form:
    """What an opcode does."""

    size: int
    store: bool
    update: bool = False
    signed: bool = False
    reversed: bool = False


@dataclass(frozen=True, slots=True)
class Access:
    """One instruction: `form`, the register that is loaded or stored and the one that update forms change."""

    form: Form
    register: int
    base: int


_D_FORMS = {
    32: Form(4, False),
    33: Form(4, False, update=True),
    34: Form(1, False),
    35: Form(1, False, update=True),
    36: Form(4, True),
    37: Form(4, True, update=True),
    38: Form(1, True),
    39: Form(1, True, update=True),
    40: Form(2, False),
    41: Form(2, False, update=True),
    42: Form(2, False, signed=True),
    43: Form(2, False, update=True, signed=True),
    44: Form(2, True),
    45: Form(2, True, update=True),
}
_DS_FORMS = {
    (58, 0): Form(8, False),
    (58, 1): Form(8, False, update=True),
    (58, 2): Form(4, False, signed=True),
    (62, 0): Form(8, True),
    (62, 1): Form(8, True, update=True),
}
_X_FORMS = {
    21: Form(8, False),
    23: Form(4, False),
    53: Form(8, False, update=True),
    55: Form(4, False, update=True),
    87: Form(1, False),
    119: Form(1, False, update=True),
    149: Form(8, True),
    151: Form(4, True),
    181: Form(8, True, update=True),
    183: Form(4, True, update=True),
    215: Form(1, True),
    247: Form(1, True, update=True),
    279: Form(2, False),
    311: Form(2, False, update=True),
    341: Form(4, False, signed=True),
    343: Form(2, False, signed=True),
    373: Form(4, False, update=True, signed=True),
    375: Form(2, False, update=True, signed=True),
    407: Form(2, True),
    439: Form(2, True, update=True),
    532: Form(8, False, reversed=True),
    534: Form(4, False, reversed=True),
    660: Form(8, True, reversed=True),
    662: Form(4, True, reversed=True),
    790: Form(2, False, reversed=True),
    918: Form(2, True, reversed=True),
}
"""Extended opcodes of opcode 31. The cache-inhibited forms (lwzcix and kin) are the hypervisor's own."""

_WITHOUT_INDEX = frozenset({582, 597, 614, 710, 725, 742})
"""Extended opcodes of lwat, lswi, ldat, stwat, stswi and stdat: in the place of RB is a function code or a count."""
_DS_MASK, _DQ_MASK = 0xFFFC, 0xFFF0
_DISPLACEMENT_MASKS = dict.fromkeys(range(32, 56), 0xFFFF) | {56: _DQ_MASK, 57: _DS_MASK, 58: _DS_MASK, 62: _DS_MASK}
_VSX_OPCODE = 61
"""lxv and stxv when its two low bits are 01, else lxsd and kin."""


def decode(word: int) -> Access | None:
    """The load or store that `word` is, None for any other instruction."""
    opcode = word >> 26
    if opcode == 31:
        form = _X_FORMS.get(word >> 1 & 0x3FF)
    elif opcode in (58, 62):
        form = _DS_FORMS.get((opcode, word & 3))
    else:
        form = _D_FORMS.get(opcode)
    if form is None:
        return None
    return Access(form, word >> 21 & 31, word >> 16 & 31)


class Registers(Protocol):
    """General registers by number."""

    def __getitem__(self, number: int, /) -> int:
        """The value of one."""


def effective_address(word: int, gpr: Registers) -> int | None:
    """The address that a storage instruction of any kind uses, None when `word` is none."""
    opcode = word >> 26
    base = word >> 16 & 31
    if opcode == 31:
        offset = 0 if word >> 1 & 0x3FF in _WITHOUT_INDEX else gpr[word >> 11 & 31]
    elif opcode in _DISPLACEMENT_MASKS or opcode == _VSX_OPCODE:
        vsx_mask = _DQ_MASK if word & 3 == 1 else _DS_MASK
        offset = word & _DISPLACEMENT_MASKS.get(opcode, vsx_mask)
        offset -= (offset & 0x8000) << 1
    else:
        return None
    return (gpr[base] if base else 0) + offset & (1 << 64) - 1


def register_value(form: Form, device_value: int, order: Order) -> int:
    """What a load puts into its register; `device_value` is the device's, little-endian as all of PCI."""
    data = device_value.to_bytes(form.size, "little")
    value = int.from_bytes(data, _order(form, order), signed=form.signed)
    return value & (1 << 64) - 1


def device_value(form: Form, register: int, order: Order) -> int:
    """What a store tells the device, little-endian."""
    data = (register & (1 << 8 * form.size) - 1).to_bytes(form.size, _order(form, order))
    return int.from_bytes(data, "little")


def _order(form: Form, order: Order) -> Order:
    if not form.reversed:
        return order
    return "little" if order == "big" else "big"
