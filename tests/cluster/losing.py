"""Losing one process of a cluster at a moment when every peer that calls it has a call open to it.

So that such a call stays open, the launcher is held for an instant: what a peer sends to the lost process meanwhile
ends only when the launcher tells the peer. Times count from the signal all the same.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import trio

from deploy.api import RunningCluster
from deploy.qmp_client import execute
from protocol.errors import HostFault, UserError
from tests.cluster.two_hosts import N_PAGES, VM_OF, OpenCalls, log_lines, peers_of, pids, process_state, until
from tests.cluster.vm_files import console_end, console_until

NOTICE_SECONDS = 2.0
_HOLD_SECONDS = 1.5
_SURELY_LOST_NS = 1_000_000
"""After a signal a process may run on for some microseconds."""
_RECORD_WRITTEN_NS = 700_000_000
"""Later than that after a reply it is in the record."""
OPEN_CALLS = {
    ("ultravisor", "kvm"): "UV_PAGE_OUT",
    ("ultravisor", "guest"): "H_CEDE",
    ("kvm", "ultravisor"): "H_CPPR",
    ("kvm", "qemu"): "VM_STOP",
    ("guest", "ultravisor"): "MAP_INVALIDATE",
    ("guest", "kvm"): "VCPU_STOP",
    ("qemu", "kvm"): "EXIT_RTAS",
}
"""(lost role, peer's role) -> the call of the peer that is open. The guest of a secure VM has none open to kvm."""


@dataclass(slots=True)
class Lost:
    """What came of losing a process."""

    seconds: dict[str, float] = field(default_factory=dict)
    """For `status` and each peer's log: how long after the signal it named the process."""
    open_calls: dict[str, int] = field(default_factory=dict)
    """For each peer: how many of its calls were open and ended, as it logged."""
    results: dict[str, Any] = field(default_factory=dict)
    """What came of `page.out` (how often each code) and of QMP `stop` (the error)."""


class Loss:
    """Loses one process of a running cluster while its peers have calls open to it."""

    def __init__(self, running: RunningCluster, host: str, target: str, number: signal.Signals) -> None:
        self._running, self._host, self._target, self._number = running, host, target, number
        self._role = target.partition("/")[2]
        self._vm = running.vm(VM_OF[host])
        self._state = "failed" if number is signal.SIGKILL else "stopped"
        self._lost = Lost()
        self._monitor = ""

    async def run(self) -> Lost:
        """Do it; returns when `status` and every peer named the process."""
        row = await self._vm.row()
        assert row.qmp is not None
        self._monitor = row.qmp
        processes = await pids(self._running)
        pid, guest_pid = processes[self._target], processes[f"{self._vm.name}/guest"]
        peers = peers_of(self._target, self._host)
        logged = {peer: len(log_lines(self._running, peer)) for peer in peers}
        async with trio.open_nursery() as nursery:
            await self._begin_work(nursery)
            with held_launcher(self._running):
                os.kill(pid, self._number)
                start, start_s, start_ns = trio.current_time(), time.time(), time.monotonic_ns()
                if self._role == "qemu":
                    os.kill(guest_pid, signal.SIGCONT)
                if self._role in ("kvm", "guest"):
                    nursery.start_soon(self._stop_vm)
                await self._calls_open(peers, start_ns)
            await self._running.process(self._target).wait_state(self._state)
            self._lost.seconds["status"] = trio.current_time() - start
            for peer in peers:
                await self._peer_knows(peer, logged[peer], start_s)
        return self._lost

    async def _begin_work(self, nursery: trio.Nursery) -> None:
        """Have the machine do what makes calls to the process that will be lost."""
        if self._role == "kvm":
            await self._type("null 5000\r")
        elif self._role == "qemu":
            await self._have_reboot_typed()
        else:
            await self._move("page.in")
            nursery.start_soon(self._page_out)
            await self._until_paging()

    async def _type(self, text: str) -> None:
        """Returns when the guest has begun to obey the first line."""
        since = await console_end(self._vm)
        await self._vm.console_write(text.encode())
        await console_until(self._vm, text.partition("\r")[0] + "\r\n", since=since)

    async def _have_reboot_typed(self) -> None:
        """The guest stands still until the process is lost, so that its call comes after that."""
        guest = self._running.process(f"{self._vm.name}/guest")
        await guest.stop()
        await guest.wait_state("stopped")
        await self._vm.console_write(b"reboot\r")

    async def _page_out(self) -> None:
        self._lost.results["page.out"] = await self._move("page.out")

    async def _move(self, query: str) -> dict[str, int]:
        arguments = {"vm": self._vm.name, "gpa": 0, "n": N_PAGES}
        answer = await self._running.process(f"{self._host}/kvm").query(query, arguments, 10.0)
        codes: dict[str, int] = answer["codes"]
        return codes

    async def _until_paging(self) -> None:
        kvm = self._running.process(f"{self._host}/kvm")
        with trio.fail_after(5):
            while True:
                links = await kvm.query("statistics")
                if any(":ultravisor-kvm." in link and of["open_calls"] for link, of in links.items()):
                    return

    async def _stop_vm(self) -> None:
        try:
            await trio.to_thread.run_sync(execute, self._monitor, "stop")
            self._lost.results["stop"] = None
        except (UserError, HostFault) as error:
            self._lost.results["stop"] = str(error)

    async def _calls_open(self, peers: list[str], lost_ns: int) -> None:
        for peer in peers:
            wanted = OPEN_CALLS.get((self._role, peer.partition("/")[2]))
            if wanted is not None:
                await _until_open(OpenCalls(self._running, peer, self._target), wanted, lost_ns)

    async def _peer_knows(self, peer: str, n_lines: int, start_s: float) -> None:
        def named() -> list[dict[str, Any]]:
            lines = log_lines(self._running, peer)[n_lines:]
            return [line for line in lines if line.get("peer") == self._target and "open_calls" in line]

        await until(lambda: any(line["event"] == "peer lost" for line in named()), f"{peer} names {self._target}")
        lines = named()
        lost = next(line for line in lines if line["event"] == "peer lost")
        assert lost["state"] == self._state
        self._lost.seconds[peer] = logged_at(lost) - start_s
        self._lost.open_calls[peer] = max(line["open_calls"] for line in lines)


def logged_at(line: dict[str, Any]) -> float:
    """When a line was logged, in seconds since the epoch."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


async def _until_open(calls: OpenCalls, wanted: str, lost_ns: int) -> None:
    """Returns when `wanted` is open for good: sent after the loss, or still open in a record written after it."""

    def stays_open() -> bool:
        written = time.monotonic_ns() > lost_ns + _RECORD_WRITTEN_NS
        return wanted in calls.names(0 if written else lost_ns + _SURELY_LOST_NS)

    await until(stays_open, f"{calls.caller} has {wanted} open", _HOLD_SECONDS)


@contextmanager
def held_launcher(running: RunningCluster) -> Iterator[None]:
    """The launcher notices nothing while the block runs."""
    os.kill(running.launcher_pid, signal.SIGSTOP)
    try:
        while process_state(running.launcher_pid) != "T":
            os.sched_yield()
        yield
    finally:
        os.kill(running.launcher_pid, signal.SIGCONT)


def check_noticed(target: str, lost: Lost) -> None:
    """Status and every peer named the process in time, and the calls that were open have ended."""
    late = {who: seconds for who, seconds in lost.seconds.items() if seconds > NOTICE_SECONDS}
    assert not late, f"{target}: {late}"
    for peer, n_calls in lost.open_calls.items():
        expected = OPEN_CALLS.get((target.partition("/")[2], peer.partition("/")[2]))
        assert n_calls or expected is None, f"{target}: {peer} had no call open: {lost.open_calls}"
    if "stop" in lost.results:
        assert lost.results["stop"], f"{target}: QMP stop was answered as if nothing had happened"
    if "page.out" in lost.results:
        assert set(lost.results["page.out"]) > {"H_SUCCESS"}, f"{target}: {lost.results}"
