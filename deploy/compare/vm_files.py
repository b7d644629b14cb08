"""What one trial is started from: a cluster file with one VM, and its disk."""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import dataclass
from pathlib import Path

from deploy.cluster_file import read_cluster_file
from deploy.compare.plan import PEER_MAC, Purpose, Trial, Workload
from deploy.demo_files import write_model_disk
from protocol.startup import AccessPlatform
from services.ultravisor.identity import ensure_keys
from shared.dma_designs import DESIGNS

_NETWORK = """
[networks.lan]

[[vms.vm1.devices]]
kind = "virtio-net"
network = "lan"
mac = "52:54:00:00:00:01"
{offer}
[[vms.{peer}.devices]]
kind = "virtio-net"
network = "lan"
mac = "{mac}"
"""
HOST, VM, DISK = "alpha", "vm1", "root"
BYPASS_VM = "bypass"
"""Runs beside a VM that is timed, and is timed in turn with it: a normal VM whose device passes the IOMMU by."""
MEMORY_BYTES = 64 << 20
DATA_BYTES = 16 << 20
SCRATCH_BYTES = 4 << 20
_SEED = 2018

_CLUSTER = """
[hosts.alpha]
secure_memory = "128M"

[vms.vm1]
host = "alpha"
memory = {memory}
time = "{time}"
tell_secure = {tell_secure}
ddw = {ddw}

[vms.vm1.guest]
dma = "{driver}"
command_line = "{command_line}"
old_firmware = {old_firmware}
options = {options}

[vms.vm1.disks.root]
path = "{disk}"

[[vms.vm1.devices]]
kind = "virtio-blk"
disk = "root"
{offer}"""
_OFFER = """access_platform = {access_platform}
no_translation = {no_translation}
identity_address = {identity_address}
bypass_switch = {bypass_switch}
iommu_switch = {iommu_switch}
"""
_BYPASS = """
[vms.{name}]
host = "alpha"
memory = {memory}
time = "wall"

[vms.{name}.guest]
dma = "nothing"
command_line = "svm=off"

[vms.{name}.disks.root]
path = "{disk}"
"""
_ACCESS_PLATFORM = {
    AccessPlatform.NO: "false",
    AccessPlatform.REQUIRED: "true",
    AccessPlatform.OPTIONAL: '"optional"',
}


@dataclass(frozen=True, slots=True)
class TrialFiles:
    """Where they are; `disk_sha256` is the digest of the whole disk as it was made."""

    cluster_file: Path
    state_dir: Path
    disk: Path
    disk_sha256: str


def write_trial(trial: Trial, directory: Path, options: dict[str, int | bool]) -> TrialFiles:
    """Write the files of `trial` into `directory`, which is empty; raises UserError."""
    file, state_dir, disk = directory / "trial.toml", directory / "state", directory / "disk.img"
    file.write_text(cluster_text(trial, disk, options))
    state_dir.mkdir()
    ensure_keys(state_dir, HOST)
    data = io.BytesIO(random.Random(_SEED).randbytes(DATA_BYTES))
    for vm in read_cluster_file(file).vms:
        with Path(vm.disks[0].path).open("w+b") as image:
            write_model_disk(vm, state_dir, image, data, SCRATCH_BYTES)
    with disk.open("rb") as image:
        digest = hashlib.file_digest(image, "sha256").hexdigest()
    return TrialFiles(file, state_dir, disk, digest)


def cluster_text(trial: Trial, disk: Path, options: dict[str, int | bool]) -> str:
    """The cluster file of `trial`: the devices and the machine of its design, the drivers of `trial.driver`."""
    facts = DESIGNS[trial.design]
    offer = _OFFER.format(
        access_platform=_ACCESS_PLATFORM[facts.offer.access_platform],
        no_translation=_flag(facts.offer.no_translation),
        identity_address=_flag(facts.offer.identity_address),
        bypass_switch=_flag(facts.offer.bypass_switch),
        iommu_switch=_flag(facts.offer.iommu_switch),
    )
    text = _CLUSTER.format(
        memory=MEMORY_BYTES,
        time=trial.time,
        tell_secure=_flag(facts.machine.tell_secure),
        ddw=_flag(trial.ddw),
        driver=trial.driver,
        command_line="svm=on" if trial.secure else "svm=off",
        old_firmware=_flag(trial.purpose is Purpose.OLD_FIRMWARE),
        options="{ " + ", ".join(f"{name} = {str(value).lower()}" for name, value in options.items()) + " }",
        disk=disk,
        offer=offer,
    )
    if trial.purpose is not Purpose.TIME:
        return text
    text += _BYPASS.format(name=BYPASS_VM, memory=MEMORY_BYTES, disk=disk.with_name("bypass.img"))
    if Workload.NET in trial.workloads:
        text += _NETWORK.format(offer=offer, peer=BYPASS_VM, mac=PEER_MAC)
    return text


def _flag(value: bool) -> str:
    return str(value).lower()
