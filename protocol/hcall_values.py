"""Values that arguments of hypercalls take, where kvm and the processor both look at them."""

from __future__ import annotations

from enum import IntEnum


class SetModeResource(IntEnum):
    """What H_SET_MODE sets (PAPR 14.5.4.3.6)."""

    CIABR = 1
    DAWR = 2
    ADDRESS_TRANSLATION_MODE = 3
    LITTLE_ENDIAN = 4


# H_REGISTER_PROC_TBL, flags (Linux `arch/powerpc/include/asm/hvcall.h`).
PROC_TABLE_MODIFY = 0x10
"""Without it the call changes nothing."""
PROC_TABLE_REGISTER = 0x08
"""Without it PROC_TABLE_MODIFY takes the table away."""
PROC_TABLE_RADIX = 0x04
PROC_TABLE_HASH = 0x02
PROC_TABLE_FLAGS = 0x1F
"""With 0x01: the guest uses tlbie itself, which it may here in any case."""
PROC_TABLE_ALIGN_MASK = 0xFFF
MAX_PROC_TABLE_SIZE = 24
"""The table has `4 KiB << size` bytes."""
