"""`make = "demo"`: disks, secure images, initial RAM disks and ESM blobs for the VMs of a cluster file.

A VM that boots from its disk gets one with a boot partition (image, initial RAM disk with the blob in front, command
line), a data partition (ext4 by `mke2fs -d`; where that program is missing, a tar archive of the same files) and a
scratch partition. A VM booted with `boot = "kernel"` gets the files that its entry names below `@state/`.

What was made carries a stamp of its inputs (the model's sources, the settings, the host's machine key), and is made
again only when they changed.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from deploy.boot_parts import hosts_blob, policy_file
from deploy.cluster_file import Cluster, VmSpec
from protocol.errors import ImageRefused, UserError
from services.guest.model.image import build_image, sources_digest
from services.ultravisor.identity import ensure_keys, public_key_of
from shared.boot_partition import DiskLayout, build_boot_partition, write_disk
from shared.esm_digest import RTAS_TEXT, SecureImage
from shared.esm_make import Attachment
from shared.newc import prepend_blob

COMMAND_LINE = "svm=on"
DATA_BYTES = 64 << 20
SCRATCH_BYTES = 4 << 20
SECRET_FILE = "crypttab"
_RECIPE_VERSION = 2
_N_FILES = 40
_FILE_BYTES = 1 << 20
_INITRD_BYTES = 256 << 10


class SecureFiles(msgspec.Struct, frozen=True):
    """What a VM needs to turn itself secure."""

    image: bytes
    initrd: bytes
    blob: bytes
    command_line: str


def make_demo_files(cluster: Cluster, state_dir: Path) -> None:
    """Make what is missing or out of date; raises UserError."""
    for vm in cluster.vms:
        hosts = cluster.homes_of(vm)
        for host in hosts:
            ensure_keys(state_dir, host)
        stamp = _stamp(vm, state_dir, hosts)
        stamp_file = state_dir / f"{vm.name}.made"
        if _is_current(vm, stamp_file, stamp):
            continue
        files = secure_files(vm, state_dir, hosts)
        if vm.guest.boot == "disk":
            _make_disk(vm, files)
        else:
            _write_kernel_files(vm, files)
        stamp_file.write_text(stamp)


def secure_files(vm: VmSpec, state_dir: Path, hosts: Sequence[str] = ()) -> SecureFiles:
    """Image, initial RAM disk, blob and command line of one VM that may turn secure on `hosts`, or on its own alone.

    Raises UserError for settings that the kernel refuses.
    """
    command_line = vm.guest.command_line or COMMAND_LINE
    try:
        image = build_image(vm.guest.workload, {**vm.guest.options, "dma": vm.guest.dma})
    except ImageRefused as refused:
        raise UserError(f"vm {vm.name}: {refused.reason}") from None
    initrd = random.Random(vm.name).randbytes(_INITRD_BYTES)
    measured = SecureImage(RTAS_TEXT, image, initrd, command_line.encode())
    secret = Attachment(SECRET_FILE, f"root /dev/vda3 {vm.name}\n".encode())
    blob = hosts_blob(measured, state_dir, hosts or [vm.host], [secret, policy_file(vm)])
    return SecureFiles(image, initrd, blob, command_line)


def _stamp(vm: VmSpec, state_dir: Path, hosts: Sequence[str]) -> str:
    keys = [public_key_of(state_dir, host) for host in hosts]
    inputs = [_RECIPE_VERSION, msgspec.to_builtins(vm.guest), sources_digest(), *keys, policy_file(vm).content]
    return hashlib.sha256(msgspec.msgpack.encode(inputs)).hexdigest()


def _is_current(vm: VmSpec, stamp_file: Path, stamp: str) -> bool:
    made = [disk.path for disk in vm.disks] if vm.guest.boot == "disk" else list(_kernel_paths(vm).values())
    if not stamp_file.is_file() or stamp_file.read_text() != stamp:
        return False
    return all(Path(path).is_file() for path in made)


# -- boot = "kernel" ------------------------------------------------------------------------------------------------


def _kernel_paths(vm: VmSpec) -> dict[str, str]:
    named = {"image": vm.guest.image, "initrd": vm.guest.initrd, "blob": vm.guest.esm_blob}
    return {what: path for what, path in named.items() if path is not None}


def _write_kernel_files(vm: VmSpec, files: SecureFiles) -> None:
    for what, path in _kernel_paths(vm).items():
        Path(path).write_bytes(getattr(files, what))


# -- boot = "disk" --------------------------------------------------------------------------------------------------


def _make_disk(vm: VmSpec, files: SecureFiles) -> None:
    if not vm.disks:
        raise UserError(f"vm {vm.name}: it boots from a disk and has none")
    path = Path(vm.disks[0].path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as scratch:
        data = _data_image(vm.name, Path(scratch))
        making = Path(scratch) / "disk.img"
        with making.open("w+b") as disk, data.open("rb") as content:
            write_disk(disk, _boot_partition(files), data=content, data_bytes=DATA_BYTES, scratch_bytes=SCRATCH_BYTES)
        os.replace(making, path)


def write_model_disk(
    vm: VmSpec,
    state_dir: Path,
    disk: BinaryIO,
    data: BinaryIO,
    scratch_bytes: int = SCRATCH_BYTES,
    hosts: Sequence[str] = (),
) -> DiskLayout:
    """Write a disk that `vm` boots from to the empty file `disk`, with the content of `data` as its data partition.

    It may turn secure on `hosts`, or on its own alone. The hosts' machine keys are in `state_dir`. Raises UserError for
    settings that the kernel refuses.
    """
    files = secure_files(vm, state_dir, hosts)
    return write_disk(disk, _boot_partition(files), data=data, scratch_bytes=scratch_bytes)


def _boot_partition(files: SecureFiles) -> bytes:
    return build_boot_partition(files.image, prepend_blob(files.initrd, files.blob), files.command_line)


def _data_image(name: str, scratch: Path) -> Path:
    """A file system image, or a tar archive, with ordinary files."""
    tree = scratch / "files"
    tree.mkdir()
    content = random.Random(f"data of {name}")
    for number in range(_N_FILES):
        (tree / f"file-{number:02}.bin").write_bytes(content.randbytes(_FILE_BYTES))
    image = scratch / "data.img"
    mke2fs = _find_mke2fs()
    if mke2fs is None:
        _write_tar(tree, image)
        return image
    command = [mke2fs, "-q", "-t", "ext4", "-d", str(tree), str(image), f"{DATA_BYTES >> 10}k"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(f"mke2fs failed: {made.stderr.strip() or made.returncode}")
    return image


def _find_mke2fs() -> str | None:
    return shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _write_tar(tree: Path, image: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(tree.iterdir()):
            archive.add(path, arcname=path.name)
    image.write_bytes(buffer.getvalue())
