"""A tiny assembler for tests: POWER instruction words by name, and programs of them in either byte order.

Only what the tests need; operands are in the order of the architecture's own mnemonics.
"""

from __future__ import annotations

import struct

NOP = 0x60000000
SC0, SC1, SC2 = 0x44000002, 0x44000022, 0x44000042
RFID = 0x4C000024
BLR = 0x4E800020
BLRL = 0x4E800021
TRAP = 0x7FE00008
ISYNC = 0x4C00012C
PTESYNC = 0x7C4004AC
R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, R11, R12 = range(13)


def program(*words: int, little_endian: bool = False) -> bytes:
    """Instruction words as they lie in memory."""
    return struct.pack(f"{'<' if little_endian else '>'}{len(words)}I", *words)


def _d(opcode: int, rt: int, ra: int, value: int) -> int:
    return opcode << 26 | rt << 21 | ra << 16 | value & 0xFFFF


def _x(extended: int, rt: int, ra: int, rb: int) -> int:
    return 31 << 26 | rt << 21 | ra << 16 | rb << 11 | extended << 1


def li(rt: int, value: int) -> int:
    """rt = value, 16 bits signed."""
    return _d(14, rt, 0, value)


def addi(rt: int, ra: int, value: int) -> int:
    """rt = ra + value."""
    return _d(14, rt, ra, value)


def lis(rt: int, value: int) -> int:
    """rt = value << 16."""
    return _d(15, rt, 0, value)


def ori(ra: int, rs: int, value: int) -> int:
    """ra = rs | value."""
    return _d(24, rs, ra, value)


def oris(ra: int, rs: int, value: int) -> int:
    """ra = rs | value << 16."""
    return _d(25, rs, ra, value)


def sldi32(ra: int, rs: int) -> int:
    """ra = rs << 32."""
    return 30 << 26 | rs << 21 | ra << 16 | 31 << 6 | 1 << 1 | 1 << 2


def load64(rt: int, value: int) -> tuple[int, ...]:
    """rt = value, any 64 bits."""
    return (
        lis(rt, value >> 48 & 0xFFFF),
        ori(rt, rt, value >> 32 & 0xFFFF),
        sldi32(rt, rt),
        oris(rt, rt, value >> 16 & 0xFFFF),
        ori(rt, rt, value & 0xFFFF),
    )


def lbz(rt: int, value: int, ra: int) -> int:
    """Load a byte."""
    return _d(34, rt, ra, value)


def lwz(rt: int, value: int, ra: int) -> int:
    """Load a word."""
    return _d(32, rt, ra, value)


def ld(rt: int, value: int, ra: int) -> int:
    """Load a doubleword."""
    return _d(58, rt, ra, value)


def stw(rs: int, value: int, ra: int) -> int:
    """Store a word."""
    return _d(36, rs, ra, value)


def std(rs: int, value: int, ra: int) -> int:
    """Store a doubleword."""
    return _d(62, rs, ra, value)


def stwu(rs: int, value: int, ra: int) -> int:
    """Store a word and update ra."""
    return _d(37, rs, ra, value)


def ldu(rt: int, value: int, ra: int) -> int:
    """Load a doubleword and update ra."""
    return _d(58, rt, ra, value | 1)


def stdu(rs: int, value: int, ra: int) -> int:
    """Store a doubleword and update ra."""
    return _d(62, rs, ra, value | 1)


def lwbrx(rt: int, ra: int, rb: int) -> int:
    """Load a word, bytes reversed."""
    return _x(534, rt, ra, rb)


def lwarx(rt: int, ra: int, rb: int) -> int:
    """Load a word and reserve."""
    return _x(20, rt, ra, rb)


def mtspr(spr: int, rs: int) -> int:
    """Move to a special purpose register."""
    return _x(467, rs, spr & 31, spr >> 5)


def mfspr(rt: int, spr: int) -> int:
    """Move from a special purpose register."""
    return _x(339, rt, spr & 31, spr >> 5)


def mfmsr(rt: int) -> int:
    """Move from the MSR."""
    return _x(83, rt, 0, 0)


def mtmsrd(rs: int, only_ee: int = 0) -> int:
    """Move to the MSR."""
    return _x(178, rs, only_ee, 0)


def b(n_words: int) -> int:
    """Branch, relative in words."""
    return 18 << 26 | n_words * 4 & 0x3FFFFFC


def bdnz(n_words: int) -> int:
    """Decrement CTR, branch when it is not 0."""
    return 16 << 26 | 16 << 21 | n_words * 4 & 0xFFFC


def tlbie(rb: int, rs: int, *, ric: int = 0, prs: int = 1, radix: int = 1) -> int:
    """Invalidate translations: by default that of a page of a process, of a radix tree."""
    return _x(306, rs, ric << 2 | prs << 1 | radix, rb)


def tlbiel(rb: int, rs: int, *, ric: int = 0, prs: int = 1, radix: int = 1) -> int:
    """The same on this processor alone."""
    return _x(274, rs, ric << 2 | prs << 1 | radix, rb)


def mr(ra: int, rs: int) -> int:
    """Move a register; to itself it is a hint, for some of them a priority of the thread."""
    return _x(444, rs, ra, rs)


SLBIA = 0x7C0003E4


def scv(level: int) -> int:
    """System call vectored."""
    return 0x44000001 | level << 5


RFSCV = 0x4C0000A4


def fadd(frt: int, fra: int, frb: int) -> int:
    """Floating add."""
    return 63 << 26 | frt << 21 | fra << 16 | frb << 11 | 21 << 1


def vaddubm(vrt: int, vra: int, vrb: int) -> int:
    """Vector add bytes."""
    return 4 << 26 | vrt << 21 | vra << 16 | vrb << 11


def xxlor(xt: int, xa: int, xb: int) -> int:
    """VSX logical or."""
    return 60 << 26 | xt << 21 | xa << 16 | xb << 11 | 146 << 3
