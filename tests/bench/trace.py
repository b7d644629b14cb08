"""`trace_off`, `trace_on`: what the taps of the trace cost a null hypercall, while nobody records and while all do."""

from __future__ import annotations

import statistics
import time

from deploy.api import Process, RunningCluster
from deploy.trace.reader import FrameReader
from protocol.hcalls import H_IPOLL
from protocol.wire import decode
from services.runtime.tracer import Tap
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.machine import CLUSTERS, job, running

N_CALLS = 500
N_LOOKS = 1_000_000
"""How often the tap that is off is passed to time it."""
PAIRS_A_ROUND = 2
OFF_LIMIT = 1.02
ON_LIMIT = 1.15
_NS_PER_US = 1000
_PROCESSES = {
    "plain": ("plain/guest", "alpha/kvm"),
    "svm": ("svm/guest", "alpha/ultravisor", "alpha/kvm"),
}
"""Those that a hypercall of each VM passes."""


class _End:
    """As much of a link's end as a tap that is off needs."""

    def __init__(self) -> None:
        self.tap: Tap | None = None

    def pass_taps(self, n: int) -> int:
        """Pass `n` taps; how long it took, in ns."""
        started_ns = time.perf_counter_ns()
        for _ in range(n):
            tap = self.tap
            if tap is not None:
                tap(True, ())
        return time.perf_counter_ns() - started_ns

    def pass_nothing(self, n: int) -> int:
        """The loop itself."""
        started_ns = time.perf_counter_ns()
        for _ in range(n):
            pass
        return time.perf_counter_ns() - started_ns


async def measure(n_rounds: int) -> list[Figure]:
    """Pairs of slices in one cluster, in which recording is switched by the order that commands give."""
    async with running(CLUSTERS / "calls.toml") as machine:
        await machine.vm("svm").secure()
        await machine.vm("plain").wait_state("running")
        pairs = {vm: await _pairs(machine, vm, PAIRS_A_ROUND * n_rounds) for vm in _PROCESSES}
        n_taps = _taps_of_one_call(machine)
    off_ns = [_tap_ns() * n_taps for _ in pairs["plain"]]
    alone_us = [pair.floor for pair in pairs["plain"] if pair.floor is not None]
    off = [Round(us + ns / _NS_PER_US, us) for us, ns in zip(alone_us, off_ns, strict=True)]
    return [
        Figure("trace_off", "us", off, Budget(Kind.RATIO_AT_MOST, OFF_LIMIT)),
        Figure("trace_off_taps", "ns", [Round(ns) for ns in off_ns]),
        Figure("trace_on", "us", pairs["plain"], Budget(Kind.RATIO_AT_MOST, ON_LIMIT)),
        Figure("trace_on_svm", "us", pairs["svm"]),
    ]


async def _pairs(machine: RunningCluster, vm: str, n_pairs: int) -> list[Round]:
    """A null hypercall while its processes record, beside one while they do not; each of the two is first in turn."""
    guest = machine.process(f"{vm}/guest")
    processes = [machine.process(target) for target in _PROCESSES[vm]]
    await _median_us(guest)
    pairs = []
    for number in range(n_pairs):
        times_us = {}
        for on in (number % 2 == 0, number % 2 == 1):
            for process in processes:
                await process.query("record", {"on": on}, 5.0)
            times_us[on] = await _median_us(guest)
        pairs.append(Round(times_us[True], times_us[False]))
    for process in processes:
        await process.query("record", {"on": False}, 5.0)
    return pairs


async def _median_us(guest: Process) -> float:
    times_ns: list[int] = await job(guest, "hypercalls", n=N_CALLS)
    return statistics.median(times_ns) / _NS_PER_US


def _taps_of_one_call(machine: RunningCluster) -> float:
    """How often a tap saw a hypercall of `plain` or its reply, for each that the guest made; from the traces."""
    seen = []
    for target in _PROCESSES["plain"]:
        frames = list(FrameReader(machine.paths.trace_file(target)).read())
        of_plain = [frame for frame in frames if frame.link.startswith("plain:")]
        seen.append(sum(decode(frame.frame).number == H_IPOLL.number for frame in of_plain))
    n_calls = seen[0] / 2
    return sum(seen) / n_calls


def _tap_ns() -> float:
    """What one tap costs while it is off."""
    end = _End()
    return max(0.0, (end.pass_taps(N_LOOKS) - end.pass_nothing(N_LOOKS)) / N_LOOKS)
