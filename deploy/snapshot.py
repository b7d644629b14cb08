"""Saving a VM into a file: its qemu writes, the launcher gives the file its name, then the VM is off.

The order decides what a crash leaves: the file is whole and has its name before the VM gives up running, so there is
always one of the two. Of a secure VM its ultravisor decides, and restores no file that it did not hear the end of.
"""

from __future__ import annotations

from pathlib import Path

import trio

from deploy.child import Child
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.keepers import end_all
from deploy.migration_record import VmEnd
from deploy.operations import SNAPSHOT, refuse_impossible
from deploy.snapshot_job import SnapshotFacts, SnapshotJob, SnapshotKind, SnapshotPhase
from deploy.snapshot_target import SnapshotTarget
from deploy.states import printable
from deploy.status import ask, refresh_vm
from deploy.supervise import end_vm
from deploy.vm_description import vm_facts
from protocol import control
from protocol.errors import PeerGone, UserError
from protocol.roles import Role
from protocol.vm_state import VmState
from services.qemu.snapshot.control import FILE_GIFT
from services.qemu.snapshot.saver import SnapshotStatus

_POLL_SECONDS = 0.05
_OVER = frozenset({SnapshotStatus.SAVED, SnapshotStatus.FAILED, SnapshotStatus.CANCELLED, SnapshotStatus.IN_DOUBT})


async def snapshot(run: ClusterRun, name: str, path: Path, *, force: bool) -> SnapshotJob:
    """Begin to save VM `name` into `path`; returns when that is accepted. Raises UserError, with nothing started."""
    async with run.restarting:
        run.refuse_unready()
        vm = run.vm_named(name)
        await refresh_vm(run, vm)
        refuse_impossible(vm_facts(run, vm), SNAPSHOT)
        qemu = run.child(name, Role.QEMU)
        assert qemu is not None
        job = SnapshotJob(name, SnapshotKind.SAVE, path)
        target = SnapshotTarget(path, run.manifest, replace=force)
        try:
            give_file(qemu, name, target.fd)
            await qemu.order("snapshot.save", {})
        except BaseException:
            # One that is held up may hear it yet: nobody would ever end that snapshot.
            _tell(run, qemu, "snapshot.cancel")
            target.close()
            raise
        job.phase, vm.snapshot = SnapshotPhase.SAVING, job
    run.log.info("snapshot", vm=name, file=str(path))
    run.nursery.start_soon(_carry_out, run, vm, job, target, qemu)
    return job


async def cancel_snapshot(run: ClusterRun, name: str) -> None:
    """Have a VM that is being saved go on; raises UserError when none is, or too late."""
    vm = run.vm_named(name)
    if vm.snapshot is None or vm.snapshot.kind is not SnapshotKind.SAVE:
        raise UserError(f"{name} is not being saved")
    if vm.snapshot.phase is not SnapshotPhase.SAVING:
        raise UserError(f"too late: {name} is in {vm.snapshot.path} already")
    qemu = run.child(name, Role.QEMU)
    assert qemu is not None
    await qemu.order("snapshot.cancel", {})


def snapshot_info(run: ClusterRun, name: str) -> SnapshotFacts:
    """Of the snapshot or restore that is under way, or of the last one; raises UserError when there was none."""
    vm = run.vm_named(name)
    facts = vm.last_snapshot if vm.snapshot is None else vm.snapshot.facts()
    if facts is None:
        raise UserError(f"{name} was neither saved nor restored since the cluster was started")
    return facts


# -- carrying out ---------------------------------------------------------------------------------------------


async def _carry_out(run: ClusterRun, vm: VmRecord, job: SnapshotJob, target: SnapshotTarget, qemu: Child) -> None:
    try:
        await _follow(run, vm, job, target, qemu)
        if run.stopping:
            return
        await _end(run, vm, job, target)
    finally:
        target.close()


async def _follow(run: ClusterRun, vm: VmRecord, job: SnapshotJob, target: SnapshotTarget, qemu: Child) -> None:
    """Until its qemu says how it ended, or is gone."""
    while not run.stopping and not vm.lost and qemu.is_running:
        job.note(await ask(qemu, "snapshot.status", {}))
        if job.status in _OVER:
            return
        if job.status == SnapshotStatus.WRITTEN and job.phase is SnapshotPhase.SAVING:
            _publish(run, job, target, qemu)
        await trio.sleep(_POLL_SECONDS)


def _publish(run: ClusterRun, job: SnapshotJob, target: SnapshotTarget, qemu: Child) -> None:
    try:
        target.publish()
    except UserError as error:
        job.publish_error = str(error)
        _tell(run, qemu, "snapshot.cancel")
        return
    job.phase = SnapshotPhase.COMMITTING
    _tell(run, qemu, "snapshot.commit")


def _tell(run: ClusterRun, qemu: Child, what: str) -> None:
    """A qemu that is held up hears it when it goes on."""
    try:
        qemu.tell(what, {})
    except PeerGone as gone:
        run.log.error("not told", process=qemu.target, what=what, reason=gone.state)


async def _end(run: ClusterRun, vm: VmRecord, job: SnapshotJob, target: SnapshotTarget) -> None:
    name, committing = vm.spec.name, job.phase is SnapshotPhase.COMMITTING
    if job.status == SnapshotStatus.SAVED:
        await switch_off(run, vm, f"saved in {job.path}")
        finish(vm, job, SnapshotPhase.DONE)
        run.report(f"{name} is saved in {job.path}, and off", vm=name)
        return
    if committing and job.status not in (SnapshotStatus.FAILED, SnapshotStatus.CANCELLED):
        reason = job.reason or vm.reason or "its processes ended"
        await switch_off(run, vm, f"it may be saved in {job.path}")
        finish(vm, job, SnapshotPhase.IN_DOUBT, f"{reason}; {job.path} is whole, and `pefbox restore` will tell")
        return
    target.take_back()
    cancelled = job.status == SnapshotStatus.CANCELLED and not job.publish_error
    reason = "cancelled" if cancelled else job.publish_error or await full_reason(run, vm, job)
    finish(vm, job, SnapshotPhase.CANCELLED if cancelled else SnapshotPhase.FAILED, reason)
    run.report(f"{name} was not saved: {reason}", vm=name)


# -- what a restore does too ----------------------------------------------------------------------------------


async def full_reason(run: ClusterRun, vm: VmRecord, job: SnapshotJob) -> str:
    """Why it failed, with what the ultravisor has against it: qemu does not hear its reason."""
    reason = job.reason or vm.reason or "its processes ended"
    if not job.progress.get("secure"):
        return reason
    answer = await ask(run.child(vm.spec.host, Role.ULTRAVISOR), "migration.status", {"vm": vm.spec.name})
    refusal = answer.get("refusal") if isinstance(answer, dict) else None
    return f"{reason}; {printable(refusal)}" if isinstance(refusal, str) and refusal else reason


async def switch_off(run: ClusterRun, vm: VmRecord, reason: str) -> None:
    """The VM is off for this reason, unless it has failed already; returns when none of its processes is left."""
    end_vm(run, vm, VmEnd(VmState.OFF, reason))
    await end_all(run.vm_children(vm.spec.name))


def finish(vm: VmRecord, job: SnapshotJob, phase: SnapshotPhase, reason: str = "") -> None:
    """It is over; other orders may come."""
    job.end(phase, reason)
    vm.last_snapshot, vm.snapshot = job.facts(), None


def give_file(qemu: Child, vm: str, fd: int) -> None:
    """The file of the snapshot; raises UserError."""
    try:
        qemu.channel.send(control.Gift(FILE_GIFT, vm, Role.LAUNCHER.value), [fd])
    except PeerGone as gone:
        raise UserError(f"{gone.peer} is {gone.state}") from None
