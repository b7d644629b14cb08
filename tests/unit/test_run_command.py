"""`pefbox run` with what it cannot run: one line, exit status 125, nothing started."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deploy.cli_run import run
from tests.unit.program_files import BASE, EM_X86_64, ET_DYN, VIRTUAL, elf_file

CONFIG = gzip.compress(b"CONFIG_PPC_SVM=y\nCONFIG_PPC_4K_PAGES=y\n")
SMALL_PAGES = elf_file([(BASE, b"IKCFG_ST" + CONFIG + b"IKCFG_ED", 4096)])


def refused(data: bytes | None, tmp_path: Path, *words: str) -> Result:
    path = tmp_path / "program.elf"
    if data is not None:
        path.write_bytes(data)
    result = CliRunner().invoke(run, [str(path), *words])
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result


@pytest.mark.parametrize(
    ("data", "words", "line"),
    [
        (None, (), "program.elf: No such file or directory"),
        (b"#!/bin/sh\n", (), "program.elf: is no ELF file"),
        (elf_file()[:90], (), "program.elf: is a broken ELF file"),
        (elf_file(machine=EM_X86_64), (), "program.elf: is a program for EM_X86_64, not for a 64-bit POWER processor"),
        (elf_file(kind=ET_DYN), (), "program.elf: is ET_DYN, not a linked program at fixed addresses"),
        (elf_file([(BASE, b"x", 128 << 20)]), (), "the VM has 64 MiB of memory; give it more with --memory"),
        (elf_file(), ("--memory", "much"), '--memory: "much" is no size'),
        (elf_file(), ("--memory", "1M"), "--memory: 1M is not possible; allowed: 16777216 to"),
        (elf_file(entry=VIRTUAL + BASE + 4), ("--secure",), "a secure program starts at its first byte"),
        (elf_file(), ("--append", "\udcff"), "--append: must have printable ASCII characters only"),
        (elf_file(), ("--append", "\udcff", "--secure"), "--append: must have printable ASCII characters only"),
        (elf_file(), ("--append", "x" * 2049), "--append: has 2049 characters; allowed: up to 2048"),
        (elf_file(), ("--initrd", "disk-\udcff"), "disk-?: is no UTF-8 text"),
        (elf_file(), ("--initrd", "/no/disk"), "pefbox: /no/disk: No such file or directory"),
        (elf_file(), ("--initrd", "/"), "pefbox: /: Is a directory"),
        (SMALL_PAGES, ("--secure",), "no CONFIG_PPC_64K_PAGES: it counts pages of 4 KiB"),
    ],
)
def test_what_cannot_run_is_refused_with_one_line(
    data: bytes | None, words: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    result = refused(data, tmp_path, *words)

    assert line in result.stderr
    assert result.exit_code == 125


@pytest.mark.parametrize("words", [("--timeout", "0"), ("--timeout", "nan"), ("--time", "sundial"), ("--frob",)])
def test_a_wrong_command_line_has_status_2(words: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(run, [str(tmp_path / "program.elf"), *words])

    assert result.exit_code == 2
