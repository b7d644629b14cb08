"""`pefbox linux boot-disk`: the kernel as firmware takes it, partitions, root file systems, mistakes in one line."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from elftools.elf.elffile import ELFFile

from deploy.cli_linux import linux
from deploy.linux.boot_disk import KERNEL_BASE, MAX_BOOT_BYTES, loadable_by_firmware, write_boot_disk
from protocol.errors import UserError
from shared.elf_program import read_program
from shared.newc import file_in_archive, program, write_archive
from tests.needs import need_linux, need_program
from tests.unit.program_files import EM_X86_64, VIRTUAL, elf_file

CODE = bytes(range(256)) * 16
SEGMENTS = ((0, CODE, 0x4000), (0x8000, b"data", 0x100))
VMLINUX = elf_file(SEGMENTS, entry=VIRTUAL + 0x100, order="<")
MIB = 1 << 20
_ENTRY = struct.Struct("<B3xB3xII")


def mke2fs_needed() -> None:
    need_program("mke2fs", "e2fsprogs")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(VMLINUX)
    return path


@pytest.fixture
def root_image(tmp_path: Path) -> Path:
    """It has another length than a whole number of sectors."""
    path = tmp_path / "root.ext4"
    path.write_bytes(os.urandom(3 * MIB + 100))
    return path


def boot_disk(*words: str | Path) -> None:
    """The command; its error is raised."""
    CliRunner().invoke(linux, ["boot-disk", *map(str, words)], catch_exceptions=False)


def partitions_of(disk: bytes) -> list[tuple[int, int, int, int]]:
    """Active, type, first byte, bytes."""
    assert disk[510:512] == b"\x55\xaa"
    entries = (_ENTRY.unpack_from(disk, 446 + 16 * n) for n in range(4))
    return [(active, kind, first * 512, n * 512) for active, kind, first, n in entries if kind]


def test_firmwares_kernel_is_the_same_program_at_equal_virtual_and_physical_addresses() -> None:
    image = loadable_by_firmware(VMLINUX)

    before, after = read_program(VMLINUX), read_program(image)
    assert after == before.moved_to(KERNEL_BASE)
    assert after.entry == KERNEL_BASE + 0x100
    (segment,) = ELFFile(io.BytesIO(image)).iter_segments()
    assert segment["p_vaddr"] == segment["p_paddr"] == KERNEL_BASE


def test_a_disk_has_the_kernel_in_its_boot_partition_and_the_root_as_it_is(
    tmp_path: Path, kernel: Path, root_image: Path
) -> None:
    boot_disk(tmp_path / "d.img", "--kernel", kernel, "--root", root_image)

    disk = (tmp_path / "d.img").read_bytes()
    (active, kind, at, n_bytes), (_, second_kind, root_at, n_root_bytes) = partitions_of(disk)
    assert (active, kind, second_kind) == (0x80, 0x41, 0x83)
    assert disk[at : at + n_bytes].rstrip(b"\0") == loadable_by_firmware(VMLINUX).rstrip(b"\0")
    assert disk[root_at : root_at + n_root_bytes] == root_image.read_bytes().ljust(n_root_bytes, b"\0")
    assert (at % MIB, root_at % MIB, len(disk) % MIB) == (0, 0, 0)
    assert at + n_bytes <= root_at
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.img", "root.ext4", "vmlinux"]


def test_a_directory_becomes_ext4_of_the_wanted_size(tmp_path: Path, kernel: Path) -> None:
    mke2fs_needed()
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/motd").write_text("hello\n")

    boot_disk(tmp_path / "d.img", "--kernel", kernel, "--root", tree, "--root-size", "20M")

    (_, (_, _, at, n_bytes)) = partitions_of((tmp_path / "d.img").read_bytes())
    assert n_bytes == 20 * MIB
    assert file_on(tmp_path / "d.img", at, "etc/motd") == b"hello\n"


@pytest.mark.linux
def test_the_documented_command_makes_a_disk_of_the_built_kernel_and_busybox(tmp_path: Path) -> None:
    image = need_linux()
    mke2fs_needed()

    done = subprocess.run(
        ["bash", "-c", "pefbox linux boot-disk disk.img"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "disk.img" in done.stdout
    disk = (tmp_path / "disk.img").read_bytes()
    (_, _, at, _), (_, _, root_at, _) = partitions_of(disk)
    assert disk[at:].startswith(loadable_by_firmware(Path(image.kernel).read_bytes()))
    archive = Path(image.initramfs).read_bytes()
    for name, source in (("sbin/init", "init"), ("bin/busybox", "bin/busybox")):
        assert file_on(tmp_path / "disk.img", root_at, name) == file_in_archive(archive, source)


def file_on(disk: Path, at: int, name: str) -> bytes:
    """A file of the ext4 file system that begins at byte `at` of a disk, as e2fsprogs reads it."""
    root = disk.with_suffix(".ext4")
    root.write_bytes(disk.read_bytes()[at:])
    return subprocess.run(["debugfs", "-R", f"cat /{name}", str(root)], capture_output=True, check=True).stdout


BAD_KERNELS: dict[str, tuple[bytes, str]] = {
    "no ELF file": (b"MZ" + bytes(100), "is no ELF file"),
    "nothing": (b"", "is no ELF file"),
    "cut off": (VMLINUX[:-10], "cut off"),
    "another processor": (elf_file(machine=EM_X86_64, order="<"), "is a program for EM_X86_64"),
    "big-endian": (elf_file(), "is a big-endian program, no ppc64le kernel"),
    "too long": (elf_file([(0, bytes(MAX_BOOT_BYTES), MAX_BOOT_BYTES)], entry=VIRTUAL, order="<"), "reads 32 MiB"),
}


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_what_firmware_could_not_start_is_refused(name: str, tmp_path: Path, kernel: Path, root_image: Path) -> None:
    content, reason = BAD_KERNELS[name]
    kernel.write_bytes(content)

    refused(tmp_path, kernel, reason, "--kernel", kernel, "--root", root_image)


def test_what_is_missing_or_in_the_way_is_named(tmp_path: Path, kernel: Path, root_image: Path) -> None:
    nowhere, empty, large = tmp_path / "nowhere", tmp_path / "empty", tmp_path / "large"
    empty.touch()
    large.touch()
    os.truncate(large, 2 << 40)
    good: list[str | Path] = ["--kernel", kernel, "--root", root_image]

    refused(tmp_path, nowhere, "No such file", "--kernel", nowhere, "--root", root_image)
    refused(tmp_path, nowhere, "No such file", "--kernel", kernel, "--root", nowhere)
    refused(tmp_path, empty, "is empty", "--kernel", kernel, "--root", empty)
    refused(tmp_path, large, "its partition ends behind 2 TiB", "--kernel", kernel, "--root", large)
    refused(tmp_path, root_image, "--root-size is for a directory", *good, "--root-size", "20M")
    refused(tmp_path, "--root-size", '"lots" is no size', *good, "--root-size", "lots")
    refused(tmp_path, tmp_path, "Is a directory", "--kernel", tmp_path, "--root", root_image)
    with pytest.raises(UserError, match=f"^{nowhere}: No such directory$"):
        boot_disk(nowhere / "d.img", *good)
    boot_disk(tmp_path / "d.img", *good)
    before = (tmp_path / "d.img").read_bytes()
    with pytest.raises(UserError, match=f"^{tmp_path}/d.img: exists already$"):
        boot_disk(tmp_path / "d.img", *good)
    assert (tmp_path / "d.img").read_bytes() == before


def test_without_a_built_kernel_the_command_that_builds_one_is_named(tmp_path: Path, root_image: Path) -> None:
    refused(tmp_path, "no kernel", "run: pefbox linux build", "--root", root_image, "--state", tmp_path)


def test_a_tree_that_does_not_fit_and_a_missing_program_are_one_line(
    tmp_path: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mke2fs_needed()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(os.urandom(18 * MIB))
    words: list[str | Path] = ["--kernel", kernel, "--root", tree, "--root-size", "16M"]

    refused(tmp_path, tree, "does not fit in 16 MiB; give it more with --root-size", *words)
    monkeypatch.setattr("deploy.linux.boot_disk.shutil.which", lambda *_, **__: None)
    refused(tmp_path, "mke2fs", "apt-get install e2fsprogs", *words)


def test_a_disk_that_cannot_be_written_whole_is_not_there(tmp_path: Path, kernel: Path, root_image: Path) -> None:
    """A limit of file sizes stands for a full file system: the error comes from a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        refused(tmp_path, tmp_path / "d.img", "File too large", "--kernel", kernel, "--root", root_image)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_size_of_a_tree_leaves_room(tmp_path: Path, kernel: Path) -> None:
    mke2fs_needed()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(bytes(10 * MIB))

    written = write_boot_disk(tmp_path / "d.img", kernel, tree)

    assert 64 * MIB < written.root_bytes < 90 * MIB
    assert written.disk_bytes == (tmp_path / "d.img").stat().st_size


def test_a_file_is_found_in_an_archive() -> None:
    archive = write_archive([program("init", b"a"), program("bin/busybox", b"bc")])

    assert file_in_archive(archive, "bin/busybox") == b"bc"


def refused(directory: Path, names: str | Path, reason: str, *words: str | Path) -> None:
    """One line that begins with what it is about; nothing is left behind but what was there."""
    before = sorted(directory.iterdir())
    with pytest.raises(UserError) as error:
        boot_disk(directory / "d.img", *words)
    line = str(error.value)
    assert line.startswith(str(names)) and reason in line and "\n" not in line
    assert sorted(directory.iterdir()) == before
