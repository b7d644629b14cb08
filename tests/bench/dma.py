"""`dma_seq_read`, `dma_rand_read`, `rand_read_qd1`: requests of a guest's disk, and where the time of one goes."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import trio

from deploy.api import RunningCluster, cluster
from deploy.compare.measure import Round as IoRound
from deploy.compare.measure import time_requests, wait_ready
from deploy.trace.reader import FrameReader
from protocol.hcalls import H_LOGICAL_CI_STORE
from protocol.messages import DOORBELL_RUNG
from protocol.wire import MessageKind, decode
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.bench.floors.disk_floor import read_blocks_seconds, read_seconds
from tests.bench.floors.program import FloorProgram
from tests.bench.machine import CLUSTERS, STATE, prepare, running

SEQ = "io read 262144 8 256"
RAND = "io randread 4096 32 4096"
SINGLE = "io randread 4096 1 400"
N_SEQ_BYTES = 64 << 20
BLOCK_BYTES, N_BLOCKS, DEPTH = 4096, 4096, 32
N_SINGLE = 400
SEQ_LIMIT, RAND_LIMIT, SINGLE_LIMIT = 0.15, 0.02, 1.5
_MIB = 1 << 20
_NS_PER_US = 1000
_CLUSTER = CLUSTERS / "dma.toml"


async def measure(n_rounds: int) -> list[Figure]:
    """Guests and floors in turn, over the same files, which all find in the page cache."""
    figures: dict[str, list[Round]] = {name: [] for name in ("seq", "seq_rate", "rand", "rand_rate", "single")}
    state = await trio.to_thread.run_sync(prepare, _CLUSTER)
    svm_disk, plain_disk = state / "svm.img", state / "plain.img"
    offsets = _offsets(svm_disk)
    async with running(_CLUSTER) as machine:
        svm, plain = machine.vm("svm"), machine.vm("plain")
        for vm in (svm, plain):
            await wait_ready(vm)
        seq_floor = functools.partial(read_seconds, svm_disk, N_SEQ_BYTES)
        rand_floor = functools.partial(read_blocks_seconds, svm_disk, BLOCK_BYTES, DEPTH, offsets)
        with FloorProgram("request_floor", str(plain_disk)) as hops:
            for _ in range(n_rounds):
                seq, floor_s = await time_requests(svm, SEQ), await trio.to_thread.run_sync(seq_floor)
                figures["seq"].append(Round(_mib_per_second(seq), N_SEQ_BYTES / _MIB / floor_s))
                figures["seq_rate"].append(Round(seq.requests / seq.ns * 1e9))
                rand, floor_s = await time_requests(svm, RAND), await trio.to_thread.run_sync(rand_floor)
                figures["rand"].append(Round(_mib_per_second(rand), N_BLOCKS * BLOCK_BYTES / _MIB / floor_s))
                figures["rand_rate"].append(Round(rand.requests / rand.ns * 1e9))
                single = await time_requests(plain, SINGLE)
                bare = statistics.median(await trio.to_thread.run_sync(hops.times_ns, N_SINGLE))
                figures["single"].append(Round(single.p50_ns / _NS_PER_US, bare / _NS_PER_US))
    return [
        Figure("dma_seq_read", "MiB/s", figures["seq"], Budget(Kind.RATIO_AT_LEAST, SEQ_LIMIT)),
        Figure("dma_seq_requests", "1/s", figures["seq_rate"]),
        Figure("dma_rand_read", "MiB/s", figures["rand"], Budget(Kind.RATIO_AT_LEAST, RAND_LIMIT)),
        Figure("dma_rand_requests", "1/s", figures["rand_rate"]),
        Figure("rand_read_qd1", "us", figures["single"], Budget(Kind.RATIO_AT_MOST, SINGLE_LIMIT)),
        *await _hops(),
    ]


def _mib_per_second(one: IoRound) -> float:
    return one.bytes / _MIB / (one.ns / 1e9)


def _offsets(disk: Path) -> list[int]:
    blocks = random.Random(1)
    n_blocks = disk.stat().st_size // BLOCK_BYTES
    return [blocks.randrange(n_blocks) * BLOCK_BYTES for _ in range(N_BLOCKS)]


# -- where the time of a request goes ----------------------------------------------------------------------------------


async def _hops() -> list[Figure]:
    """From the frames that guest, kvm and qemu recorded, by their common clock: a request, one at a time."""
    async with cluster(_CLUSTER, state_dir=STATE.resolve() / "dma", record=True) as machine:
        plain = machine.vm("plain")
        await wait_ready(plain)
        await time_requests(plain, SINGLE)
        for target in ("plain/guest", "alpha/kvm", "plain/qemu"):
            await machine.process(target).query("record", {"on": False})
        return _breakdown(machine)


def _breakdown(machine: RunningCluster) -> list[Figure]:
    kicks = list(_times(machine, "plain/guest", H_LOGICAL_CI_STORE.number, "out"))[-N_SINGLE:]
    heard = dict(_times(machine, "alpha/kvm", H_LOGICAL_CI_STORE.number, "in"))
    told = dict(_times(machine, "alpha/kvm", DOORBELL_RUNG.number, "out"))
    rung = dict(_times(machine, "plain/qemu", DOORBELL_RUNG.number, "in"))
    legs: dict[str, list[float]] = {name: [] for name in ("guest_to_kvm", "kvm", "kvm_to_qemu", "qemu_and_guest")}
    for (cause, kicked_ns), (_, next_ns) in itertools.pairwise(kicks):
        if cause in heard and cause in told and cause in rung:
            points = (kicked_ns, heard[cause], told[cause], rung[cause], next_ns)
            for name, start_ns, end_ns in zip(legs, points, points[1:], strict=False):
                legs[name].append((end_ns - start_ns) / _NS_PER_US)
    return [Figure(f"qd1_{name}", "us", [Round(statistics.median(values))]) for name, values in legs.items() if values]


def _times(machine: RunningCluster, target: str, number: int, direction: str) -> Iterator[tuple[int, int]]:
    """(cause, time) of each call or event of this number."""
    for entry in FrameReader(machine.paths.trace_file(target)).read():
        envelope = decode(entry.frame)
        is_asked = envelope.kind in (MessageKind.CALL, MessageKind.EVENT)
        if envelope.number == number and entry.direction == direction and is_asked:
            yield envelope.cause, entry.t_ns
