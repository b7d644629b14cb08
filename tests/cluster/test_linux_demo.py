"""`pefbox demo --guest linux`: the demo's claims hold for two Linux VMs that turned themselves secure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import deploy.cluster_file
from deploy.cli_demo import demo
from protocol.errors import UserError
from tests.cluster.test_demo import VM_KEYS
from tests.needs import need_firmware, need_linux

SECONDS = 600
DISK_BYTES = 16 << 20


@pytest.mark.linux
@pytest.mark.slow
def test_every_check_of_the_demo_holds_for_linux(tmp_path: Path) -> None:
    need_firmware()
    need_linux()
    report_file = tmp_path / "demo.json"
    command = [sys.executable, "-m", "deploy.cli", "demo", "--guest", "linux", "--state", str(tmp_path / "state")]

    done = subprocess.run(
        [*command, "--json", str(report_file)], capture_output=True, text=True, timeout=SECONDS, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check held" in done.stdout and "NOT" not in done.stdout
    report = json.loads(report_file.read_text())
    assert set(report["vms"]) == {"vm1", "vm2"}
    for vm in report["vms"].values():
        assert vm.keys() >= VM_KEYS
        assert vm["disk_sha256_guest"] == vm["disk_sha256_host"]
        assert vm["bytes_through_swiotlb"] >= vm["disk_bytes"] == DISK_BYTES
        assert vm["pages_under_pressure"] > 1000
        assert vm["secrets_found"] == [] and vm["shared_marker_found"]
        assert vm["ultracalls"]["UV_ESM"] == 1


def test_without_kernel_or_firmware_it_says_in_one_line_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told() -> str:
        with pytest.raises(UserError) as refused:
            CliRunner().invoke(demo, ["--guest", "linux", "--state", str(tmp_path / "s")], catch_exceptions=False)
        return str(refused.value)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(deploy.cluster_file, "find_firmware", lambda: "/dev/null")
    assert told().endswith("run: pefbox linux build")
    monkeypatch.setattr(deploy.cluster_file, "find_firmware", lambda: None)
    assert "apt-get install qemu-system-data" in told()
