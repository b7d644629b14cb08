"""Registers of a POWER processor that this engine knows by name, each declared once.

Source: Power ISA 3.0B, book III, chapters 2, 4, 5 and 6; Linux `arch/powerpc/include/asm/reg.h`.
"""

from __future__ import annotations

from enum import IntEnum

WORD_BYTES = 4
"""An instruction."""
RS_SHIFT, RB_SHIFT = 21, 11
"""Of the five bits in an instruction that name the register RS (or RT), and RB."""


class Msr(IntEnum):
    """Bits of the machine state register."""

    SF = 1 << 63
    """64-bit mode."""
    HV = 1 << 60
    VEC = 1 << 25
    VSX = 1 << 23
    S = 1 << 22
    """Secure. Held by the processor, never by the engine's own MSR."""
    EE = 1 << 15
    """External interrupts and decrementer."""
    PR = 1 << 14
    """Problem state: user mode."""
    FP = 1 << 13
    ME = 1 << 12
    SE = 1 << 10
    """A trace interrupt behind each instruction."""
    BE = 1 << 9
    """A trace interrupt behind each branch."""
    IR = 1 << 5
    """Fetches are translated."""
    DR = 1 << 4
    """Loads and stores are translated."""
    RI = 1 << 1
    LE = 1 << 0
    """Little-endian."""


class Spr(IntEnum):
    """Special purpose registers."""

    XER = 1
    LR = 8
    CTR = 9
    DSISR = 18
    """Why a data storage interrupt came."""
    DAR = 19
    """The data address that an interrupt is about."""
    DEC = 22
    SRR0 = 26
    SRR1 = 27
    PIDR = 48
    """Which row of the process table the low half of the effective address space uses."""
    FSCR = 153
    HFSCR = 190
    TBL = 268
    """The whole time base; the engine reads it as plain storage."""
    TBU = 269
    SPRG0 = 272
    SPRG3 = 275
    PVR = 287
    SPURR = 308
    PURR = 309
    LPCR = 318


class Lpcr(IntEnum):
    """Bits of the logical partitioning control register, which the hypervisor owns."""

    UPRT = 1 << 22
    """Translation by process table."""
    HR = 1 << 20
    """The host translates by radix tree."""
    GTSE = 1 << 10
    """The guest may use tlbie."""


class Dsisr(IntEnum):
    """Causes of a storage interrupt; an instruction storage interrupt has them in SRR1."""

    NO_PTE = 0x4000_0000
    NO_EXECUTE = 0x1000_0000
    """Of fetches: not executable, or guarded."""
    PROTECTION = 0x0800_0000
    STORE = 0x0200_0000
    BAD_ATOMIC = 0x0000_0004
    """An atomic memory operation whose function code means nothing."""
    BAD_CONFIGURATION = 0x0008_0000
    """A radix tree whose entries contradict each other, or lie outside memory."""


class Srr1(IntEnum):
    """Causes of a program interrupt."""

    ILLEGAL = 0x8_0000
    PRIVILEGED = 0x4_0000
    TRAP = 0x2_0000
    FP_EXCEPTION = 0x10_0000


class Fscr(IntEnum):
    """Facilities that the kernel enables for its user programs."""

    DSCR = 1 << 2
    """By its number for users."""
    SCV = 1 << 12

    @property
    def cause(self) -> int:
        """The interruption cause of bits 0 to 7: the number of the facility's bit."""
        return (self.value.bit_length() - 1) << 56


SRR1_FROM_MSR = (1 << 64) - 1 & ~0x783F_0000
"""The MSR bits that an interrupt keeps in SRR1; the others tell why it came."""
EVERY_FACILITY = (1 << 56) - 1
