"""Debian packages without root: an apt state directory of our own, `apt-get download` and `dpkg-deb --extract`.

The machine's own package lists and installed packages are never touched. The lists that are kept here cover this
machine and ppc64el, whose programs go into the guest; they are fetched once and again when a package is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from protocol.errors import UserError

GUEST_ARCHITECTURE = "ppc64el"
_HOST_ARCHITECTURE = "amd64"

Say = Callable[[str], None]
"""Told what goes on, a line at a time."""


class Apt:
    """Packages of the configured sources, for this machine and for the guest."""

    def __init__(self, directory: Path, say: Say) -> None:
        """`directory` keeps lists and downloads; it is made when missing."""
        self._directory = directory
        self._say = say

    def candidate(self, package: str) -> str:
        """The version that would be installed; raises UserError when there is none."""
        self._ensure_lists()
        found = self._policy(package)
        if found is None:
            self.update()
            found = self._policy(package)
        if found is None:
            raise UserError(f"no package {package} in the sources of /etc/apt: add a Debian source that has it")
        return found

    def dependency(self, package: str, prefix: str) -> str:
        """The package (NAME:ARCH) with that prefix on which `package` depends; raises UserError when there is none."""
        self._ensure_lists()
        result = self._run("apt-cache", "depends", package)
        found = re.search(rf"^\s+Depends: ({re.escape(prefix)}\S+)", result.stdout, re.MULTILINE)
        if found is None:
            raise UserError(f"the package {package} depends on no {prefix}*: {_last_line(result)}")
        return found[1]

    def missing_of(self, packages: Sequence[str]) -> list[str]:
        """`packages` and what they need, as far as it is not installed on this machine; raises UserError."""
        self._ensure_lists()
        result = self._run("apt-get", "-s", "--no-install-recommends", "install", *packages)
        if result.returncode:
            raise UserError(f"apt cannot resolve {' '.join(packages)}: {_last_line(result)}")
        return re.findall(r"^Inst (\S+)", result.stdout, re.MULTILINE)

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Download `packages` (NAME or NAME:ARCH) and unpack them below `into`; raises UserError."""
        downloads = self._directory / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir(parents=True)
        self._download(packages, downloads)
        for archive in sorted(downloads.glob("*.deb")):
            result = self._run("dpkg-deb", "--extract", str(archive), str(into))
            if result.returncode:
                raise UserError(f"{archive.name} cannot be unpacked: {_last_line(result)}")
        shutil.rmtree(downloads)

    def update(self) -> None:
        """Fetch the lists again; raises UserError when none could be fetched."""
        self._say("fetching package lists")
        for path in (self._lists / "partial", self._directory / "cache" / "archives" / "partial"):
            path.mkdir(parents=True, exist_ok=True)
        # A source that lacks one of the two architectures makes apt fail as a whole: what counts is what came.
        result = self._run("apt-get", "update")
        if not self._has_lists():
            raise UserError(f"no package list could be fetched: {_last_line(result)}")

    @property
    def _lists(self) -> Path:
        return self._directory / "state" / "lists"

    def _has_lists(self) -> bool:
        return any(self._lists.glob("*_Packages*"))

    def _ensure_lists(self) -> None:
        if not self._has_lists():
            self.update()

    def _policy(self, package: str) -> str | None:
        found = re.search(r"^\s+Candidate: (\S+)", self._run("apt-cache", "policy", package).stdout, re.MULTILINE)
        return None if found is None or found[1] == "(none)" else found[1]

    def _download(self, packages: Sequence[str], into: Path) -> None:
        self._say(f"downloading {', '.join(packages) if len(packages) < 4 else f'{len(packages)} packages'}")
        result = self._run("apt-get", "download", *packages, cwd=into)
        if result.returncode:
            # The lists may be older than the mirror.
            self.update()
            result = self._run("apt-get", "download", *packages, cwd=into)
        if result.returncode:
            raise UserError(f"cannot download {' '.join(packages)}: {_last_line(result)}")

    def _run(self, program: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        options = {
            "Dir::State": self._directory / "state",
            "Dir::Cache": self._directory / "cache",
            "APT::Architectures": f"{_HOST_ARCHITECTURE},{GUEST_ARCHITECTURE}",
        }
        if os.geteuid() == 0:
            # apt's own user may not enter our directories.
            options["APT::Sandbox::User"] = "root"
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        command = [program, *(words if program.startswith("apt-") else ()), *args]
        try:
            return subprocess.run(
                command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_plain_environment()
            )
        except FileNotFoundError:
            raise UserError(f"no program {program}: packages are fetched on Debian and its derivatives only") from None


def _plain_environment() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or ["it said nothing"])[-1].strip()
