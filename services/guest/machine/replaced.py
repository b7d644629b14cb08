"""Instructions that the engine does wrongly, slowly or without telling us, and what stands in their place.

Traps:

- mfmsr in a secure VM, since the engine cannot hold MSR.S; mfspr of PURR and SPURR;
- mtspr of PIDR, tlbie and tlbiel: the engine flushes its whole TLB for each, whatever it names, and we have to know
  what, to keep the rest behind it (`second_level_tlb.py`);
- slbia: it flushes the TLB as well, and with radix trees has nothing to do;
- scv 0 and rfscv, which the engine does not know.

A trap is `sc` with a level that is reserved, and that no kernel and no program uses. Its handler looks up the true
instruction in the true page. Those that are frequent have levels of their own, by which machine code knows what to do
(`native_exceptions.py`); of a tlbiel and a store to PIDR it needs to know the register with the operand too.

No-operations: the hints to other threads of the core (`or` of a register with itself), of which there are none. Linux
gives two or three on the way into its kernel and back, and the engine leaves its loop for each. So they do not change
PPR, which is what was last stored to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from services.guest.machine.registers import RB_SHIFT, RS_SHIFT, WORD_BYTES

_SC = 0x44000002
_LEVEL_SHIFT = 5
_LEVEL = 5
_SLBIA_LEVEL = 6
_SCV_LEVEL = 7
_RFSCV_LEVEL = 8
_LEVELS = range(_LEVEL, _RFSCV_LEVEL + 1)
_TLBIEL_LEVELS = range(32, 64)
"""One for each general register that may hold its operand RB."""
_PIDR_LEVELS = range(64, 96)
"""One for each general register that PIDR may be stored from."""
_HALF = 0xFFFF
_BYTE = 0xFF
_NOP = 0x60000000
_HINTS = tuple(0x7C000378 | number << 21 | number << 16 | number << 11 for number in (31, 1, 6, 2, 5, 3))
"""The priorities that a kernel may give its thread, from the lowest to the highest."""

_Order = Literal["little", "big"]
Replacement = tuple[int, bytes]
"""Offset of an instruction, and the bytes that take its place."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Instruction words that are `value` in the bits of `mask`, among them the lowest eight."""

    value: int
    mask: int

    def matches(self, word: int) -> bool:
        """Whether `word` is one of them."""
        return word & self.mask == self.value


_OF_ANY_REGISTER = 0xFC1FFFFF
_OF_ANY_OPERANDS = 0xFC0007FF
_WHOLE = 0xFFFFFFFF
MFMSR = Pattern(0x7C0000A6, _OF_ANY_REGISTER)
MFPURR = Pattern(0x7C154AA6, _OF_ANY_REGISTER)
MFSPURR = Pattern(0x7C144AA6, _OF_ANY_REGISTER)
MTPIDR = Pattern(0x7C100BA6, _OF_ANY_REGISTER)
TLBIE = Pattern(0x7C000264, _OF_ANY_OPERANDS)
TLBIEL = Pattern(0x7C000224, _OF_ANY_OPERANDS)
SLBIA = Pattern(0x7C0003E4, _OF_ANY_REGISTER)
SCV = Pattern(0x44000001, _WHOLE)
"""With level 0, which is Linux's."""
RFSCV = Pattern(0x4C0000A4, _WHOLE)
_WRONG = (MFPURR, MFSPURR, MTPIDR)
_WRONG_IN_SECURE = (MFMSR, *_WRONG)
_OWN_LEVELS = ((SLBIA, _SLBIA_LEVEL), (SCV, _SCV_LEVEL), (RFSCV, _RFSCV_LEVEL))
_SLOW = (TLBIE, TLBIEL, SLBIA, SCV, RFSCV)


def is_trapped(word: int) -> bool:
    """Whether a trap may stand in the place of this instruction."""
    return any(pattern.matches(word) for pattern in (*_WRONG_IN_SECURE, *_SLOW))


def is_trap_level(level: int) -> bool:
    """Whether a system call of this level may be a trap."""
    return level in _LEVELS or level in _TLBIEL_LEVELS or level in _PIDR_LEVELS


def needed(page: bytes, *, little_endian: bool, hide_msr: bool) -> list[Replacement]:
    """What must not run as it is in a code page; mfmsr must not when `hide_msr` is set."""
    return _traps(page, _WRONG_IN_SECURE if hide_msr else _WRONG, "little" if little_endian else "big")


def useful(page: bytes, *, little_endian: bool) -> list[Replacement]:
    """What only runs slower as it is."""
    order: _Order = "little" if little_endian else "big"
    nop = _NOP.to_bytes(WORD_BYTES, order)
    found = [(at, nop) for hint in _HINTS for at in _places(page, hint.to_bytes(WORD_BYTES, order), 0)]
    return found + _traps(page, _SLOW, order)


def _traps(page: bytes, patterns: tuple[Pattern, ...], order: _Order) -> list[Replacement]:
    return [
        (at, (_SC | _level(word) << _LEVEL_SHIFT).to_bytes(WORD_BYTES, order))
        for pattern in patterns
        for at, word in _matches(page, pattern, order)
    ]


def _matches(page: bytes, pattern: Pattern, order: _Order) -> Iterator[tuple[int, int]]:
    # The low end of a word depends on no operand, or hardly: searching for it passes over nearly everything.
    if pattern.mask & _HALF == _HALF:
        half = (pattern.value & _HALF).to_bytes(2, order)
        places: Iterable[int] = _places(page, half, 0 if order == "little" else 2)
    else:
        lowest = page[0 if order == "little" else WORD_BYTES - 1 :: WORD_BYTES]
        places = (at * WORD_BYTES for at in _finds(lowest, bytes((pattern.value & _BYTE,))))
    for at in places:
        word = int.from_bytes(page[at : at + WORD_BYTES], order)
        if pattern.matches(word):
            yield at, word


def _places(page: bytes, part: bytes, within: int) -> Iterator[int]:
    """Offsets of the words that have `part` at `within`."""
    return (at - within for at in _finds(page, part) if at % WORD_BYTES == within)


def _finds(data: bytes, part: bytes) -> Iterator[int]:
    at = data.find(part)
    while at >= 0:
        yield at
        at = data.find(part, at + 1)


def _level(word: int) -> int:
    if TLBIEL.matches(word):
        return _TLBIEL_LEVELS[word >> RB_SHIFT & 31]
    if MTPIDR.matches(word):
        return _PIDR_LEVELS[word >> RS_SHIFT & 31]
    return next((level for pattern, level in _OWN_LEVELS if pattern.matches(word)), _LEVEL)
