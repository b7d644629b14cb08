"""The flat kernel that a digest covers."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.esm_kernel import kernel_image

PROGBITS, NOBITS, STRTAB = 1, 8, 3
ALLOC = 2
SEGMENT_AT = 0x1000


def elf(sections: list[tuple[int, int, int, bytes]], *, paddr: int, vaddr: int) -> bytes:
    """A big-endian ppc64 ELF file of one segment: sections are (type, flags, address, content)."""
    content = b""
    headers = [bytes(64)]
    for kind, flags, address, data in sections:
        offset = SEGMENT_AT + (address - vaddr if kind == PROGBITS and flags & ALLOC else len(content))
        content = content.ljust(offset - SEGMENT_AT, b"\xee") + (data if kind != NOBITS else b"")
        headers.append(struct.pack(">IIQQQQIIQQ", 0, kind, flags, address, offset, len(data), 0, 0, 1, 0))
    names_at = SEGMENT_AT + len(content)
    headers.append(struct.pack(">IIQQQQIIQQ", 0, STRTAB, 0, 0, names_at, 1, 0, 0, 1, 0))
    loaded = struct.pack(">IIQQQQQQ", 1, 7, SEGMENT_AT, vaddr, paddr, len(content), len(content), 4)
    ident = b"\x7fELF\x02\x02\x01".ljust(16, b"\0")
    table_at = names_at + 8
    head = ident + struct.pack(
        ">HHIQQQIHHHHHH", 2, 21, 1, vaddr, 64, table_at, 0, 64, 56, 1, 64, len(headers), len(headers) - 1
    )
    body = (head + loaded).ljust(SEGMENT_AT, b"\0") + content + bytes(8)
    return body + b"".join(headers)


KERNEL = elf(
    [
        (PROGBITS, ALLOC, 0xC000000000000000, b"text"),
        (PROGBITS, ALLOC, 0xC000000000000010, b"data"),
        (PROGBITS, 0, 0, b"symbols that nobody loads"),
        (NOBITS, ALLOC, 0xC000000000000014, bytes(4096)),
    ],
    vaddr=0xC000000000000000,
    paddr=0x400000,
)


def test_loaded_sections_are_laid_out_by_address_with_zero_between() -> None:
    assert kernel_image(KERNEL) == b"text" + bytes(12) + b"data"


def test_what_is_no_elf_file_is_flat_already() -> None:
    assert kernel_image(b"PEFMODEL image") == b"PEFMODEL image"


def test_an_elf_file_without_loaded_sections_is_refused() -> None:
    with pytest.raises(ValueError, match="no loaded section"):
        kernel_image(elf([(PROGBITS, 0, 0, b"notes")], vaddr=0, paddr=0))


def test_sections_far_apart_are_refused() -> None:
    far = elf([(PROGBITS, ALLOC, 0, b"a")], vaddr=0, paddr=1 << 20)
    second = bytearray(far)
    table_at = struct.unpack_from(">Q", far, 40)[0]
    names = bytes(second[table_at + 128 : table_at + 192])
    moved = struct.pack(">IIQQQQIIQQ", 0, PROGBITS, ALLOC, 1 << 40, len(far), 4, 0, 0, 1, 0)
    second[table_at + 128 :] = moved + names
    struct.pack_into(">HH", second, 60, 4, 3)

    with pytest.raises(ValueError, match="at most"):
        kernel_image(bytes(second))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(4, len(KERNEL) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_elf_file_is_laid_out_or_refused(edits: list[tuple[int, int]]) -> None:
    damaged = bytearray(KERNEL)
    for position, value in edits:
        damaged[position] = value
    try:
        kernel_image(bytes(damaged))
    except ValueError:
        pass


@pytest.mark.skipif(shutil.which("objcopy") is None, reason="needs the program objcopy")
@pytest.mark.parametrize("program", [sys.executable, shutil.which("ls") or sys.executable])
def test_the_program_objcopy_writes_the_same_image(program: str, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    subprocess.run(["objcopy", "-O", "binary", "-S", program, str(flat)], check=True)

    assert kernel_image(Path(program).read_bytes()) == flat.read_bytes()
