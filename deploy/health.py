"""Waiting until the VMs that were started run."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from deploy.cluster_run import ClusterRun, VmRecord
from deploy.start import StartFailed
from deploy.status import refresh
from protocol.vm_state import VmState

HEALTHY_SECONDS = 15.0
_POLL_SECONDS = 0.02


async def wait_until_started(run: ClusterRun, vms: Iterable[VmRecord]) -> None:
    """Returns when every one of `vms` has left `starting`; raises StartFailed when one failed or takes too long.

    A guest that has given up by itself meanwhile, with its processes alive, was started.
    """
    waiting = list(vms)
    with trio.move_on_after(HEALTHY_SECONDS):
        while True:
            await refresh(run)
            for vm in waiting:
                if vm.state is VmState.FAILED and vm.lost:
                    raise StartFailed(f"{vm.spec.name} failed: {vm.reason}")
            waiting = [vm for vm in waiting if vm.state is VmState.STARTING]
            if not waiting:
                return
            await trio.sleep(_POLL_SECONDS)
    late = ", ".join(vm.spec.name for vm in waiting)
    raise StartFailed(f"still starting after {HEALTHY_SECONDS:g} s: {late}")
