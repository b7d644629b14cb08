"""The programs that build a kernel: from the machine where it has them, else from packages unpacked in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.linux.apt import Apt, Say
from protocol.errors import UserError

CROSS_PREFIX = "powerpc64le-linux-gnu-"
COMPILER = f"{CROSS_PREFIX}gcc"

FETCHED = {COMPILER: "gcc-powerpc64le-linux-gnu", "bison": "bison", "flex": "flex", "bc": "bc"}
"""Program -> package that works from anywhere once it is unpacked."""

_NEEDED = {"gcc": "gcc libc6-dev", "make": "make", "xz": "xz-utils", "perl": "perl"}
"""Program -> packages that must be installed: they need files in fixed places."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """How to start the programs: `environment` replaces the process's own. `compiler` is its version line."""

    environment: Mapping[str, str]
    compiler: str


def find_toolchain(apt: Apt, tools: Path, say: Say) -> Toolchain:
    """The programs, those that lack fetched into `tools`; raises UserError with the apt-get line that helps."""
    lacking = [packages for program, packages in _NEEDED.items() if shutil.which(program) is None]
    if lacking:
        raise UserError(f"a kernel cannot be built here; run: apt-get install {' '.join(lacking)}")
    environment = {**os.environ, "LC_ALL": "C"}
    packages = [package for program, package in FETCHED.items() if shutil.which(program) is None]
    if packages:
        _fetch(apt, packages, tools, say)
        environment |= _of_unpacked(tools, environment)
    return Toolchain(environment, _version_line(environment, packages))


def _fetch(apt: Apt, packages: list[str], tools: Path, say: Say) -> None:
    marker = tools / ".packages"
    wanted = " ".join(packages)
    if marker.is_file() and marker.read_text() == wanted:
        return
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir(parents=True)
    say(f"not installed here: {wanted}; unpacking them into {tools}")
    try:
        missing = apt.missing_of(packages)
        if not missing:
            raise UserError(f"installed, but not on the PATH: {wanted}")
        apt.unpack(missing, tools)
    except UserError as error:
        raise UserError(f"{error}; or run: apt-get install {wanted}") from None
    marker.write_text(wanted)


def _of_unpacked(tools: Path, environment: Mapping[str, str]) -> dict[str, str]:
    usr = tools / "usr"
    libraries = ":".join(str(path) for path in (usr / "lib/x86_64-linux-gnu", tools / "lib/x86_64-linux-gnu"))
    found = {"PATH": f"{usr / 'bin'}:{environment.get('PATH', os.defpath)}", "LD_LIBRARY_PATH": libraries}
    if (usr / "share/bison").is_dir():
        found["BISON_PKGDATADIR"] = str(usr / "share/bison")
    if (usr / "bin/m4").is_file():
        found["M4"] = str(usr / "bin/m4")
    return found


def _version_line(environment: Mapping[str, str], packages: list[str]) -> str:
    try:
        result = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, env=environment)
    except OSError as error:
        raise UserError(f"{COMPILER}: {error.strerror}; run: apt-get install {FETCHED[COMPILER]}") from None
    if result.returncode or not result.stdout:
        wanted = " ".join(packages) or FETCHED[COMPILER]
        raise UserError(f"{COMPILER} does not work here; run: apt-get install {wanted}")
    return result.stdout.splitlines()[0]
