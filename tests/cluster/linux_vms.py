"""Cluster files whose VMs run the built Linux through firmware, as `make = "linux"` prepares them, for tests."""

from __future__ import annotations

from pathlib import Path

from deploy.api import RunningCluster, Vm
from deploy.cluster_file import read_cluster_file, resolve_state
from deploy.linux_files import make_linux_files
from services.ultravisor.audit import audit_path, read_lines

HOST = "alpha"
MEMORY_BYTES = 256 << 20
COMMAND_LINE = "console=hvc0 svm=on swiotlb=force"

_HEAD = """
{make}
[hosts.alpha]
secure_memory = {secure_bytes}
"""
_VM = """
[vms.{name}]
host = "alpha"
memory = {memory_bytes}
time = "wall"
[vms.{name}.guest]
kernel = "machine"
boot = "kernel"
image = "@state/{name}.vmlinux"
initrd = "@state/{name}.initramfs"
esm_blob = "@state/{name}.esm"
command_line = "{command_line}"
[vms.{name}.disks.data]
path = "@state/{name}.img"
[[vms.{name}.devices]]
kind = "virtio-blk"
disk = "data"
access_platform = true
"""


def write_cluster_file(file: Path, names: list[str], *, make: bool = True, command_line: str = COMMAND_LINE) -> None:
    """One host and these VMs on it; with `make`, `up` prepares their files."""
    values = {"memory_bytes": MEMORY_BYTES, "command_line": command_line}
    head = _HEAD.format(make='make = "linux"' if make else "", secure_bytes=MEMORY_BYTES * len(names))
    file.write_text(head + "".join(_VM.format(name=name, **values) for name in names))


def make_files(file: Path, state_dir: Path) -> None:
    """What `up` would make for the file's VMs."""
    state_dir.mkdir(exist_ok=True)
    make_linux_files(resolve_state(read_cluster_file(file), state_dir), state_dir)


def audit_events(state_dir: Path, vm: str) -> list[str]:
    """The events of a VM in its host's audit log, in order."""
    with audit_path(state_dir, HOST).open("rb") as log:
        return [line.event for line in read_lines(log) if line.vm == vm]


async def power_off(running: RunningCluster, vm: Vm) -> None:
    """`poweroff` in a normal VM's shell ends it cleanly."""
    await vm.console_write(b"poweroff -f\r")
    row = await vm.wait_state("off", seconds=30)
    assert not row.secure
    assert (await running.process(f"{vm.name}/qemu").row()).state == "running"
