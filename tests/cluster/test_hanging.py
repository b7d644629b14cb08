"""L1: a service loop that hangs, without any signal, is reported by name in 2 s, and the machine goes on afterwards."""

from __future__ import annotations

import functools
from pathlib import Path

import trio

from deploy.api import RunningCluster
from tests.cluster.losing import NOTICE_SECONDS
from tests.cluster.two_hosts import VM_OF, log_lines, peers_of, pids, running_hosts, until

HANGING = "tests.cluster.hanging.{role}"
HANG_SECONDS = 3.5
"""Longer than it takes to notice, shorter than the ultravisor's patience with a silent kvm."""


async def test_each_of_eight_processes_hangs_is_noticed_and_goes_on(tmp_path: Path) -> None:
    async with running_hosts(tmp_path, service_module=HANGING) as running:
        before = await pids(running)
        for target in before:
            await check_hang(running, target)
        assert await pids(running) == before
        for vm in VM_OF.values():
            assert (await running.vm(vm).secure()).state == "running"
            answer = await running.vm(vm).console_command("pages")
            assert answer.startswith("ok ")


async def check_hang(running: RunningCluster, target: str) -> None:
    """While `target` hangs, `status` and each peer's log name it; afterwards everybody knows that it is back."""
    host = next(host for host, vm in VM_OF.items() if target.partition("/")[0] in (host, vm))
    peers = peers_of(target, host)
    seen = {peer: len(log_lines(running, peer)) for peer in peers}

    async def told(event: str, seconds: float) -> None:
        for peer in peers:
            lines = functools.partial(log_lines, running, peer)
            await until(
                lambda lines=lines, old=seen[peer]: any(  # type: ignore[misc]
                    line.get("peer") == target and line["event"] == event for line in lines()[old:]
                ),
                f"{peer} logs {event} of {target}",
                seconds,
            )

    process = running.process(target)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.query, "hang", {"seconds": HANG_SECONDS}, HANG_SECONDS + 5)
        with trio.fail_after(NOTICE_SECONDS):
            await process.wait_state("unresponsive")
            await told("peer lost", NOTICE_SECONDS)
    await process.wait_state("running")
    await told("peer is up again", NOTICE_SECONDS)
