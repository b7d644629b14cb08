"""The built kernel and initial RAM disk, started without firmware by `pefbox run`, as a normal and as a secure VM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.needs import need_linux

pytestmark = pytest.mark.linux

TIMEOUT_SECONDS = 120.0


def boot(command: str, *more: str, arguments: str = "") -> dict[str, Any]:
    """What `pefbox run` reports of a boot that runs `command` (no spaces) and powers off."""
    image = need_linux()
    words = [image.kernel, "--initrd", image.initramfs, "--memory", "256M", "--timeout", str(TIMEOUT_SECONDS), "--json"]
    words += ["--append", f"console=hvc0 quiet loglevel=0 {arguments} pefbox.run={command}", *more]
    result = subprocess.run([sys.executable, "-m", "deploy.cli", "run", *words], capture_output=True, text=True)
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == report["exit_status"]
    return report


def test_the_kernel_boots_runs_a_command_and_powers_off() -> None:
    report = boot("uname%20-m;cat%20/proc/cpuinfo;zcat%20/proc/config.gz|grep%20-c%20=y")

    lines = report["output"].replace("\r", "").splitlines()
    assert (report["exit_status"], report["outcome"]) == (0, "exited")
    assert "ppc64le" in lines
    assert "MMU\t\t: Radix" in lines
    assert any(line.isdecimal() and int(line) > 400 for line in lines)
    # Firmware's operator panel shows the kernel's name on the same terminal, without a newline.
    assert re.search(r"pefbox: linux 6\.1\.\d+, svm 0\n", report["output"].replace("\r", ""))
    assert "pefbox: exit status 0" in lines


def test_the_same_boot_makes_its_calls_at_the_same_instructions() -> None:
    """Time is instructions: two boots to a shell command are the same run."""
    first, second = (boot("ls%20-l%20/proc/self/") for _ in range(2))

    assert first["trail"] == second["trail"]
    assert int(first["trail"].partition(":")[0]) > 100


def test_the_kernel_runs_as_a_secure_vm_and_shares_its_swiotlb() -> None:
    """The boot stage calls UV_ESM; the kernel, verified, finds S set and shares what its devices need (S2)."""
    report = boot("cat%20/sys/devices/system/cpu/svm", "--secure", arguments="svm=on swiotlb=force")

    text = report["output"].replace("\r", "")
    assert (report["exit_status"], report["secure"]) == (0, True)
    assert re.search(r"pefbox: linux 6\.1\.\d+, svm 1\n", text)
    assert "1\npefbox: exit status 0\n" in text
    assert report["ultracalls"]["UV_ESM"] == 1
    assert report["ultracalls"]["UV_SHARE_PAGE"] >= 1


def test_the_initial_ram_disk_has_its_mounts_and_tools() -> None:
    report = boot("grep%20-c%20-E%20'(proc|sysfs|devtmpfs|devpts|tmpfs)'%20/proc/mounts;wc%20-c%20/bin/busybox;false")

    lines = report["output"].replace("\r", "").splitlines()
    assert report["exit_status"] == 0
    assert "5" in lines
    assert "pefbox: exit status 1" in lines
