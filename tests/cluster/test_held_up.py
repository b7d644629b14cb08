"""Ultravisor, kvm or qemu stand still for a while, again and again, under a VM that works: nothing of it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster
from tests.cluster.chaos_guest import Workload
from tests.cluster.moving import travelling
from tests.cluster.two_hosts import log_lines

HELD_SECONDS = (0.1, 0.3, 0.05, 1.6)
"""Also longer than after which a process counts as one that hangs, and shorter than the two seconds after which the
model kernel gives up a disk: kvm may have been stopped with a doorbell that it had not passed on."""
HELD_QEMU_SECONDS = (0.1, 0.3, 0.05, 1.0)
WORK_SECONDS = 0.2


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_nothing_is_lost_while_a_process_is_held_up(tmp_path: Path, secure: bool) -> None:
    """The guest writes and reads its disk, fills pages and prints; each of its answers is checked."""
    async with travelling(tmp_path, secure=secure) as traveller:
        running, work = traveller.running, Workload(traveller)
        await work.boot()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.pound)
            if secure:
                await hold_up(running, "alpha/ultravisor", HELD_SECONDS)
            await hold_up(running, "alpha/kvm", HELD_SECONDS)
            await hold_up(running, "vm1/qemu", HELD_QEMU_SECONDS)
            work.stop()
        await work.check()

        assert (await traveller.vm.row()).state == "running"
        # Of what it asks of qemu most is a doorbell, which is no call.
        assert open_calls(running, "alpha/ultravisor" if secure else "vm1/guest", "alpha/kvm")
        assert not secure or open_calls(running, "vm1/guest", "alpha/ultravisor")


async def hold_up(running: RunningCluster, target: str, each_seconds: tuple[float, ...]) -> None:
    """Stop a process for so long, and have it go on for a while after each time."""
    process = running.process(target)
    for seconds in each_seconds:
        await trio.sleep(WORK_SECONDS)
        await process.stop()
        await trio.sleep(seconds)
        await process.resume()
        await process.wait_state("running")


def open_calls(running: RunningCluster, caller: str, held: str) -> int:
    """How many calls were open to a process when it was stopped, in all."""
    return sum(line.get("open_calls", 0) for line in log_lines(running, caller) if line.get("peer") == held)
