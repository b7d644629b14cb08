"""The initial RAM disk: a static busybox of Debian for ppc64el and an /init that gives a shell on the console."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from deploy.linux.apt import GUEST_ARCHITECTURE, Apt
from protocol.errors import UserError
from shared.newc import ArchiveEntry, device, directory, program, symlink, write_archive

BUSYBOX_PACKAGE = f"busybox-static:{GUEST_ARCHITECTURE}"
_BUSYBOX_PATHS = ("bin/busybox", "usr/bin/busybox")
_DIRECTORIES = ("bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin", "usr/sbin")
_CONSOLE = (5, 1)
_NULL = (1, 3)


def build_initramfs(init: bytes, busybox: bytes) -> bytes:
    """The archive; equal inputs give equal bytes. `/init` installs busybox's own commands as links when it starts."""
    entries: list[ArchiveEntry] = [directory(name) for name in _DIRECTORIES]
    entries += [
        device("dev/console", *_CONSOLE),
        device("dev/null", *_NULL),
        program("bin/busybox", busybox),
        symlink("bin/sh", "busybox"),
        program("init", init),
    ]
    return write_archive(entries)


def init_script() -> bytes:
    """Our /init."""
    return (resources.files("deploy.linux") / "init.sh").read_bytes()


def find_busybox(unpacked: Path) -> bytes:
    """The program in an unpacked package; raises UserError when the package has none."""
    for name in _BUSYBOX_PATHS:
        if (unpacked / name).is_file():
            return (unpacked / name).read_bytes()
    raise UserError(f"the package {BUSYBOX_PACKAGE} has no {_BUSYBOX_PATHS[0]}")


def fetch_busybox(apt: Apt, scratch: Path) -> bytes:
    """The guest's busybox from Debian; raises UserError."""
    apt.unpack([BUSYBOX_PACKAGE], scratch)
    return find_busybox(scratch)
