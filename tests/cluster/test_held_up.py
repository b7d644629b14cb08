"""Ultravisor, kvm or qemu stand still for a while, again and again, under a VM that works: nothing of it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.cluster.chaos_guest import Workload
from tests.cluster.moving import travelling
from tests.cluster.two_hosts import log_lines

HELD_SECONDS = (0.1, 0.3, 0.05, 2.0, 0.2, 0.1)
"""Also longer than after which a process counts as one that hangs."""
WORK_SECONDS = 0.2
QEMU_SECONDS = 1.0
"""A qemu is held no longer: the model kernel gives up a disk that does not answer within two seconds."""


@pytest.mark.parametrize(
    ("target", "caller", "secure"),
    [
        ("alpha/ultravisor", "vm1/guest", True),
        ("alpha/kvm", "alpha/ultravisor", True),
        ("alpha/kvm", "vm1/guest", False),
        ("vm1/qemu", None, True),
    ],
    ids=["ultravisor", "kvm", "kvm of a normal VM", "qemu"],
)
async def test_nothing_is_lost_while_a_process_is_held_up(
    tmp_path: Path, target: str, caller: str | None, secure: bool
) -> None:
    """The guest writes and reads its disk, fills pages and prints; each of its answers is checked."""
    async with travelling(tmp_path, secure=secure) as traveller:
        running, work = traveller.running, Workload(traveller)
        await work.boot()
        held = running.process(target)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.pound)
            for seconds in HELD_SECONDS:
                await trio.sleep(WORK_SECONDS)
                await held.stop()
                await trio.sleep(min(seconds, QEMU_SECONDS) if target == "vm1/qemu" else seconds)
                await held.resume()
                await held.wait_state("running")
            work.stop()
        await work.check()

        assert (await traveller.vm.row()).state == "running"
        # Most of what a guest asks of qemu is a doorbell, which is no call.
        if caller is not None:
            lines = log_lines(running, caller)
            open_calls = [line.get("open_calls", 0) for line in lines if line.get("peer") == held.target]
            assert sum(open_calls), "no call was open when it was stopped"
