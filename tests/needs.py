"""What some tests need of the machine. Without it they are skipped with the line that gets it.

With PEFBOX_NEED_ALL set nothing may be skipped: a gate that silently tests less is no gate.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deploy.firmware import PACKAGE, find_firmware
from deploy.linux.config import fragment_sha256
from deploy.linux.debian import newest_debian_kernel
from deploy.linux.store import LinuxImage, Store, default_cache

CROSS_COMPILERS = {
    "gcc-powerpc64-linux-gnu": "powerpc64-linux-gnu-gcc",
    "gcc-powerpc64le-linux-gnu": "powerpc64le-linux-gnu-gcc",
}


def lacking(what: str, how: str) -> None:
    """Skip, or fail where nothing may be skipped; `how` is the command that gets `what`."""
    reason = f"no {what}; run: {how}"
    if os.environ.get("PEFBOX_NEED_ALL"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def need_program(program: str, package: str) -> None:
    """The program is on the PATH."""
    if shutil.which(program) is None:
        lacking(program, f"apt-get install {package}")


def need_cross_compilers() -> None:
    """Both of Debian's compilers for POWER."""
    for package, program in CROSS_COMPILERS.items():
        need_program(program, package)


def need_firmware() -> None:
    """SLOF as a package installs it."""
    if find_firmware() is None:
        lacking("SLOF", f"apt-get install {PACKAGE}")


def need_debian_kernel() -> str:
    """The kernel that `pefbox linux fetch-debian` fetched."""
    kernel = newest_debian_kernel(default_cache())
    if kernel is None:
        lacking("Debian kernel", "pefbox linux fetch-debian")
    assert kernel is not None
    return kernel.kernel


def need_linux() -> LinuxImage:
    """The kernel and initial RAM disk that `pefbox linux build` made for the present configuration."""
    image = Store(default_cache()).newest(fragment_sha256())
    if image is None:
        lacking("guest kernel", "pefbox linux build (some minutes)")
    assert image is not None
    return image


LIBVIRT_SCHEMAS = Path("/usr/share/libvirt/schemas")


def need_libvirt_schemas() -> None:
    """The RELAX NG schemas of libvirt's XML, and a validator."""
    need_program("xmllint", "libxml2-utils")
    if not LIBVIRT_SCHEMAS.is_dir():
        lacking(str(LIBVIRT_SCHEMAS), "apt-get install libvirt0")
