"""Letting a VM go on out of the file that it was saved in: its next incarnation, which does not boot.

What can be known of the file is checked before anything is started. Of a secure VM its ultravisor decides whether this
snapshot may run (docs/snapshot.md); its reason is told here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import trio

from deploy.child import Child
from deploy.cluster_file import VmSpec
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.operations import RESTORE, refuse_impossible
from deploy.restart import end_incarnation, start_incarnation
from deploy.snapshot import finish, full_reason, give_file, switch_off
from deploy.snapshot_job import SnapshotJob, SnapshotKind, SnapshotPhase
from deploy.states import printable
from deploy.status import ask, refresh_vm
from deploy.vm_description import vm_facts
from protocol.errors import PefboxError, UserError
from protocol.roles import Role
from services.qemu.snapshot.saver import SnapshotStatus
from shared.snapshot_file import BadSnapshot, DiskMark, SnapshotHead, mark_of, read_head, why_other_disks

_POLL_SECONDS = 0.02
_BUILT_SECONDS = 15.0


async def restore(run: ClusterRun, name: str, path: Path, *, ignore_disks: bool) -> SnapshotJob:
    """Begin to restore VM `name` from `path`; returns when that is accepted. Raises UserError, with nothing started."""
    async with run.restarting:
        run.refuse_unready()
        vm = run.vm_named(name)
        await refresh_vm(run, vm)
        refuse_impossible(vm_facts(run, vm), RESTORE)
        fd = open_snapshot(vm.spec, path, ignore_disks=ignore_disks)
        job = vm.snapshot = SnapshotJob(name, SnapshotKind.RESTORE, path)
    run.log.info("restore", vm=name, file=str(path))
    run.nursery.start_soon(_carry_out, run, vm, job, fd)
    return job


def open_all(run: ClusterRun, files: Mapping[str, Path]) -> dict[str, int]:
    """Of a cluster that is about to start: descriptors of `files`, by the VM. Raises UserError."""
    opened: dict[str, int] = {}
    try:
        for name, path in files.items():
            vm = run.vm_named(name)
            opened[name] = open_snapshot(vm.spec, path, ignore_disks=False)
            vm.snapshot = SnapshotJob(name, SnapshotKind.RESTORE, path)
    except BaseException:
        close_all(opened)
        raise
    return opened


async def load_all(run: ClusterRun, opened: Mapping[str, int]) -> None:
    """Have them go on, one after the other. One that does not is off, and the others go on."""
    for name, fd in opened.items():
        vm = run.vms[name]
        assert vm.snapshot is not None
        try:
            await load(run, vm, vm.snapshot, fd)
        except PefboxError as error:
            await _fail(run, vm, vm.snapshot, str(error))


def close_all(opened: Mapping[str, int]) -> None:
    """The files of `open_all`."""
    for fd in opened.values():
        os.close(fd)


def open_snapshot(vm: VmSpec, path: Path, *, ignore_disks: bool) -> int:
    """The descriptor of a file from which `vm` may be restored, as far as its head says. Raises UserError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        _check(vm, path, _head_of(path, fd), ignore_disks=ignore_disks)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _head_of(path: Path, fd: int) -> SnapshotHead:
    if not path.is_file():
        raise UserError(f"{path}: is no regular file")
    try:
        return read_head(fd)
    except BadSnapshot as bad:
        raise UserError(f"{path}: {bad}") from None


def _check(vm: VmSpec, path: Path, head: SnapshotHead, *, ignore_disks: bool) -> None:
    if (head.vm, head.lpid) != (vm.name, vm.lpid):
        raise UserError(
            f"{path}: is a snapshot of {printable(head.vm)} (lpid {head.lpid}), not of {vm.name} (lpid {vm.lpid})"
        )
    if head.memory_bytes != vm.memory_bytes:
        raise UserError(f"{path}: {vm.name} had {head.memory_bytes} bytes of memory then, now it has {vm.memory_bytes}")
    if head.secure and not vm.secure_allowed:
        raise UserError(f"{path}: {vm.name} was secure then, and may not be so now")
    if head.secure and ignore_disks:
        raise UserError(
            f"{path}: --ignore-disks is for normal VMs: a secure one goes on as it was saved, or not at all"
        )
    reason = why_other_disks(head.disks, _disks_of(vm))
    if reason is None or ignore_disks:
        return
    advice = "" if head.secure else "; --ignore-disks restores it all the same"
    raise UserError(f"{path}: {vm.name} cannot go on: {printable(reason)}{advice}")


def _disks_of(vm: VmSpec) -> list[DiskMark]:
    return sorted((_mark_of(disk.name, disk.path) for disk in vm.disks), key=lambda mark: mark.name)


def _mark_of(name: str, path: str) -> DiskMark:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return mark_of(name, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# -- carrying out ---------------------------------------------------------------------------------------------


async def _carry_out(run: ClusterRun, vm: VmRecord, job: SnapshotJob, fd: int) -> None:
    try:
        async with run.restarting:
            if run.stopping:
                return
            await end_incarnation(run, vm)
            await start_incarnation(run, vm)
        await load(run, vm, job, fd)
    except (PefboxError, OSError) as error:
        if not run.stopping:
            await _fail(run, vm, job, str(error))
    finally:
        os.close(fd)


async def load(run: ClusterRun, vm: VmRecord, job: SnapshotJob, fd: int) -> None:
    """Have the processes of `vm`, which wait, go on out of the file; returns when they do. Raises PefboxError."""
    qemu = run.child(vm.spec.name, Role.QEMU)
    assert qemu is not None
    await _until_built(qemu)
    give_file(qemu, vm.spec.name, fd)
    await qemu.order("snapshot.restore", {})
    job.phase = SnapshotPhase.LOADING
    while not run.stopping:
        job.note(await ask(qemu, "snapshot.status", {}))
        if job.status == SnapshotStatus.RESTORED:
            finish(vm, job, SnapshotPhase.DONE)
            await refresh_vm(run, vm)
            return
        if job.status == SnapshotStatus.FAILED:
            raise UserError(await full_reason(run, vm, job))
        if vm.lost or not qemu.is_running:
            raise UserError(vm.reason or f"{qemu.target} is {qemu.state.value}")
        await trio.sleep(_POLL_SECONDS)


async def _until_built(qemu: Child) -> None:
    """A qemu that is ready still makes its devices; raises UserError."""
    with trio.move_on_after(_BUILT_SECONDS):
        while qemu.is_running:
            answer = await ask(qemu, "snapshot.status", {})
            if isinstance(answer, dict) and answer.get("ready"):
                return
            await trio.sleep(_POLL_SECONDS)
    raise UserError(f"{qemu.target} is {qemu.state.value}: it made no devices within {_BUILT_SECONDS:g} s")


async def _fail(run: ClusterRun, vm: VmRecord, job: SnapshotJob, reason: str) -> None:
    """The VM is off, and nothing of it runs."""
    name = vm.spec.name
    await switch_off(run, vm, f"not restored: {reason}")
    finish(vm, job, SnapshotPhase.FAILED, reason)
    run.report(f"{name} was not restored from {job.path}: {reason}", vm=name)
