"""Building the kernel: unpack Debian's source, configure it from the fragment, compile, keep what is needed.

Each step leaves its result in the work directory, so a build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from deploy.linux.apt import Apt, Say
from deploy.linux.config import differences, fragment_text, parse_config
from deploy.linux.store import CONFIG_FILE, KERNEL_FILE
from deploy.linux.toolchain import CROSS_PREFIX, Toolchain
from protocol.errors import UserError

SOURCE_PACKAGE = "linux-source-6.1"
_ARCHIVE = f"usr/src/{SOURCE_PACKAGE}.tar.xz"
_PROGRESS_SECONDS = 10.0
_LAST_LINES = 15
_NOT_NEEDED = ("*.rst", "*.yaml", "*.json", "*.dts", "*.dtsi", "*/drivers/gpu/*.[ch]", "*/drivers/media/*.[ch]")
"""Files that no build of ours reads; half of the source tree, and unpacking them takes longest."""

_STAMP = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "pefbox",
    "KBUILD_BUILD_HOST": "pefbox",
}
"""What a kernel says of its build: an image depends on its inputs alone."""


class KernelBuild:
    """One build in `work`; `run` may be called again after it was interrupted."""

    def __init__(self, work: Path, apt: Apt, toolchain: Toolchain, say: Say) -> None:
        self._source = work / "source"
        self._objects = work / "objects"
        self._work = work
        self._apt = apt
        self._toolchain = toolchain
        self._say = say

    def run(self, version: str, into: Path) -> float:
        """Build and put kernel and configuration into `into`; returns the seconds of make. Raises UserError."""
        self._unpack(version)
        self._configure()
        started = time.monotonic()
        self._make("vmlinux", f"-j{len(os.sched_getaffinity(0))}")
        shutil.copy(self._objects / "vmlinux", into / KERNEL_FILE)
        shutil.copy(self._objects / ".config", into / CONFIG_FILE)
        return time.monotonic() - started

    def _unpack(self, version: str) -> None:
        if self._source.is_dir():
            return
        archive = self._archive(version)
        self._say(f"unpacking {SOURCE_PACKAGE} {version}")
        making = self._work / "unpacking"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        exclude = [f"--exclude={pattern}" for pattern in _NOT_NEEDED]
        command = ["tar", "--extract", "--strip-components=1", *exclude, "--file", str(archive), "--directory"]
        result = subprocess.run([*command, str(making)], capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{archive} cannot be unpacked: {result.stderr.strip()[-200:]}")
        os.replace(making, self._source)
        shutil.rmtree(self._work / "package", ignore_errors=True)

    def _archive(self, version: str) -> Path:
        installed = Path("/") / _ARCHIVE
        if installed.is_file() and _installed_version() == version:
            return installed
        package = self._work / "package"
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir()
        self._apt.unpack([SOURCE_PACKAGE], package)
        return package / _ARCHIVE

    def _configure(self) -> None:
        if (self._objects / ".config").is_file():
            return
        self._objects.mkdir(exist_ok=True)
        fragment = self._work / "fragment.config"
        fragment.write_text(fragment_text())
        self._make("allnoconfig", f"KCONFIG_ALLCONFIG={fragment}")
        config = self._objects / ".config"
        wrong = differences(parse_config(fragment_text()), parse_config(config.read_text()))
        if wrong:
            config.unlink()
            raise UserError(f"this kernel source does not take the configuration: {'; '.join(wrong)}")

    def _make(self, target: str, *words: str) -> None:
        command = ["make", "-C", str(self._source), f"O={self._objects}", "ARCH=powerpc", *words]
        command += [f"CROSS_COMPILE={CROSS_PREFIX}", target]
        run_with_progress(command, self._environment(), f"make {target}", self._say)

    def _environment(self) -> Mapping[str, str]:
        return {**self._toolchain.environment, **_STAMP}


def run_with_progress(command: list[str], environment: Mapping[str, str], what: str, say: Say) -> None:
    """Run, telling every ten seconds how many files are done; raises UserError with the last lines of output."""
    started = said = time.monotonic()
    last: deque[str] = deque(maxlen=_LAST_LINES)
    n_files = 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            n_files += line.startswith(("  CC ", "  AS "))
            if time.monotonic() - said >= _PROGRESS_SECONDS:
                said = time.monotonic()
                say(f"{what}: {n_files} files, {said - started:.0f} s")
    if process.returncode:
        errors = "\n".join(last)
        raise UserError(f"{what} failed with status {process.returncode}:\n{errors}")


def _installed_version() -> str | None:
    try:
        result = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Version}", SOURCE_PACKAGE], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
