"""`pefbox demo --guest linux`: the demo's claims hold for two Linux VMs that turned themselves secure, and can fail.

What it shares with the model's demo is broken in test_demo.py; what is Linux's own is broken here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

import deploy.cluster_file
import deploy.demo
import deploy.demo_linux
from deploy.api import RunningCluster, cluster
from deploy.boot_parts import BootParts, parts_blob, read_program_file
from deploy.cli_demo import demo
from deploy.cluster_file import VmSpec, read_cluster_file
from deploy.demo_evidence import take_evidence
from deploy.demo_host import _segment_of, press
from deploy.demo_linux import LinuxGuest
from deploy.demo_report import VmReport, conclude
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from tests.cluster.test_demo import LEAKY, VM_KEYS
from tests.needs import need_firmware, need_linux

SECONDS = 600
DISK_BYTES = 16 << 20
SMALL_DISK_BYTES = 1 << 20
HEAD_BYTES = 32
MIN_SPOILED = 24
"""Pages hold the disk twice, in its page cache and in the file that is checked; all of one are not enough."""
SPOIL_SECONDS = 30.0
COMMAND_LINE = "console=hvc0 quiet svm=on swiotlb=force"

_TEXT = """
[hosts.alpha]
secure_memory = "128M"
[vms.vm1]
host = "alpha"
memory = "128M"
time = "wall"
[vms.vm1.guest]
kernel = "machine"
boot = "program"
image = "{image.kernel}"
initrd = "{image.initramfs}"
esm_blob = "{blob}"
command_line = "{command_line}"
[vms.vm1.disks.data]
path = "{disk}"
[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "data"
access_platform = true
"""


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


@pytest.mark.linux
async def test_a_linux_whose_pages_leave_in_plain_fails_the_checks_that_are_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The ultravisor neither encrypts nor verifies (S1, S3). The checks are the demo's, the VM has no firmware."""
    monkeypatch.setenv("PEFBOX_LEAK", "images")
    monkeypatch.setattr(deploy.demo_linux, "_REGION_OFFSET_BYTES", SMALL_DISK_BYTES // 2)
    monkeypatch.setattr(deploy.demo_linux, "_MARKER_OFFSET_BYTES", 0)
    file = small_cluster(tmp_path)
    (spec,) = read_cluster_file(file).vms
    guest, report = LinuxGuest(), VmReport(secure=True)
    async with cluster(file, state_dir=tmp_path / "state", service_module=LEAKY) as running:
        vm = running.vm("vm1")
        await guest.work(vm, report)
        assert report.bytes_through_swiotlb >= report.disk_bytes == SMALL_DISK_BYTES

        await guest.endure(running, spec, report)
        assert report.host_read_of_secure_page == "plain"
        assert report.problems == ["a host's read of a secure page shows its content"]

        monkeypatch.setattr(deploy.demo_linux, "press", press_and_spoil)
        with trio.fail_after(SPOIL_SECONDS):
            await guest._under_pressure(running, spec, guest._shells["vm1"], report)
        assert report.problems[1:] == ["paging changed what the guest reads"]
        assert await guest._bytes_through_swiotlb(vm, guest._shells["vm1"]) == 0

        await press(running, spec, 1.0)
        evidence = await trio.to_thread.run_sync(take_evidence, running.paths, {})
        deploy.demo._search(evidence, await guest.reveal(vm), report)

    segment = next(what for what in evidence.copies if what.startswith("normal RAM"))
    assert {f"{name} in {segment}" for name in ("page-cache", "process")} <= set(report.secrets_found)
    conclude(report)
    assert "secrets were found outside the guest" in report.problems


def small_cluster(directory: Path) -> Path:
    """One VM that turns itself secure at its start, with a disk of random content."""
    image, file, state_dir = need_linux(), directory / "c.toml", directory / "state"
    state_dir.mkdir()
    disk, blob = directory / "disk.img", directory / "vm1.esm"
    disk.write_bytes(os.urandom(SMALL_DISK_BYTES))
    parts = BootParts(program=Path(image.kernel), initrd=Path(image.initramfs), command_line=COMMAND_LINE)
    blob.write_bytes(parts_blob(parts, read_program_file(parts.program), state_dir, ["alpha"]))
    file.write_text(_TEXT.format(image=image, disk=disk, blob=blob, command_line=COMMAND_LINE))
    return file


async def press_and_spoil(running: RunningCluster, spec: VmSpec, _share: float) -> int:
    """Page out everything, and change each page that has left and holds what is on the disk, until some were."""
    chunks = set(chunks_of(await trio.Path(spec.disks[0].path).read_bytes()))
    n_gone = n_spoiled = 0
    while n_spoiled < MIN_SPOILED:
        n_gone += await press(running, spec, 1.0)
        with _segment_of(running, spec.name).open("r+b", buffering=0) as ram:
            for at in range(0, spec.memory_bytes, PAGE_BYTES):
                if os.pread(ram.fileno(), HEAD_BYTES, at) in chunks:
                    os.pwrite(ram.fileno(), b"spoiled", at)
                    n_spoiled += 1
    return n_gone


def chunks_of(disk: bytes) -> list[bytes]:
    """How each page that is filled from the disk begins."""
    return [disk[at : at + HEAD_BYTES] for at in range(0, len(disk), PAGE_BYTES)]
