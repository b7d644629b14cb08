"""A disk from which firmware starts Linux: the kernel in a PReP boot partition, behind it a root file system."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from deploy.linux.partitions import ALIGN_BYTES, MAX_DISK_BYTES, Partition, PartitionType, lay_out, mbr, rounded
from protocol.errors import ImageRefused, UserError
from shared.elf_program import read_program
from shared.newc import file_in_archive

KERNEL_BASE = 32 << 20
"""Where firmware has nothing of its own."""
MAX_BOOT_BYTES = 32 << 20
"""So much of a boot partition firmware reads."""
FREE_BYTES = 64 << 20
"""Room in a root file system for what the guest writes, unless its size is given."""

_DIRECTORIES = ("bin", "dev", "etc", "mnt", "proc", "root", "sbin", "sys", "tmp", "usr/bin", "usr/sbin")
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF_SEGMENT = struct.Struct("<IIQQQQQQ")
_ELF_IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
_ET_EXEC, _EM_PPC64, _PT_LOAD, _READ_WRITE_EXECUTE, _ABI_2 = 2, 21, 1, 7, 2
_PAGE_BYTES = 1 << 16
_SYSTEM_PROGRAMS = "/usr/sbin:/sbin"


class BootDisk(msgspec.Struct, frozen=True):
    """What was written: bytes of the disk, of the kernel in its boot partition, and of the root file system."""

    disk: str
    disk_bytes: int
    kernel_bytes: int
    root_bytes: int


def loadable_by_firmware(vmlinux: bytes) -> bytes:
    """Linux as an ELF file that SLOF starts; raises ValueError with the reason in a few words.

    SLOF refuses a file whose virtual addresses are not its physical ones, and has its own data where Linux is linked to
    lie. Linux moves itself from wherever it is entered. Symbols stay out: firmware reads MAX_BOOT_BYTES only.
    """
    program = read_program(vmlinux)
    if not program.little_endian:
        raise ValueError("is a big-endian program, no ppc64le kernel")
    moved = program.moved_to(KERNEL_BASE)
    n_bytes = _PAGE_BYTES + len(moved.image)
    if n_bytes > MAX_BOOT_BYTES:
        raise ValueError(
            f"loads {n_bytes >> 20} MiB, but firmware reads {MAX_BOOT_BYTES >> 20} MiB of a boot partition"
        )
    header = _ELF_HEADER.pack(
        _ELF_IDENT, _ET_EXEC, _EM_PPC64, 1, moved.entry, _ELF_HEADER.size, 0, _ABI_2, _ELF_HEADER.size,
        _ELF_SEGMENT.size, 1, 0, 0, 0,
    )  # fmt: skip
    segment = _ELF_SEGMENT.pack(
        _PT_LOAD, _READ_WRITE_EXECUTE, _PAGE_BYTES, moved.base, moved.base, len(moved.image), moved.end - moved.base,
        _PAGE_BYTES,
    )  # fmt: skip
    return (header + segment).ljust(_PAGE_BYTES, b"\0") + moved.image


def make_busybox_tree(initramfs: Path, tree: Path) -> None:
    """A root file system of busybox alone; its init is that of our initial RAM disk. Raises UserError."""
    try:
        archive = initramfs.read_bytes()
        for name in _DIRECTORIES:
            (tree / name).mkdir(parents=True, exist_ok=True)
        for name, source in (("sbin/init", "init"), ("bin/busybox", "bin/busybox")):
            (tree / name).write_bytes(file_in_archive(archive, source))
            (tree / name).chmod(0o755)
        (tree / "bin/sh").symlink_to("busybox")
    except OSError as error:
        raise UserError(f"{error.filename or tree}: {error.strerror}") from None
    except ImageRefused as error:
        raise UserError(f"{initramfs}: {error}") from None


def write_boot_disk(disk: Path, vmlinux: Path, root: Path, root_bytes: int | None = None) -> BootDisk:
    """Write the disk image. `root` is a directory, of which ext4 of `root_bytes` is made, or the image of a root.

    Raises UserError with the one line that says what is wrong; `disk` is there only when it is whole.
    """
    try:
        if disk.exists():
            raise UserError(f"{disk}: exists already")
        if not disk.parent.is_dir():
            raise UserError(f"{disk.parent}: No such directory")
        kernel = _kernel_of(vmlinux)
        n_root_bytes = _root_bytes(root, root_bytes)
        parts = lay_out([(PartitionType.PREP_BOOT, len(kernel)), (PartitionType.LINUX, n_root_bytes)])
        if parts[-1].end > MAX_DISK_BYTES:
            raise UserError(f"{root}: its partition ends behind {MAX_DISK_BYTES >> 40} TiB, where its table ends")
        with _making(disk) as making:
            _write(making, parts, kernel, root)
            n_bytes = making.stat().st_size
    except OSError as error:
        raise UserError(f"{error.filename or disk}: {error.strerror}") from None
    return BootDisk(str(disk), n_bytes, len(kernel), n_root_bytes)


@contextmanager
def _making(disk: Path) -> Iterator[Path]:
    """A file that becomes `disk` when all went well."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=disk.parent) as directory:
        making = Path(directory) / "disk"
        yield making
        os.replace(making, disk)


def _kernel_of(vmlinux: Path) -> bytes:
    try:
        return loadable_by_firmware(vmlinux.read_bytes())
    except ValueError as error:
        raise UserError(f"{vmlinux}: {error}") from None


def _root_bytes(root: Path, wanted: int | None) -> int:
    if root.is_dir():
        return wanted or rounded(_bytes_in(root) * 5 // 4 + FREE_BYTES, ALIGN_BYTES)
    if wanted is not None:
        raise UserError(f"{root}: an image has the size that it has; --root-size is for a directory")
    n_bytes = root.stat().st_size
    if not n_bytes:
        raise UserError(f"{root}: is empty")
    return n_bytes


def _bytes_in(tree: Path) -> int:
    """Of all files, each in whole blocks."""
    sizes = (os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(tree) for name in names)
    return sum(rounded(size, 4096) for size in sizes)


def _write(disk: Path, parts: list[Partition], kernel: bytes, root: Path) -> None:
    boot, behind = parts
    with disk.open("wb") as file:
        file.write(mbr(parts))
        file.seek(boot.start)
        file.write(kernel)
        file.truncate(rounded(behind.end, ALIGN_BYTES))
        if root.is_file():
            file.seek(behind.start)
            with root.open("rb") as image:
                shutil.copyfileobj(image, file)
    if root.is_dir():
        _make_ext4(disk, behind, root)


def _make_ext4(disk: Path, part: Partition, tree: Path) -> None:
    """In its place on the disk, so that what holds nothing takes no space."""
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PROGRAMS}")
    if program is None:
        raise UserError("mke2fs, which makes the root file system, is not here; run: apt-get install e2fsprogs")
    place = f"offset={part.start},root_owner=0:0"
    command = [program, "-q", "-F", "-t", "ext4", "-E", place, "-d", str(tree), str(disk), f"{part.n_bytes >> 10}k"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if not result.returncode:
        return
    said = result.stderr.strip().splitlines() or [f"it ended with status {result.returncode}"]
    if any("allocate" in line for line in said):
        raise UserError(f"{tree}: does not fit in {part.n_bytes >> 20} MiB; give it more with --root-size")
    raise UserError(f"{tree}: mke2fs: {said[-1]}")
