"""`make = "linux"`: what VMs that run the built Linux need to turn themselves secure.

Of the files that a VM names, those below the cluster's state directory are made: `image` and `initrd` are the built
kernel and initial RAM disk, `esm_blob` measures them with the VM's command line, disks get random content. Files that
lie elsewhere are the user's: they are measured as they are, and never written.

What was made carries a stamp of its inputs and is made again only when they changed; a disk is made once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import msgspec

from deploy.boot_parts import BootParts, parts_blob, policy_file, read_program_file
from deploy.cluster_file import Cluster, VmSpec
from deploy.linux.store import LinuxImage, built_image, default_cache
from protocol.errors import UserError
from protocol.startup import MACHINE_KERNEL, GuestEntry
from services.ultravisor.identity import ensure_keys, public_key_of

DISK_BYTES = 16 << 20
_RECIPE_VERSION = 1
_CHUNK_BYTES = 1 << 20


def make_linux_files(cluster: Cluster, state_dir: Path) -> None:
    """Make what is missing or out of date; raises UserError."""
    for vm in cluster.vms:
        if vm.guest.kernel != MACHINE_KERNEL or vm.guest.boot != "kernel" or vm.guest.image is None:
            raise UserError(
                f'{cluster.path}: make = "linux" makes the files of VMs with guest.kernel = "machine", '
                f'guest.boot = "kernel" and guest.image; vms.{vm.name} is none'
            )
        _make_disks(vm, state_dir)
        _make_boot_files(vm, vm.guest, state_dir, cluster.homes_of(vm))


def built_linux() -> LinuxImage:
    """The kernel and initial RAM disk that `pefbox linux build` made; raises UserError with that command."""
    return built_image(default_cache())


def _make_boot_files(vm: VmSpec, guest: GuestEntry, state_dir: Path, hosts: list[str]) -> None:
    assert guest.image is not None
    ours = {path for path in (guest.image, guest.initrd, guest.esm_blob) if path and _is_ours(path, state_dir)}
    if not ours:
        return
    for host in hosts:
        ensure_keys(state_dir, host)
    sources = _sources(guest, ours)
    keys = [public_key_of(state_dir, host) for host in hosts]
    settings = msgspec.to_builtins(guest)
    inputs = [_RECIPE_VERSION, settings, *sources.values(), *keys, policy_file(vm).content]
    stamp = hashlib.sha256(msgspec.msgpack.encode(inputs)).hexdigest()
    stamp_file = state_dir / f"{vm.name}.made"
    if stamp_file.is_file() and stamp_file.read_text() == stamp and all(Path(path).is_file() for path in ours):
        return
    # What is left half made belongs to no inputs.
    stamp_file.unlink(missing_ok=True)
    for path, source in sources.items():
        if path in ours:
            shutil.copyfile(source[0], path)
    if guest.esm_blob in ours:
        _write_blob(vm, guest, state_dir, hosts)
    stamp_file.write_text(stamp)


def _sources(guest: GuestEntry, ours: set[str]) -> dict[str, tuple[str, int, int]]:
    """Where the content of kernel and initial RAM disk comes from, by their path, with size and time of change."""
    named = [path for path in (guest.image, guest.initrd) if path is not None]
    built = built_linux() if any(path in ours for path in named) else None
    origins = {}
    for path in named:
        made_of = path
        if built is not None and path in ours:
            made_of = built.kernel if path == guest.image else built.initramfs
        try:
            status = os.stat(made_of)
        except OSError as error:
            raise UserError(f"{made_of}: {error.strerror}") from None
        origins[path] = (made_of, status.st_size, status.st_mtime_ns)
    return origins


def _write_blob(vm: VmSpec, guest: GuestEntry, state_dir: Path, hosts: list[str]) -> None:
    assert guest.image is not None
    assert guest.esm_blob is not None
    initrd = None if guest.initrd is None else Path(guest.initrd)
    parts = BootParts(program=Path(guest.image), initrd=initrd, command_line=guest.command_line)
    program = read_program_file(parts.program)
    Path(guest.esm_blob).write_bytes(parts_blob(parts, program, state_dir, hosts, [policy_file(vm)]))


def _make_disks(vm: VmSpec, state_dir: Path) -> None:
    for disk in vm.disks:
        path = Path(disk.path)
        if path.exists() or not _is_ours(disk.path, state_dir):
            continue
        making = path.with_name(f".making-{path.name}")
        with making.open("wb") as file:
            for _ in range(0, DISK_BYTES, _CHUNK_BYTES):
                file.write(os.urandom(_CHUNK_BYTES))
        os.replace(making, path)


def _is_ours(path: str, state_dir: Path) -> bool:
    return Path(path).is_relative_to(state_dir)
