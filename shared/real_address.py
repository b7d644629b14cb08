"""Host real addresses as kvm names them to the ultravisor.

Bits 0-39 are the offset in a VM's RAM segment, bits 40-47 its lpid, bit 48 (IBM bit 15) says secure memory.
"""

from __future__ import annotations

from protocol.geometry import MAX_VM_BYTES, PAGE_BYTES

LPID_SHIFT = 40
MAX_LPID = 0xFF
SECURE_BIT = 1 << 48


def real_address(lpid: int, offset: int) -> int:
    """The real address of byte `offset` in the normal RAM of `lpid`."""
    return lpid << LPID_SHIFT | offset


def offset_in_ram(ra: int, lpid: int) -> int | None:
    """The offset that `ra` names in the normal RAM of `lpid`, or None when it is no page of it.

    0, secure memory, another partition, an unaligned address and unknown high bits are all None.
    """
    offset = ra & MAX_VM_BYTES - 1
    if ra == 0 or ra >> LPID_SHIFT != lpid or offset % PAGE_BYTES:
        return None
    return offset
