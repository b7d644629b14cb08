"""For which side of a VM a process speaks: where it lives, where it arrives, or where its time is over."""

from __future__ import annotations

from enum import Enum

from deploy.child import Child
from deploy.cluster_run import ClusterRun, VmRecord


class Side(Enum):
    """What a process is to a VM."""

    HOME = "home"
    ARRIVAL = "arrival"
    OVER = "over"
    """What it says of the VM is no news: the VM is being removed there."""


def vm_hosts(vm: VmRecord) -> tuple[str, ...]:
    """Where something of the VM is: its home, and both ends of its way while it moves."""
    move = vm.migration
    return (vm.spec.host,) if move is None else (vm.spec.host, move.source, move.host)


def side_of(run: ClusterRun, vm: VmRecord, child: Child) -> Side | None:
    """The side of `vm` that `child` is on; None when it has nothing to say about the VM."""
    host, move = child.plan.host, vm.migration
    if child.plan.vm not in (None, vm.spec.name) or host not in vm_hosts(vm):
        return None
    if host == vm.spec.host:
        if not run.is_current(child):
            return None
        return Side.OVER if vm.being_removed else Side.HOME
    assert move is not None
    return Side.ARRIVAL if move.is_open and host == move.host and run.is_current(child) else Side.OVER
