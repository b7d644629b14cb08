"""ELF files made by hand, for tests that need no compiler."""

from __future__ import annotations

import struct
from collections.abc import Sequence

EM_PPC64, EM_X86_64 = 21, 62
ET_EXEC, ET_DYN = 2, 3
BASE = 0x400000

Segment = tuple[int, bytes, int]
"""Physical address, content, size in memory; the virtual address is 0xc000... above."""
VIRTUAL = 0xC000000000000000


def elf_file(
    segments: Sequence[Segment] = ((BASE, b"\x60\0\0\0" * 4, 64),),
    *,
    entry: int = VIRTUAL + BASE,
    machine: int = EM_PPC64,
    kind: int = ET_EXEC,
    order: str = ">",
) -> bytes:
    """A 64-bit ELF file with these PT_LOAD segments and no sections."""
    ident = b"\x7fELF" + bytes((2, 2 if order == ">" else 1, 1)) + bytes(9)
    header = struct.pack(f"{order}HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    at = 64 + 56 * len(segments)
    headers, contents = b"", b""
    for address, content, n_bytes in segments:
        place = at + len(contents)
        headers += struct.pack(
            f"{order}IIQQQQQQ", 1, 7, place, VIRTUAL + address, address, len(content), n_bytes, 0x10000
        )
        contents += content
    return ident + header + headers + contents
