"""A bare-metal program: what of its file lies where in RAM, and what is refused."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from protocol.rtas import EXIT
from services.qemu.program import NOT_SECURE_STATUS, ProgramLoad, stage_bytes
from services.qemu.testing import TestRam
from shared.elf_program import read_program
from shared.esm_digest import RTAS_TEXT
from tests.unit.program_files import BASE, EM_X86_64, ET_DYN, VIRTUAL, elf_file

LIMIT = 15 << 20
ELF_HEADER_BYTES, FILE_BYTES_AT = 64, 32
ASSEMBLER = "powerpc64-linux-gnu-as"


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_program_lies_at_its_physical_addresses_with_zeros_between(order: str) -> None:
    program = read_program(
        elf_file([(BASE + 8, b"code", 4), (BASE + 32, b"data", 100)], entry=VIRTUAL + BASE + 8, order=order)
    )

    assert program.base == program.entry == BASE + 8
    assert program.image == b"code" + bytes(20) + b"data"
    assert program.end == BASE + 132
    assert program.little_endian == (order == "<")


def with_file_bytes(n_bytes: int) -> bytes:
    """A program whose segment says that it has so much in the file."""
    at = ELF_HEADER_BYTES + FILE_BYTES_AT
    data = elf_file()
    return data[:at] + struct.pack(">Q", n_bytes) + data[at + 8 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"#!/bin/sh", "is no ELF file"),
        (b"\x7fELF", "is a broken ELF file"),
        (elf_file()[:100], "is a broken ELF file"),
        (elf_file(machine=EM_X86_64), "is a program for EM_X86_64, not for a 64-bit POWER processor"),
        (elf_file(kind=ET_DYN), "is ET_DYN, not a linked program"),
        (elf_file([]), "has no segment to load"),
        (elf_file(entry=VIRTUAL + 0x100), r"starts at 0xc000000000000100, where nothing is loaded"),
        (elf_file([(BASE, b"x", 8), (1 << 40, b"y", 8)]), "spans"),
        (elf_file([(BASE, bytes(16), 8)]), "a segment is longer in the file than in memory"),
        (with_file_bytes(1 << 62), "a segment is longer in the file than in memory"),
        (with_file_bytes(48), "a segment is cut off"),
        (elf_file(entry=VIRTUAL + BASE + 2), "starts at 0xc000000000400002, where no instruction can be"),
    ],
)
def test_a_file_that_is_no_program_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_program(data)


def test_a_program_starts_at_its_entry_with_the_tree_in_r3() -> None:
    load = ProgramLoad(elf_file(entry=VIRTUAL + BASE + 4), b"", LIMIT, secure=False)

    assert load.start(LIMIT) == (BASE + 4, {3: LIMIT, 4: 0, 5: 0})


def test_with_a_blob_the_boot_stage_starts_and_knows_program_tree_and_its_own_block() -> None:
    load = ProgramLoad(elf_file(), b"archive", LIMIT, secure=True)

    assert load.start(LIMIT) == (load.stage, {3: LIMIT, 4: BASE, 5: load.stage + 0x80})
    assert load.initrd < load.stage < load.rtas < LIMIT
    assert load.initrd % PAGE_BYTES == 0


async def test_everything_is_placed_and_memory_behind_the_program_is_cleared() -> None:
    ram = TestRam(LIMIT + (1 << 20))
    ram.bytes[BASE + 16 : BASE + 64] = b"x" * 48
    load = ProgramLoad(elf_file(), b"archive", LIMIT, secure=True)

    await load.place(ram.accessor)

    assert bytes(ram.bytes[BASE : BASE + 64]) == b"\x60\0\0\0" * 4 + bytes(48)
    assert bytes(ram.bytes[load.initrd : load.initrd + 7]) == b"archive"
    assert bytes(ram.bytes[load.rtas : load.rtas + len(RTAS_TEXT)]) == RTAS_TEXT
    assert bytes(ram.bytes[load.stage : load.stage + len(stage_bytes())]) == stage_bytes()


def test_a_program_larger_than_ram_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"image: ends at 0xf00000, and RAM for it ends at 0xee0000"):
        ProgramLoad(elf_file([(BASE, b"code", LIMIT - BASE)]), b"", LIMIT, secure=False)


def test_a_secure_program_must_start_at_its_first_byte() -> None:
    with pytest.raises(UserError, match="a secure program starts at its first byte"):
        ProgramLoad(elf_file(entry=VIRTUAL + BASE + 4), b"archive", LIMIT, secure=True)


def test_a_refused_stage_ends_the_vm_by_its_exit_service() -> None:
    assert struct.unpack(">5I", stage_bytes()[0x80:]) == (EXIT, 1, 1, NOT_SECURE_STATUS, 0)


STAGE = """
    mr 29, 3
    mr 31, 5
    mr 5, 29
    li 3, 0
    ori 3, 3, 0xf110
    .long 0x44000042
    mr 4, 31
    li 3, 0
    ori 3, 3, 0xf000
    sc 1
    b .
"""


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason="run: apt-get install gcc-powerpc64-linux-gnu")
def test_the_stage_is_what_the_assembler_makes_of_its_comments(tmp_path: Path) -> None:
    made = tmp_path / "stage.o"
    subprocess.run([ASSEMBLER, "-o", str(made), "-"], input=STAGE, text=True, check=True)

    assert stage_bytes()[: 11 * 4] in made.read_bytes()


def test_an_initial_ram_disk_alone_needs_no_boot_stage() -> None:
    load = ProgramLoad(elf_file(), b"ram disk", LIMIT, secure=False)

    assert load.start(LIMIT) == (BASE, {3: LIMIT, 4: 0, 5: 0})
    assert load.initrd < load.stage


def test_a_secure_program_linked_at_0_is_loaded_where_uv_esm_takes_it() -> None:
    load = ProgramLoad(elf_file([(0, b"\x60\0\0\0", 4)], entry=VIRTUAL), b"archive", 48 << 20, secure=True)

    assert (load.program.base, load.program.entry, load.program.end) == (32 << 20, 32 << 20, (32 << 20) + 4)
    assert load.start(LIMIT)[1][4] == 32 << 20
