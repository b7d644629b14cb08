"""The archive that carries the blob in front of the initial RAM disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ImageRefused
from shared.fdt_reader import FdtNode, FdtTree
from shared.fdt_writer import write_fdt
from shared.newc import find_blob, prepend_blob

BLOB = write_fdt(FdtTree(FdtNode("", {"compatible": b"ibm,esm\0"})))
INITRD = b"\x1f\x8b compressed"


def entry(name: str, data: bytes = b"", mode: int = 0o100644, name_size: int | None = None) -> bytes:
    raw_name = name.encode() + b"\0"
    size = len(raw_name) if name_size is None else name_size
    fields = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, size, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw_name
    head += bytes(-len(head) % 4)
    return head + data + bytes(-len(data) % 4)


def padded(archive: bytes) -> bytes:
    return archive + bytes(-len(archive) % 512)


TRAILER = entry("TRAILER!!!", mode=0)
GOOD = entry("opt/ibm/pef/esm_blob", BLOB)


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_a_prepended_blob_is_found_and_the_rest_is_the_measured_part(initrd: bytes) -> None:
    whole = prepend_blob(initrd, BLOB)

    found = find_blob(whole)

    assert whole[found.blob_start : found.blob_end] == BLOB
    assert whole[found.initrd_start :] == initrd
    assert found.initrd_start % 512 == 0


def test_an_archive_as_svm_tool_makes_it_is_taken() -> None:
    directories = b"".join(entry(name, mode=0o040755) for name in (".", "opt", "opt/ibm", "opt/ibm/pef"))
    whole = padded(directories + GOOD + TRAILER) + INITRD

    found = find_blob(memoryview(whole))

    assert whole[found.initrd_start :] == INITRD


def test_names_with_a_leading_dot_are_taken() -> None:
    whole = padded(entry("./opt", mode=0o040755) + entry("./opt/ibm/pef/x", BLOB) + TRAILER) + INITRD

    assert whole[find_blob(whole).initrd_start :] == INITRD


@pytest.mark.parametrize(
    ("initrd", "words"),
    [
        (b"", "no cpio archive"),
        (INITRD, "no cpio archive"),
        (padded(TRAILER) + INITRD, "holds no ESM blob"),
        (padded(entry("init", b"#!/bin/sh") + TRAILER), "'init', which no digest covers"),
        (padded(GOOD + entry("init", b"#!/bin/sh") + TRAILER), "'init', which no digest covers"),
        (padded(GOOD + entry("opt/ibm/pef/second", BLOB) + TRAILER), "'opt/ibm/pef/second'"),
        (padded(GOOD + entry("etc", mode=0o040777) + TRAILER), "'etc', which no digest covers"),
        (padded(GOOD + entry("opt", b"target", mode=0o120777) + TRAILER), "'opt', which no digest covers"),
        (padded(GOOD + entry("dev/mem", mode=0o020666) + TRAILER), "'dev/mem'"),
        (padded(entry("opt/ibm/pef/esm_blob", b"no tree") + TRAILER), "which no digest covers"),
        (padded(entry("opt/ibm/pef/../../../init", BLOB) + TRAILER), "which no digest covers"),
        (padded(entry("opt/ibm/pef/a\0b", BLOB) + TRAILER), "broken name"),
        (padded(entry("opt/ibm/pef/" + "x" * 300, BLOB) + TRAILER), "too large"),
        (padded(entry("x", name_size=0) + TRAILER), "too large"),
        (padded(entry("opt", mode=0o040755) * 20 + TRAILER), "more than 16 entries"),
        ((GOOD + TRAILER)[:-2], "cut off"),
        (GOOD + TRAILER, "cut off"),
        (GOOD, "no cpio archive"),
        ((GOOD + TRAILER).ljust(1024, b"\x1f") + INITRD, "padding"),
        (GOOD.replace(b"070701", b"070702") + TRAILER, "no cpio archive"),
        (padded(b"070701" + b" 0000001" * 13 + b"x\0\0\0" + TRAILER), "not hexadecimal"),
        (padded(b"070701" + b"+0000001" * 13 + b"x\0\0\0" + TRAILER), "not hexadecimal"),
    ],
)
def test_anything_else_in_front_of_the_initrd_is_refused(initrd: bytes, words: str) -> None:
    with pytest.raises(ImageRefused, match=words):
        find_blob(initrd)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 700))
def test_a_damaged_archive_is_read_or_refused(patch: bytes, at: int) -> None:
    whole = bytearray(prepend_blob(INITRD, BLOB))
    whole[at : at + len(patch)] = patch
    try:
        find_blob(bytes(whole))
    except ImageRefused:
        pass


@pytest.mark.parametrize("name", ["", "a/b", "n" * 128, "new\nline", "é"])
def test_a_name_that_is_no_file_name_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="no plain file name"):
        prepend_blob(INITRD, BLOB, name)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_the_program_cpio_unpacks_the_archive(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet"], input=prepend_blob(b"", BLOB), cwd=tmp_path, check=True)

    assert (tmp_path / "opt/ibm/pef/esm_blob").read_bytes() == BLOB


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_an_archive_of_the_program_cpio_is_taken(tmp_path: Path) -> None:
    (tmp_path / "opt/ibm/pef").mkdir(parents=True)
    (tmp_path / "opt/ibm/pef/blob").write_bytes(BLOB)
    names = b".\0./opt\0./opt/ibm\0./opt/ibm/pef\0./opt/ibm/pef/blob\0"
    made = subprocess.run(
        ["cpio", "--null", "--create", "--quiet", "--format=newc"],
        input=names,
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout

    whole = made + INITRD

    assert whole[find_blob(whole).initrd_start :] == INITRD
