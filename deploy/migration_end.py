"""The end of a migration: the VM lives where it arrived, or what was started there goes and the VM stays.

Both leave one home and nothing of the other. What does not work while cleaning up is told and does not change that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from deploy import plan
from deploy.child import Child
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.keepers import end_all, keepers_of, network_links, remove_directories, remove_traces, remove_vm
from deploy.link_orders import tell_links
from deploy.migration_record import Migration, Phase
from deploy.plan import ProcessPlan
from deploy.start import lock_disk, make_keys, prepare_links, replace_network_links
from deploy.status import refresh_vm
from deploy.supervise import end_vm, take_news
from protocol.errors import PefboxError
from protocol.roles import Role


async def commit(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    """The VM lives on `move.host`. Its links to other VMs come first: it runs already."""
    name, old_incarnation, old_segment = vm.spec.name, vm.incarnation, vm.segment
    old_networks = network_links(run, {name: old_incarnation})
    move.phase = Phase.COMMITTING
    move.home_end, move.arrival_end = move.arrival_end, None
    earlier = run.settle(vm, move)
    for child in earlier:
        child.exit_expected = True
    tell_links(run)
    _link_networks(run, vm)
    for what, detail in move.notices:
        take_news(vm, what, detail)
    await refresh_vm(run, vm)
    await end_all(earlier)
    _lock_disks(run, vm, move)
    await _remove_from(run, vm, move.source)
    qemu = ProcessPlan(Role.QEMU, move.host, name, vm.move)
    remove_directories([plan.migration_link(run.paths, move.source, qemu), *old_networks])
    remove_directories(plan.vm_links(run.paths, move.source, name, old_incarnation))
    for child in earlier:
        remove_traces(run, child)
    run.drop_segment(old_segment)
    _finish(run, vm, move, Phase.DONE)
    run.report(f"{name} runs on {move.host} now", vm=name)


async def undo(run: ClusterRun, vm: VmRecord, move: Migration, phase: Phase, reason: str) -> None:
    """The VM stays where it is. `phase` says how it ended."""
    move.phase = Phase.UNDOING
    await end_arrival(run, vm, move)
    if move.home_end is None:
        run.report(f"{vm.spec.name} stays on {vm.spec.host}: {reason}", vm=vm.spec.name)
    _finish(run, vm, move, phase, reason)


async def end_arrival(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    """Nothing of the VM is left where it was to arrive; also when there was nothing any more."""
    name = vm.spec.name
    incoming = run.incoming_children(name)
    await end_all(incoming)
    close_disks(move)
    await _remove_from(run, vm, move.host)
    remove_directories(plan.vm_links(run.paths, move.host, name, move.incarnation))
    for child in incoming:
        remove_traces(run, child)
        del run.incoming[child.target]
    if move.segment:
        run.drop_segment(move.segment)
        move.segment = ""


def _finish(run: ClusterRun, vm: VmRecord, move: Migration, phase: Phase, reason: str = "") -> None:
    move.end(phase, reason)
    vm.last_migration, vm.migration = move.facts(), None
    tell_links(run)
    if move.home_end is not None:
        end_vm(run, vm, move.home_end)


def _link_networks(run: ClusterRun, vm: VmRecord) -> None:
    """New links between the VM and the others of its networks, which go on."""
    links = network_links(run, {vm.spec.name: vm.incarnation})
    try:
        prepare_links(run, links)
    except OSError as error:
        run.report(f"{vm.spec.name} is on no network until it is restarted: {error}", vm=vm.spec.name)
        return
    replace_network_links(run, [], links, make_keys(links))


def _lock_disks(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    for disk in move.disks:
        if not lock_disk(disk.fd, readonly=disk.readonly):
            run.report(f"{vm.spec.name}: {disk.path} is in use by another VM or cluster too", vm=vm.spec.name)
    close_disks(move)


def close_disks(move: Migration) -> None:
    """Let go of the disks; qemu has them by descriptors of its own."""
    for disk in move.disks:
        os.close(disk.fd)
    move.disks.clear()


async def _remove_from(run: ClusterRun, vm: VmRecord, host: str) -> None:
    for keeper in _living(keepers_of(run, host)):
        try:
            await remove_vm(keeper, vm.spec.name)
        except PefboxError as error:
            run.log.error("VM not removed", process=keeper.target, vm=vm.spec.name, reason=str(error))


def _living(children: Iterable[Child]) -> list[Child]:
    return [child for child in children if child.is_running]
