"""The initial RAM disk that our archive writer makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.linux.initramfs import build_initramfs, find_busybox, init_script
from protocol.errors import UserError
from shared.newc import ArchiveEntry, device, directory, program, symlink, write_archive

BUSYBOX = b"\x7fELF busybox"


def test_equal_inputs_give_equal_bytes() -> None:
    assert build_initramfs(init_script(), BUSYBOX) == build_initramfs(init_script(), BUSYBOX)
    assert len(build_initramfs(init_script(), BUSYBOX)) % 512 == 0


def test_a_header_has_the_fields_of_the_format() -> None:
    archive = write_archive([device("dev/console", 5, 1)])

    fields = [int(archive[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]

    assert archive[:6] == b"070701"
    assert fields == [1, 0o20600, 0, 0, 1, 0, 0, 0, 0, 5, 1, len("dev/console") + 1, 0]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio; run: apt-get install cpio")
def test_cpio_lists_and_unpacks_it(tmp_path: Path) -> None:
    archive = write_archive(
        [directory("bin"), program("bin/busybox", BUSYBOX), symlink("bin/sh", "busybox"), program("init", b"#!\n")]
    )

    subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=tmp_path, check=True)

    assert (tmp_path / "bin/busybox").read_bytes() == BUSYBOX
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["", "x" * 256, "snowman-☃", "a\0b"])
def test_a_name_that_a_header_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        write_archive([ArchiveEntry(name, 0o100644)])


def test_init_is_a_script_for_the_shell_inside() -> None:
    first = init_script().splitlines()[0]

    assert first == b"#!/bin/busybox sh"
    assert subprocess.run(["sh", "-n"], input=init_script(), capture_output=True).returncode == 0


def test_a_package_without_busybox_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no bin/busybox"):
        find_busybox(tmp_path)
