"""What ultravisor and kvm of a host are told of single VMs, and the links between VMs, while all else goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping

import trio

from deploy import plan
from deploy.child import Child
from deploy.cluster_run import ClusterRun, OpenFiles
from deploy.plan import KeyRing, LinkPlan
from deploy.start import entry_of, file_keys
from deploy.supervise import end_child
from protocol import control
from protocol.errors import PeerGone, UserError
from protocol.roles import Role

_BARRIER_SECONDS = 5.0
_REMOVE_SECONDS = 10.0
"""The ultravisor gives a guest that does not let go of secure memory some 4 s until it is dead."""


def keepers_of(run: ClusterRun, host: str) -> list[Child]:
    """Ultravisor and kvm of a host: who a VM is taken from first comes first."""
    found = [run.child(host, role) for role in (Role.ULTRAVISOR, Role.KVM)]
    keepers = [keeper for keeper in found if keeper is not None]
    assert len(keepers) == len(found)
    return keepers


async def add_vm(run: ClusterRun, host: str, vm: str, ring: KeyRing, files: OpenFiles) -> None:
    """Tell the keepers of `host` of a VM; returns when they have taken it. Raises UserError."""
    record = run.vms[vm]
    keepers = keepers_of(run, host)
    for keeper in keepers:
        names = plan.vm_descriptors(keeper.plan.role, record.spec)
        packet = control.AddVm(entry_of(run, vm, host), ring.entries(keeper.plan), ring.keys(keeper.plan), names)
        keeper.channel.send(packet, [files[key] for key in file_keys(keeper.plan, names)])
    for keeper in keepers:
        await _barrier(keeper)


async def remove_vm(keeper: Child, vm: str) -> None:
    """Have a keeper forget a VM; raises UserError when it does not."""
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


async def end_all(children: Iterable[Child]) -> None:
    """End processes, all at once; returns when the kernel reported the end of each."""
    async with trio.open_nursery() as nursery:
        for child in children:
            if child.is_running:
                nursery.start_soon(end_child, child, 0.0)


def network_links(run: ClusterRun, incarnations: Mapping[str, int]) -> list[LinkPlan]:
    """The links between the VMs of `incarnations` and with all others that run now."""
    others = {vm.spec.name: vm.incarnation for vm in run.vms.values() if _is_linkable(run, vm.spec.name)}
    moves = {vm.spec.name: vm.move for vm in run.vms.values()}
    ends = {f"{vm}/{Role.QEMU.value}" for vm in incarnations}
    links = plan.network_links(run.paths, run.cluster, {**others, **incarnations}, moves)
    return [link for link in links if link.upper in ends or link.lower in ends]


def _is_linkable(run: ClusterRun, vm: str) -> bool:
    qemu = run.child(vm, Role.QEMU)
    return qemu is not None and qemu.is_running and qemu.has_keys


def remove_directories(links: Iterable[LinkPlan]) -> None:
    """Those that links were bound in."""
    for link in links:
        shutil.rmtree(link.directory, ignore_errors=True)


def remove_traces(run: ClusterRun, child: Child) -> None:
    """What a process that has ended leaves: its run directory, and a file of errors that holds none."""
    shutil.rmtree(run.paths.process_dir(child.plan.place), ignore_errors=True)
    errors = run.paths.stderr_file(child.plan.place)
    if child.plan.move and errors.exists() and not errors.stat().st_size:
        errors.unlink()
