"""Ultravisor and kvm stand still for a while, again and again, under a VM that works: nothing of it is lost."""

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


@pytest.mark.parametrize(
    ("role", "secure"),
    [("ultravisor", True), ("kvm", True), ("kvm", False)],
    ids=["ultravisor", "kvm", "kvm of a normal VM"],
)
async def test_nothing_is_lost_while_a_process_of_the_host_is_held_up(tmp_path: Path, role: str, secure: bool) -> None:
    """The guest writes and reads its disk, fills pages and prints; each of its answers is checked."""
    async with travelling(tmp_path, secure=secure) as traveller:
        running, work = traveller.running, Workload(traveller)
        await work.boot()
        held = running.process(f"alpha/{role}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.pound)
            for seconds in HELD_SECONDS:
                await trio.sleep(WORK_SECONDS)
                await held.stop()
                await trio.sleep(seconds)
                await held.resume()
                await held.wait_state("running")
            work.stop()
        await work.check()

        caller = "alpha/ultravisor" if role == "kvm" and secure else "vm1/guest"
        open_calls = [
            line.get("open_calls", 0) for line in log_lines(running, caller) if line.get("peer") == held.target
        ]
        assert sum(open_calls), "no call was open when it was stopped"
        assert (await traveller.vm.row()).state == "running"
