"""`pefbox demo`: the main job holds, and each of its checks can fail."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import deploy.api
import deploy.demo
from deploy.cli_demo import demo
from deploy.demo_model import ModelGuest

SECONDS = 150
DISK_BYTES = 64 << 20
LEAKY = "tests.attack.leaky.{role}"

VM_KEYS = {
    "secure", "disk_sha256_guest", "disk_sha256_host", "bytes_through_swiotlb", "hypercalls", "ultracalls",
    "host_read_of_secure_page", "secrets_found", "seconds_to_secure",
}  # fmt: skip


ONE_HOST = """
make = "demo"

[hosts.alpha]
secure_memory = "256M"

[vms.vm1]
host = "alpha"
memory = "128M"
time = "wall"

[vms.vm1.guest]
workload = "demo"

[vms.vm1.disks.root]
path = "@state/vm1.img"

[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "root"
"""


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state directory for all on one host: the second demo finds the disk of the first."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def one_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo has one host with a smaller VM."""
    file = tmp_path / "one-host.toml"
    file.write_text(ONE_HOST)
    monkeypatch.setattr(ModelGuest, "cluster_file", file)


def test_every_check_of_the_demo_holds(tmp_path: Path) -> None:
    report_file, state_dir = tmp_path / "demo.json", tmp_path / "state"
    command = [sys.executable, "-m", "deploy.cli", "demo", "--state", str(state_dir), "--json", str(report_file)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check held" in done.stdout and "NOT" not in done.stdout
    report = json.loads(report_file.read_text())
    assert report["ok"] is True
    assert set(report["vms"]) == {"vm1", "vm2"}
    for vm in report["vms"].values():
        check_vm(vm)
    written = [vm["disk_sha256_guest"] for vm in report["vms"].values()]
    assert written[0] != written[1]


def check_vm(vm: dict[str, Any]) -> None:
    """Shape and values of one VM's report."""
    assert vm.keys() >= VM_KEYS
    assert vm["secure"] is True
    assert vm["disk_sha256_guest"] == vm["disk_sha256_host"]
    assert len(bytes.fromhex(vm["disk_sha256_guest"])) == 32
    assert vm["bytes_through_swiotlb"] >= vm["disk_bytes"] >= DISK_BYTES
    assert vm["host_read_of_secure_page"] == "ciphertext"
    assert vm["secrets_found"] == []
    # The start of its cluster is in it: several Python processes.
    assert 0.5 < vm["seconds_to_secure"] < 60
    for calls, expected in ((vm["hypercalls"], "H_RTAS"), (vm["ultracalls"], "UV_SHARE_PAGE")):
        assert calls[expected] > 0
        assert all(isinstance(n, int) and n > 0 for n in calls.values())
    assert vm["ultracalls"]["UV_ESM"] == 1


def run_broken(monkeypatch: pytest.MonkeyPatch, state_dir: Path, report_file: Path, leak: str) -> dict[str, Any]:
    """The demo over an ultravisor that leaks; its report. It must not call that a success."""
    monkeypatch.setenv("PEFBOX_LEAK", leak)
    monkeypatch.setattr(deploy.demo, "cluster", functools.partial(deploy.api.cluster, service_module=LEAKY))
    result = CliRunner().invoke(demo, ["--state", str(state_dir), "--json", str(report_file)])
    assert result.exit_code == 1, result.output
    assert "NOT every check held" in result.output
    report: dict[str, Any] = json.loads(report_file.read_text())
    assert report["ok"] is False
    return report


@pytest.mark.usefixtures("one_host")
def test_registers_that_pass_the_filter_are_found(
    monkeypatch: pytest.MonkeyPatch, state_dir: Path, tmp_path: Path
) -> None:
    report = run_broken(monkeypatch, state_dir, tmp_path / "demo.json", "registers")

    found = report["vms"]["vm1"]["secrets_found"]
    assert "registers in frames of alpha/kvm" in found
    assert {place.split(" ")[0] for place in found} == {"registers"}


@pytest.mark.usefixtures("one_host")
def test_pages_that_leave_in_plain_are_found(monkeypatch: pytest.MonkeyPatch, state_dir: Path, tmp_path: Path) -> None:
    report = run_broken(monkeypatch, state_dir, tmp_path / "demo.json", "images")

    assert report["vms"]["vm1"]["host_read_of_secure_page"] == "plain"


@pytest.mark.usefixtures("one_host")
def test_a_disk_that_differs_from_what_the_guest_read_is_found(
    monkeypatch: pytest.MonkeyPatch, state_dir: Path, tmp_path: Path
) -> None:
    """Somebody changes a byte of the image after the host took its digest."""
    original = deploy.demo._sha256_of

    def digest_then_change(path: Path) -> str:
        digest = original(path)
        with path.open("r+b") as disk:
            disk.seek(-1, os.SEEK_END)
            last = disk.read(1)[0]
            disk.seek(-1, os.SEEK_END)
            disk.write(bytes([last ^ 1]))
        return digest

    monkeypatch.setattr(deploy.demo, "_sha256_of", digest_then_change)

    result = CliRunner().invoke(demo, ["--state", str(state_dir), "--json", str(tmp_path / "demo.json")])

    assert result.exit_code == 1
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["vms"]["vm1"]["problems"] == ["guest and host see different disks"]
