"""What a guest's Linux starts from on a disk: its root file system, made by `mke2fs`, and its kernel for firmware."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

_DIRECTORIES = ("bin", "dev", "etc", "mnt", "proc", "root", "sbin", "sys", "tmp", "usr/bin", "usr/sbin")
ROOT_BYTES = 48 << 20
KERNEL_BASE = 32 << 20
_ENTRY_AT, _PROGRAM_HEADERS_AT, _HEADER_SIZE_AT = 24, 32, 54
_ADDRESSES_AT = 16
"""Of the fields of an ELF file of 64 bits, the last one in a program header."""
_PT_LOAD = 1


def make_root(initramfs: Path, more: Mapping[str, Path], directory: Path) -> Path:
    """An image in `directory`; `more` are files by their path in it. Its init is the initial RAM disk's."""
    tree, image = directory / "tree", directory / "root.ext4"
    for name in _DIRECTORIES:
        (tree / name).mkdir(parents=True, exist_ok=True)
    with initramfs.open("rb") as archive:
        unpack = ["cpio", "--extract", "--quiet", "init", "bin/busybox"]
        subprocess.run(unpack, cwd=tree, stdin=archive, check=True)
    (tree / "init").rename(tree / "sbin/init")
    (tree / "bin/sh").symlink_to("busybox")
    for name, path in more.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / name)
    with image.open("wb") as file:
        file.truncate(ROOT_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image)], check=True)
    return image


def file_in_root(image: Path, name: str) -> bytes:
    """What a file of an ext4 image holds, as the host reads it."""
    return subprocess.run(["debugfs", "-R", f"cat /{name}", str(image)], check=True, capture_output=True).stdout


def loadable_by_firmware(vmlinux: bytes) -> bytes:
    """Linux as an ELF file that SLOF starts: it refuses one whose virtual addresses are not its physical ones, and has
    its own data where Linux is linked to lie. Linux moves itself from wherever it is entered."""
    image = bytearray(vmlinux)
    (first_header,) = struct.unpack_from("<Q", image, _PROGRAM_HEADERS_AT)
    size, n_headers = struct.unpack_from("<HH", image, _HEADER_SIZE_AT)
    for at in range(first_header, first_header + n_headers * size, size):
        virtual, physical = struct.unpack_from("<QQ", image, at + _ADDRESSES_AT)
        struct.pack_into("<QQ", image, at + _ADDRESSES_AT, physical + KERNEL_BASE, physical + KERNEL_BASE)
        if image[at] == _PT_LOAD:
            (entry,) = struct.unpack_from("<Q", image, _ENTRY_AT)
            struct.pack_into("<Q", image, _ENTRY_AT, entry - virtual + physical + KERNEL_BASE)
    return bytes(image)
