"""Every pair of the calls that change a page's or a VM's life, open at the same moment: none hangs, S1 to S3 hold.

Ultravisor and kvm are real processes; launcher, guest and qemu are played, so that two calls can be sent whenever the
seed says. A pair counts only when both calls were open at once. "On one GFN" both calls name the same page; "on one
VM" each has pages of its own. UV_ESM, the reset and the end of a VM name no page.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import trio

from protocol.codes import HCode, UCode
from protocol.errors import PeerGone
from protocol.geometry import PAGE_BYTES, gpa_of
from services.testing.calls import Span
from services.testing.host import RealHost, real_host
from services.testing.image import RTAS_GFN, PlayedImage, make_image
from services.testing.process import QueryFailed
from services.testing.watch import Page, WatchedVm
from services.ultravisor.identity import ensure_keys
from tests.conftest import SHOWN

WANTED = 50
MOST_TRIES = 250
LONGEST_SECONDS = 1.0
HANGS_SECONDS = 10.0
MEMORY_BYTES = 40 * PAGE_BYTES
KERNEL = bytes(range(1, 256)) * 500
PAGES = range(12, 28)
SEED = 20191106


class Op(Enum):
    ESM = "ESM"
    SHARE = "share"
    UNSHARE = "unshare"
    FAULT = "guest fault"
    PAGE_OUT = "page-out"
    TOUCH = "host touch"
    RESET = "system_reset"
    TERMINATE = "terminate"


ENDING = {Op.RESET, Op.TERMINATE}
WANTS = {
    Op.SHARE: Page.PRIVATE,
    Op.UNSHARE: Page.SHARED,
    Op.FAULT: Page.OUT,
    Op.PAGE_OUT: Page.PRIVATE,
    Op.TOUCH: Page.PRIVATE,
}
Pair = tuple[Op, Op]
PAIRS: list[Pair] = list(combinations_with_replacement(Op, 2))

# What a call may answer while the VM goes on, and besides when something ends it or it is not secure yet.
GOOD: dict[Op, set[int | str]] = {
    Op.ESM: {UCode.U_SUCCESS, UCode.U_RETRY},
    Op.SHARE: {UCode.U_SUCCESS, UCode.U_RETRY},
    Op.UNSHARE: {UCode.U_SUCCESS, UCode.U_RETRY},
    Op.FAULT: {HCode.H_SUCCESS, HCode.H_BUSY},
    Op.PAGE_OUT: {HCode.H_SUCCESS, HCode.H_BUSY},
    Op.TOUCH: {HCode.H_SUCCESS, HCode.H_BUSY},
    Op.RESET: {HCode.H_SUCCESS},
    Op.TERMINATE: {0},
}
ENDED: dict[Op, set[int | str]] = {
    Op.ESM: {UCode.U_STATE, UCode.U_PARAMETER},
    Op.SHARE: {UCode.U_STATE, UCode.U_PERMISSION, UCode.U_PARAMETER},
    Op.UNSHARE: {UCode.U_STATE, UCode.U_PERMISSION},
    Op.FAULT: {UCode.U_STATE, HCode.H_PARAMETER, "gone"},
    Op.PAGE_OUT: {HCode.H_PARAMETER, "unknown"},
    Op.TOUCH: {HCode.H_PARAMETER, "gone"},
    Op.RESET: {"gone"},
    Op.TERMINATE: set(),
}


@dataclass
class Run:
    """One call of a pair: on which pages, when, and how it ended."""

    op: Op
    gfn: int
    n_pages: int
    delay_s: float
    span: Span | None = None
    result: int | str | None = None

    @property
    def gfns(self) -> range:
        return range(self.gfn, self.gfn + self.n_pages)


@dataclass
class Tally:
    """What became of the tries of each pair."""

    tries: Counter[Pair] = field(default_factory=Counter)
    counted: Counter[Pair] = field(default_factory=Counter)
    longest_s: dict[Op, float] = field(default_factory=dict)
    results: dict[Op, Counter[int | str]] = field(default_factory=lambda: {op: Counter() for op in Op})

    def note(self, pair: Pair, runs: list[Run]) -> None:
        first, second = (run.span for run in runs)
        self.tries[pair] += 1
        self.counted[pair] += first is not None and second is not None and first.overlaps(second)
        for run in runs:
            if run.span is not None and run.result is not None:
                self.longest_s[run.op] = max(self.longest_s.get(run.op, 0.0), run.span.seconds)
                self.results[run.op][run.result] += 1


class Stage:
    """One VM that lives through all pairs: what it is now, and how to get it into the state that a pair wants."""

    def __init__(self, host: RealHost, image: PlayedImage, seed: int) -> None:
        self.host = host
        self.image = image
        self.random = random.Random(seed)
        self.typical_s = dict.fromkeys(Op, 0.003)
        self.watched: WatchedVm
        self.exists = False

    # -- before a pair ----------------------------------------------------------------------------------------

    async def be_normal(self) -> None:
        if self.exists and self.watched.vm.guest.secure:
            assert await self.watched.vm.qemu.reset() == HCode.H_SUCCESS
            self.watched.ended()
        if not self.exists:
            vm = await self.host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
            if hasattr(self, "watched"):
                self.watched.vm = vm
            else:
                self.watched = WatchedVm(self.host, vm, self.image, PAGES, self.random.getrandbits(32))
            self.exists = True
        if self.watched.vm.guest.pc is None:
            await self.watched.boot()

    async def be_secure(self) -> None:
        if self.exists and self.watched.vm.guest.secure:
            return
        await self.be_normal()
        await self.watched.turn_secure()

    async def prepare(self, pair: Pair, *, one_gfn: bool) -> list[Run]:
        # The image's own pages are those that UV_ESM works on.
        gfns = [*PAGES, *self.image.gfns] if Op.ESM in pair else PAGES
        runs = [self._choose(op, gfns, one_gfn) for op in pair]
        if one_gfn:
            runs[1].gfn = runs[0].gfn
        elif set(runs[0].gfns) & set(runs[1].gfns):
            runs[1].gfn = runs[0].gfns.stop
        if Op.ESM in pair:
            await self.be_normal()
        else:
            await self.be_secure()
            for run in self.random.sample(runs, 2):
                for gfn in run.gfns:
                    await self.watched.bring_to(gfn, WANTS.get(run.op, Page.PRIVATE))
        late = self.random.choice(runs)
        other = runs[1 - runs.index(late)] if runs[0] is not runs[1] else late
        late.delay_s = self.random.choice((0.0, self.random.uniform(0, self.typical_s[other.op])))
        return runs

    def _choose(self, op: Op, gfns: Sequence[int], one_gfn: bool) -> Run:
        n_pages = 1 if one_gfn or op is Op.FAULT else self.random.choice((1, 1, 2, 4))
        return Run(op, min(self.random.choice(gfns), PAGES.stop - 8), n_pages, 0.0)

    # -- a pair -----------------------------------------------------------------------------------------------

    async def play(self, runs: list[Run]) -> None:
        with trio.move_on_after(HANGS_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                for run in runs:
                    nursery.start_soon(self._play_one, run)
        if scope.cancelled_caught:
            stuck = [run.op.value for run in runs if run.span is None]
            raise AssertionError(f"{' and '.join(stuck)} open for {HANGS_SECONDS} s; {self.host.calls.still_open()}")

    async def _play_one(self, run: Run) -> None:
        await trio.sleep(run.delay_s)
        start = time.monotonic()
        run.result = await self._call(run)
        run.span = Span(run.op.value, start, time.monotonic())
        self.typical_s[run.op] = 0.9 * self.typical_s[run.op] + 0.1 * run.span.seconds

    async def _call(self, run: Run) -> int | str:
        vm = self.watched.vm
        calls: dict[Op, Callable[[], Awaitable[int]]] = {
            Op.ESM: lambda: vm.guest.esm(self.image),
            Op.SHARE: lambda: vm.guest.share(run.gfn, run.n_pages),
            Op.UNSHARE: lambda: vm.guest.unshare(run.gfn, run.n_pages),
            Op.FAULT: lambda: vm.guest.fault(run.gfn),
            Op.PAGE_OUT: lambda: self._page_out(run),
            Op.TOUCH: lambda: vm.qemu.want(list(run.gfns)),
            Op.RESET: vm.qemu.reset,
            Op.TERMINATE: self._terminate,
        }
        try:
            return await calls[run.op]()
        except PeerGone:
            return "gone"
        except QueryFailed:
            return "unknown"

    async def _page_out(self, run: Run) -> int:
        answer = await self.host.kvm.query("page.out", vm="vm1", gpa=gpa_of(run.gfn), n=run.n_pages)
        codes = [HCode[name] for name in answer["codes"]]
        return next((code for code in codes if code not in GOOD[Op.PAGE_OUT]), max(codes))

    async def _terminate(self) -> int:
        self.exists = False
        await self.host.destroy_vm("vm1")
        return 0

    # -- after a pair -----------------------------------------------------------------------------------------

    async def settle(self, runs: list[Run]) -> None:
        """What must hold now, and what each page is from now on."""
        ops = {run.op for run in runs}
        assert not self.host.calls.still_open()
        self._check_results(runs, ops)
        if ops & ENDING:
            await self._settle_ended(ops)
            await self.be_secure()
        elif Op.ESM in ops:
            assert any(run.result == UCode.U_SUCCESS for run in runs if run.op is Op.ESM)
            self.watched.began()
        await self._settle_pages(runs)
        if Op.ESM in ops and not ops & ENDING:
            await self.watched.plant_all()
        raw = self.watched.check_s1()
        assert KERNEL not in raw
        self.watched.check_s2(raw)
        gfn = runs[0].gfn if runs[0].gfn in PAGES else PAGES.start
        other = self.random.choice([page for page in PAGES if page != gfn])
        await self.watched.check_s3(gfn, other, self.random.choice(self.watched.possible_forgeries(gfn)))
        self.watched.check_s1()

    def _check_results(self, runs: list[Run], ops: set[Op]) -> None:
        for run in runs:
            allowed = GOOD[run.op] | (ENDED[run.op] if ops & ENDING else set())
            if Op.ESM in ops and run.op is not Op.ESM:
                allowed |= ENDED[run.op]
            if run.op is Op.UNSHARE and RTAS_GFN in run.gfns:
                # The ultravisor shares that page, not the guest: once the VM is secure it is not the guest's to take.
                allowed |= {UCode.U_P2}
            assert run.result in allowed, f"{run.op.value} returned {run.result} in {[r.op.value for r in runs]}"

    async def _settle_ended(self, ops: set[Op]) -> None:
        """Neither a guest nor secure memory is left, and no secret in the frames that the host got back."""
        guest = self.watched.vm.guest
        assert not guest.secure
        assert guest.pc is None or Op.TERMINATE in ops
        self.watched.check_s1()
        if Op.TERMINATE in ops:
            await self.host.forget_vm("vm1")
        else:
            status = await self.host.ultravisor.query("vm.status", vm="vm1")
            assert (status["secure"], status["failure"]) == (False, None)
        assert (await self.host.ultravisor.query("account"))["used_bytes"] == 0
        self.watched.ended()

    async def _settle_pages(self, runs: list[Run]) -> None:
        status = await self.host.ultravisor.query("vm.status", vm="vm1")
        assert (status["secure"], status["failure"]) == (True, None)
        if any(run.op in ENDING for run in runs):
            return
        for gfn in {gfn for run in runs for gfn in run.gfns}:
            await self._settle_page(gfn, [run for run in runs if gfn in run.gfns])

    async def _settle_page(self, gfn: int, runs: list[Run]) -> None:
        done = {run.op for run in runs if run.result == UCode.U_SUCCESS}
        page = await self.host.ultravisor.query("page.secure", vm="vm1", gpa=gpa_of(gfn))
        if gfn == RTAS_GFN:
            # Guest and hypervisor each have a page of their own there, and no call of either changes that.
            assert page["state"] == "PSEUDO_SHARED"
            return
        assert page["state"] in ("SECURE", "PAGED_OUT", "SHARED")
        if page["state"] == "SHARED":
            assert Op.SHARE in done or gfn in self.watched.shared
            if Op.SHARE in done:
                self.watched.check_newly_shared(gfn)
            self.watched.now_shared(gfn)
            return
        assert gfn not in self.watched.shared or Op.UNSHARE in done
        if Op.UNSHARE in done and (gfn in self.watched.shared or Op.SHARE in done):
            self.watched.now_private(gfn)
        if gfn in self.watched.content:
            await self.watched.check_content(gfn)


def internal_errors(host: RealHost) -> list[str]:
    lines = [line for process in (host.ultravisor, host.kvm) for line in host.log_text(process).splitlines()]
    return [line for line in lines if '"event": "internal error"' in line]


def show(tally: Tally, host: RealHost, mode: str, seconds: float) -> str:
    lines = ["", f"pairs of calls on one {mode}: both open at once (tries), {seconds:.0f} s"]
    width = max(len(op.value) for op in Op) + 2
    lines.append(" " * width + "".join(op.value.rjust(width) for op in Op))
    for second in Op:
        cells = [
            f"{tally.counted[first, second]} ({tally.tries[first, second]})" for first in Op if (first, second) in PAIRS
        ]
        lines.append(second.value.ljust(width) + "".join(cell.rjust(width) for cell in cells))
    lines.append("longest open: " + ", ".join(f"{op.value} {s * 1000:.0f} ms" for op, s in tally.longest_s.items()))
    longest = sorted(host.calls.longest_s.items(), key=lambda item: -item[1])
    lines.append("by call: " + ", ".join(f"{name} {s * 1000:.0f} ms" for name, s in longest))
    for op, results in tally.results.items():
        lines.append(f"{op.value}: " + ", ".join(f"{result} x{count}" for result, count in results.most_common()))
    return "\n".join(lines)


@asynccontextmanager
async def stage(seed: int) -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="pb-") as path:
        identity = ensure_keys(Path(path) / "keys", "alpha")
        image = make_image(identity["machine-key"], KERNEL, MEMORY_BYTES, {})
        directory = Path(path) / "r"
        directory.mkdir()
        async with real_host(directory, identity) as host:
            yield Stage(host, image, seed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["GFN", "VM"])
async def test_no_pair_of_open_calls_hangs_or_breaks_an_invariant(
    mode: str, record_property: Callable[[str, object], None]
) -> None:
    tally = Tally()
    started = time.monotonic()
    async with stage(SEED) as world:
        for pair in PAIRS:
            while tally.counted[pair] < WANTED and tally.tries[pair] < MOST_TRIES:
                runs = await world.prepare(pair, one_gfn=mode == "GFN")
                await world.play(runs)
                tally.note(pair, runs)
                await world.settle(runs)
        record_property(SHOWN, show(tally, world.host, mode, time.monotonic() - started))
        assert not internal_errors(world.host)
        assert min(tally.counted[pair] for pair in PAIRS) >= WANTED
        assert max(world.host.calls.longest_s.values()) <= LONGEST_SECONDS
        assert max(tally.longest_s.values()) <= LONGEST_SECONDS
