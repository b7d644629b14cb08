"""Restarting a VM or a host: the next incarnation, with new processes, keys and zeroed RAM, and the same lpid."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio

from deploy import plan
from deploy.child import Child
from deploy.cluster_run import ClusterRun, OpenFiles, VmRecord
from deploy.health import wait_until_started
from deploy.operations import RESTART, refuse_impossible
from deploy.plan import KeyRing, LinkPlan
from deploy.start import (
    configure,
    entry_of,
    file_keys,
    hand_over_keys,
    make_keys,
    open_process_files,
    prepare_vms,
    replace_network_links,
    spawn_all,
    start_group,
    start_time_limit,
)
from deploy.supervise import end_child, fail_vm
from deploy.vm_description import vm_facts
from protocol import control
from protocol.errors import PeerGone, PefboxError, UserError
from protocol.roles import Role

_BARRIER_SECONDS = 5.0
_REMOVE_SECONDS = 10.0
"""The ultravisor gives a guest that does not let go of secure memory some 4 s until it is dead."""


async def restart(run: ClusterRun, name: str) -> None:
    """Restart the VM or host `name`; raises UserError when that is not possible now."""
    async with run.restarting:
        if run.stopping or not run.healthy:
            raise UserError("the cluster is starting or stopping")
        if name in run.vms:
            await _restart_vm(run, run.vms[name])
        elif name in run.hosts:
            await _restart_host(run, name)
        else:
            known = ", ".join([*run.vms, *run.hosts])
            raise UserError(f'no VM or host "{name}"; there are: {known}')


async def _restart_vm(run: ClusterRun, vm: VmRecord) -> None:
    refuse_impossible(vm_facts(run, vm), RESTART)
    keepers = [_keeper(run, vm, role) for role in (Role.ULTRAVISOR, Role.KVM)]
    vm.being_removed = True
    try:
        await _end_all(run.vm_children(vm.spec.name))
        for keeper in keepers:
            await _remove_vm(keeper, vm.spec.name)
    finally:
        vm.being_removed = False
    old_links = plan.vm_links(run.paths, vm.spec.host, vm.spec.name, vm.incarnation)
    for link in old_links + _network_links(run, {vm.spec.name: vm.incarnation}):
        shutil.rmtree(link.directory, ignore_errors=True)
    with _failing(run, [vm]):
        await _start_vm(run, vm, keepers)
        await wait_until_started(run, [vm])


async def _start_vm(run: ClusterRun, vm: VmRecord, keepers: list[Child]) -> None:
    name = vm.spec.name
    processes = plan.vm_processes(vm.spec)
    links = plan.vm_links(run.paths, vm.spec.host, name, vm.incarnation + 1)
    links += _network_links(run, {name: vm.incarnation + 1})
    children = spawn_all(run, processes, links)
    with start_time_limit(children), OpenFiles() as files:
        prepare_vms(run, [name], files)
        open_process_files(run, processes, files)
        ring = make_keys(links)
        await configure(run, children, ring, files)
        for keeper in keepers:
            _add_vm(run, keeper, vm, ring, files)
        for keeper in keepers:
            await _barrier(keeper)
        replace_network_links(run, children, links, ring)
        await hand_over_keys(run, children, ring)


def _add_vm(run: ClusterRun, keeper: Child, vm: VmRecord, ring: KeyRing, files: OpenFiles) -> None:
    names = plan.vm_descriptors(keeper.plan.role, vm.spec)
    packet = control.AddVm(entry_of(run, vm.spec.name), ring.entries(keeper.target), ring.keys(keeper.target), names)
    keeper.channel.send(packet, [files[key] for key in file_keys(keeper.plan, names)])


async def _restart_host(run: ClusterRun, name: str) -> None:
    keepers = [run.child(name, role) for role in (Role.ULTRAVISOR, Role.KVM)]
    if all(keeper is not None and keeper.is_running for keeper in keepers):
        raise UserError(f"{name}: its ultravisor and kvm both live; restart its VMs one by one")
    host = run.hosts[name]
    vms = [vm for vm in run.vms.values() if vm.spec.host == name]
    await _end_all(run.host_children(name))
    for child in run.host_children(name):
        shutil.rmtree(run.paths.process_dir(child.target), ignore_errors=True)
    host.incarnation += 1
    links = [plan.host_link(run.paths, name, host.incarnation)]
    processes = plan.host_processes(name)
    for vm in vms:
        links += plan.vm_links(run.paths, name, vm.spec.name, vm.incarnation + 1)
        processes += plan.vm_processes(vm.spec)
    links += _network_links(run, {vm.spec.name: vm.incarnation + 1 for vm in vms})
    with _failing(run, vms):
        await start_group(run, processes, [vm.spec.name for vm in vms], links)
        await wait_until_started(run, vms)


def _network_links(run: ClusterRun, incarnations: dict[str, int]) -> list[LinkPlan]:
    """The links between the VMs of `incarnations` and with all others that run now."""
    others = {vm.spec.name: vm.incarnation for vm in run.vms.values() if _is_linkable(run, vm.spec.name)}
    ends = {f"{vm}/{Role.QEMU.value}" for vm in incarnations}
    links = plan.network_links(run.paths, run.cluster, {**others, **incarnations})
    return [link for link in links if link.upper in ends or link.lower in ends]


def _is_linkable(run: ClusterRun, vm: str) -> bool:
    qemu = run.child(vm, Role.QEMU)
    return qemu is not None and qemu.is_running and qemu.has_keys


def _keeper(run: ClusterRun, vm: VmRecord, role: Role) -> Child:
    keeper = run.child(vm.spec.host, role)
    assert keeper is not None
    return keeper


async def _remove_vm(keeper: Child, vm: str) -> None:
    try:
        await keeper.remove_vm(vm, _REMOVE_SECONDS)
    except PeerGone as gone:
        raise UserError(f"{keeper.target} does not let go of {vm}: it is {gone.state}") from None


async def _barrier(keeper: Child) -> None:
    """Returns when the process has taken everything sent to it so far."""
    with trio.move_on_after(_BARRIER_SECONDS) as scope:
        await keeper.ping().wait()
    if scope.cancelled_caught:
        raise UserError(f"{keeper.target} did not answer within {_BARRIER_SECONDS:g} s")
    if not keeper.is_running:
        raise UserError(f"{keeper.target} is {keeper.state.value} ({keeper.detail})")


async def _end_all(children: Iterable[Child]) -> None:
    async with trio.open_nursery() as nursery:
        for child in children:
            if child.is_running:
                nursery.start_soon(end_child, child, 0.0)


@contextmanager
def _failing(run: ClusterRun, vms: list[VmRecord]) -> Iterator[None]:
    """A start that breaks off leaves its VMs failed, with nothing of them running."""
    try:
        yield
    except PefboxError as error:
        for vm in vms:
            fail_vm(run, vm, str(error))
        raise
