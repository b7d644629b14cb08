"""Debian's own kernel for ppc64el, from its package: a normal VM's kernel that nobody built for pefbox.

debian/PACKAGE_VERSION/     vmlinux and config, in the cache beside the built images
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from deploy.linux.apt import GUEST_ARCHITECTURE, Apt, Say
from deploy.linux.store import CONFIG_FILE, KERNEL_FILE, Store
from protocol.errors import UserError

META_PACKAGE = "linux-image-powerpc64le"
"""Names the newest kernel package by its dependency."""
_DIRECTORY = "debian"


class DebianKernel(msgspec.Struct, frozen=True):
    """An unpacked kernel: `name` is package and version."""

    name: str
    kernel: str
    config: str


def fetch_debian_kernel(cache: Path, say: Say, *, update: bool = False) -> tuple[DebianKernel, bool]:
    """The newest kernel of the configured sources, and whether it was in the cache; raises UserError."""
    with Store(cache).locked(say):
        apt = Apt(cache / "apt", say)
        if update:
            apt.update()
        version = apt.candidate(f"{META_PACKAGE}:{GUEST_ARCHITECTURE}")
        package = apt.dependency(f"{META_PACKAGE}:{GUEST_ARCHITECTURE}", "linux-image-")
        name = f"{package.partition(':')[0]}_{version}"
        found = _find(cache, name)
        if found is not None:
            return found, True
        try:
            _unpack(apt, package, cache / _DIRECTORY, name)
        except OSError as error:
            raise UserError(f"{cache}: {error.strerror or error}") from None
        made = _find(cache, name)
        assert made is not None
        return made, False


def newest_debian_kernel(cache: Path) -> DebianKernel | None:
    """The one that was fetched last."""
    places = sorted((cache / _DIRECTORY).glob(f"*/{KERNEL_FILE}"), key=lambda path: path.stat().st_mtime)
    return _find(cache, places[-1].parent.name) if places else None


def _find(cache: Path, name: str) -> DebianKernel | None:
    place = cache / _DIRECTORY / name
    if not (place / KERNEL_FILE).is_file():
        return None
    return DebianKernel(name, str(place / KERNEL_FILE), str(place / CONFIG_FILE))


def _unpack(apt: Apt, package: str, into: Path, name: str) -> None:
    """Keep kernel and configuration of `package`; its modules, most of it, are dropped."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix="fetch-") as scratch:
        unpacked, result = Path(scratch) / "package", Path(scratch) / "result"
        result.mkdir()
        apt.unpack([package], unpacked)
        for file, pattern in ((KERNEL_FILE, "boot/vmlinux-*"), (CONFIG_FILE, "boot/config-*")):
            found = sorted(unpacked.glob(pattern))
            if not found:
                raise UserError(f"the package {package} has no {pattern}")
            # Without the package's own date: what is newest here was fetched last.
            shutil.copyfile(found[-1], result / file)
        os.replace(result, into / name)
