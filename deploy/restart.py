"""Restarting a VM or a host: the next incarnation, with new processes, keys and zeroed RAM, and the same lpid."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from deploy import plan
from deploy.cluster_run import ClusterRun, OpenFiles, VmRecord
from deploy.health import wait_until_started
from deploy.keepers import add_vm, end_all, keepers_of, network_links, remove_directories, remove_vm
from deploy.operations import RESTART, refuse_impossible
from deploy.start import (
    configure,
    hand_over_keys,
    make_keys,
    open_process_files,
    prepare_vms,
    replace_network_links,
    spawn_all,
    start_group,
    start_time_limit,
)
from deploy.supervise import fail_vm
from deploy.vm_description import vm_facts
from protocol.errors import PefboxError, UserError
from protocol.roles import Role


async def restart(run: ClusterRun, name: str) -> None:
    """Restart the VM or host `name`; raises UserError when that is not possible now."""
    async with run.restarting:
        run.refuse_unready()
        if name in run.vms:
            await _restart_vm(run, run.vms[name])
        elif name in run.hosts:
            await _restart_host(run, name)
        else:
            known = ", ".join([*run.vms, *run.hosts])
            raise UserError(f'no VM or host "{name}"; there are: {known}')


async def _restart_vm(run: ClusterRun, vm: VmRecord) -> None:
    refuse_impossible(vm_facts(run, vm), RESTART)
    await end_incarnation(run, vm)
    with _failing(run, [vm]):
        await start_incarnation(run, vm)
        await wait_until_started(run, [vm])


async def end_incarnation(run: ClusterRun, vm: VmRecord) -> None:
    """End what runs of a VM, and have its host forget it; raises UserError when that does not let go."""
    name, host = vm.spec.name, vm.spec.host
    vm.being_removed = True
    try:
        await end_all(run.vm_children(name))
        for keeper in keepers_of(run, host):
            await remove_vm(keeper, name)
    finally:
        vm.being_removed = False
    remove_directories(plan.vm_links(run.paths, host, name, vm.incarnation))
    remove_directories(network_links(run, {name: vm.incarnation}))


async def start_incarnation(run: ClusterRun, vm: VmRecord) -> None:
    """Start the processes of its next one. Raises PefboxError."""
    name, host = vm.spec.name, vm.spec.host
    processes = plan.vm_processes(vm.spec, vm.move)
    incarnation = vm.newest + 1
    links = plan.vm_links(run.paths, host, name, incarnation) + network_links(run, {name: incarnation})
    children = await spawn_all(run, processes, links)
    with start_time_limit(children), OpenFiles() as files:
        prepare_vms(run, [name], files)
        await open_process_files(run, processes, files)
        ring = make_keys(links)
        await configure(run, children, ring, files)
        await add_vm(run, host, name, ring, files)
        replace_network_links(run, children, links, ring)
        await hand_over_keys(run, children, ring)


async def _restart_host(run: ClusterRun, name: str) -> None:
    keepers = [run.child(name, role) for role in (Role.ULTRAVISOR, Role.KVM)]
    if all(keeper is not None and keeper.is_running for keeper in keepers):
        raise UserError(f"{name}: its ultravisor and kvm both live; restart its VMs one by one")
    _refuse_while_moving(run, name)
    host = run.hosts[name]
    vms = [vm for vm in run.vms.values() if vm.spec.host == name]
    await end_all(run.host_children(name))
    for child in run.host_children(name):
        shutil.rmtree(run.paths.process_dir(child.plan.place), ignore_errors=True)
    host.incarnation += 1
    links = [plan.host_link(run.paths, name, host.incarnation)]
    processes = plan.host_processes(name)
    for vm in vms:
        links += plan.vm_links(run.paths, name, vm.spec.name, vm.newest + 1)
        processes += plan.vm_processes(vm.spec, vm.move)
    links += network_links(run, {vm.spec.name: vm.newest + 1 for vm in vms})
    with _failing(run, vms):
        try:
            await start_group(run, processes, [vm.spec.name for vm in vms], links)
        except PefboxError:
            # A host with half of what it needs could neither be used nor restarted.
            await end_all(run.host_children(name))
            raise
        await wait_until_started(run, vms)


def _refuse_while_moving(run: ClusterRun, host: str) -> None:
    """A VM in doubt does not keep the host where it may have arrived from coming back: its word may be needed."""
    for vm in run.vms.values():
        if vm.snapshot is not None and vm.spec.host == host:
            raise UserError(f"{host}: {vm.spec.name} is just being saved or restored")
    for vm in run.moving(host):
        assert vm.migration is not None
        if vm.in_doubt and host == vm.migration.host:
            continue
        what = f"pefbox recover {vm.spec.name}" if vm.in_doubt else f"pefbox migrate {vm.spec.name} --cancel"
        way = f"from {vm.migration.source} to {vm.migration.host}"
        raise UserError(f"{host}: {vm.spec.name} is on its way {way}: {what}")


@contextmanager
def _failing(run: ClusterRun, vms: list[VmRecord]) -> Iterator[None]:
    """A start that breaks off leaves its VMs failed, with nothing of them running."""
    try:
        yield
    except PefboxError as error:
        for vm in vms:
            # What ended it before is no longer the reason, and new processes of it may run.
            vm.lost = False
            fail_vm(run, vm, str(error))
        raise
