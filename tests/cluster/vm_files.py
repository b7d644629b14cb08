"""Cluster files with one small VM, its disk and all that it needs to turn itself secure, for tests."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from deploy.api import Vm
from deploy.cluster_file import read_cluster_file
from deploy.demo_files import write_model_disk
from protocol.errors import UserError
from services.ultravisor.identity import ensure_keys
from shared.boot_partition import ALIGN_BYTES, DiskLayout

DATA_BYTES = 4 << 20
CONSOLE_SECONDS = 20.0
PROMPT = "pefbox: ready"

_CLUSTER = """
[hosts.alpha]
secure_memory = "128M"

[vms.vm1]
host = "alpha"
memory = "64M"
{vm}

[vms.vm1.guest]
{guest}

[vms.vm1.disks.root]
path = "{disk}"
readonly = {readonly}
"""


@dataclass(frozen=True, slots=True)
class VmFiles:
    """What `make_vm_files` made."""

    cluster_file: Path
    state_dir: Path
    disk: Path
    layout: DiskLayout

    def sha256(self) -> str:
        """The disk's digest as the host sees it."""
        return hashlib.sha256(self.disk.read_bytes()).hexdigest()

    def scratch(self, n_bytes: int) -> bytes:
        """The beginning of the scratch partition."""
        with self.disk.open("rb") as disk:
            disk.seek(self.layout.scratch.offset_bytes)
            return disk.read(n_bytes)


def make_vm_files(
    directory: Path, *, vm: str = 'time = "wall"', guest: str = "", readonly: bool = False, extra: str = ""
) -> VmFiles:
    """Write a cluster file with `vm` and `guest` lines for vm1 on alpha, and its bootable disk; in `directory`."""
    file, state_dir, disk = directory / "c.toml", directory / "state", directory / "vm1.img"
    text = _CLUSTER.format(vm=vm, guest=guest, disk=disk, readonly=str(readonly).lower())
    file.write_text(text + extra)
    state_dir.mkdir()
    ensure_keys(state_dir, "alpha")
    spec = read_cluster_file(file).vms[0]
    data = io.BytesIO(random.Random(5).randbytes(DATA_BYTES))
    with disk.open("w+b") as image:
        layout = write_model_disk(spec, state_dir, image, data, ALIGN_BYTES)
    return VmFiles(file, state_dir, disk, layout)


async def console_until(vm: Vm, *marks: str, seconds: float = CONSOLE_SECONDS, since: int = 0) -> str:
    """The console from character `since` on, as soon as it shows one of `marks`; raises UserError with its end."""
    return await console_while(vm, lambda text: not any(mark in text for mark in marks), f"{marks}", seconds, since)


async def console_while(vm: Vm, waits: Callable[[str], bool], what: str, seconds: float, since: int = 0) -> str:
    """The console from `since` on, as soon as it no longer `waits`."""
    text = ""
    with trio.move_on_after(seconds):
        while waits(text):
            data, since = await vm.console_read(since, 0.3)
            text += data.decode(errors="replace")
        return text
    raise UserError(f"{vm.name}: no {what} on the console within {seconds:g} s: {text[-600:]!r}")


async def console_end(vm: Vm) -> int:
    """How many characters the console has shown so far."""
    since = 0
    while True:
        data, since = await vm.console_read(since)
        if not data:
            return since


def answer_of(text: str) -> str:
    """The answer line of a prompt command."""
    lines = [line for line in text.splitlines() if line.startswith(("ok", "error"))]
    return lines[-1] if lines else text
