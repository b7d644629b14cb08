"""How far the machine engine runs in a slice, over either clock."""

from __future__ import annotations

import resource
import select
import threading
import time
from collections.abc import Callable

import pytest

from services.guest.clock import WallClock
from services.guest.exits import Hypercall, Pause
from services.guest.machine.registers import Spr
from services.guest.machine.slices import QUIET_SLICES, SLICE_INSTRUCTIONS, SLICE_NS, TimedSlices
from services.guest.machine.time_base import TICKS_PER_US
from tests.unit import machine_rig
from tests.unit import power_asm as asm
from tests.unit.machine_rig import MachineRig
from tests.unit.power_asm import R3, R4, R5, R6

LATE_NS = 100_000_000
"""How much later than it should a slice may end on a machine that does something else meanwhile."""


def timed_ns(rig: MachineRig, limit_ns: int = machine_rig.SLICE_NS) -> int:
    """How long a slice of an endless loop takes."""
    before = time.perf_counter_ns()
    assert rig.engine.run(limit_ns) is Pause.SLICE_END
    return time.perf_counter_ns() - before


def test_the_instruction_clock_counts_and_the_wall_clock_does_not() -> None:
    counted, timed = MachineRig(), MachineRig(WallClock())
    for rig in (counted, timed):
        rig.begin(asm.b(0))
        rig.engine.run(machine_rig.SLICE_NS)

    assert counted.engine.n_instructions == SLICE_INSTRUCTIONS
    assert (timed.engine.n_instructions, timed.engine.trail) == (None, None)


def test_with_the_wall_clock_a_slice_takes_its_time_whatever_the_code_costs() -> None:
    loop, misses = MachineRig(WallClock()), MachineRig(WallClock())
    loop.begin(asm.b(0))
    # A store to PIDR empties the TLB: everything misses.
    misses.begin(asm.mtspr(Spr.PIDR, R4), asm.b(-1))

    for rig in (loop, misses):
        took = sorted(timed_ns(rig) for _ in range(9))
        assert SLICE_NS // 2 < took[4] < SLICE_NS + LATE_NS


def test_a_shorter_limit_and_the_decrementer_end_a_slice_earlier() -> None:
    rig = MachineRig(WallClock())
    rig.begin(*asm.load64(R5, 50 * TICKS_PER_US), asm.mtspr(Spr.DEC, R5), asm.SC1, asm.b(0))
    assert isinstance(rig.until_exit(), Hypercall)
    rig.engine.resume([0])

    assert min(timed_ns(rig) for _ in range(9)) < SLICE_NS
    rig.begin(asm.b(0))
    assert min(timed_ns(rig, SLICE_NS // 8) for _ in range(9)) < SLICE_NS


def test_while_an_interrupt_is_masked_slices_are_short_and_then_longer() -> None:
    rig = MachineRig(WallClock())
    rig.begin(asm.b(0))
    first = []
    for _ in range(20):
        rig.engine.set_line(False)
        rig.engine.run(machine_rig.SLICE_NS)
        rig.engine.set_line(True)
        first.append(timed_ns(rig))

    later = [timed_ns(rig) for _ in range(12)][-4:]

    # A busy machine makes a slice longer, never shorter: the shortest of many says what was asked for.
    assert min(first) < SLICE_NS // 4
    assert sorted(later)[1] > SLICE_NS // 2


def tick_ns(rig: MachineRig) -> int:
    """From tick to tick: how long slices take is the machine's to say as well."""
    slices = rig.engine._slices
    assert isinstance(slices, TimedSlices)
    return slices._alarm.every_ns


def test_a_guest_that_only_computes_gets_longer_slices_until_something_happens() -> None:
    rig = MachineRig(WallClock())
    rig.begin(asm.b(0))
    happenings: list[Callable[[], None]] = [lambda: rig.engine.set_line(False), rig.engine.flush_translations]
    for happens in happenings:
        for _ in range(QUIET_SLICES - 1):
            timed_ns(rig)
        assert tick_ns(rig) == SLICE_NS
        timed_ns(rig)
        assert tick_ns(rig) == machine_rig.SLICE_NS
        # A machine that does something else makes a slice longer, never shorter.
        assert max(timed_ns(rig) for _ in range(9)) > 2 * SLICE_NS

        happens()
        assert tick_ns(rig) == SLICE_NS


def test_a_guest_that_calls_gets_short_slices() -> None:
    rig = MachineRig(WallClock())
    rig.begin(asm.SC1, asm.b(-1))
    for _ in range(2 * QUIET_SLICES):
        calls_and_ns(rig)

    assert tick_ns(rig) == SLICE_NS


def test_calls_do_not_make_a_slice_longer() -> None:
    """The time goes on while the engine is left; so calls that follow each other cannot hold up messages."""
    rig = MachineRig(WallClock())
    rig.begin(asm.SC1, asm.b(-1))
    slices = [calls_and_ns(rig) for _ in range(20)]

    # A machine that does something else meanwhile leaves a slice without calls, or ends it late; not all of them.
    assert max(n_calls for n_calls, _ in slices) > 3
    assert min(ns for n_calls, ns in slices if n_calls) < SLICE_NS + LATE_NS


def calls_and_ns(rig: MachineRig) -> tuple[int, int]:
    """How many calls a slice of nothing else makes, and how long it takes."""
    before, n_calls = time.perf_counter_ns(), 0
    while not isinstance(rig.engine.run(machine_rig.SLICE_NS), Pause):
        n_calls += 1
        rig.engine.resume([0])
    return n_calls, time.perf_counter_ns() - before


def test_a_processor_that_rests_is_not_ticked_and_goes_on_with_ticks() -> None:
    woken: list[int] = []
    took: list[int] = []

    def run() -> None:
        rig = MachineRig(WallClock())
        rig.begin(asm.b(0))
        rig.engine.run(machine_rig.SLICE_NS)
        rig.engine.rest()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        select.poll().poll(50)
        woken.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)
        took.append(timed_ns(rig))

    # A thread of its own: ticks go to the thread that runs an engine, and other tests left engines to this one.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)

    assert woken[0] < 10
    assert took[0] < SLICE_NS + LATE_NS


@pytest.mark.parametrize("limit_ns", [12_000, 31_000, 100_000])
def test_a_program_that_is_stopped_anywhere_goes_on_where_it_was(limit_ns: int) -> None:
    """Its stores move their own address: one that was done twice, or not at all, would show."""
    n_times = 200_000
    rig = MachineRig(WallClock())
    loop = (asm.addi(R3, R3, 1), asm.stwu(R3, 4, R4), asm.addi(R5, R5, 2), asm.bdnz(-3))
    rig.begin(*asm.load64(R6, n_times), asm.mtspr(Spr.CTR, R6), *asm.load64(R4, 0x20_0000), *loop, asm.SC1)

    n_slices = 0
    while rig.engine.run(limit_ns) is Pause.SLICE_END:
        n_slices += 1

    assert n_slices > 3
    assert (rig.gpr[R3], rig.gpr[R4], rig.gpr[R5]) == (n_times, 0x20_0000 + 4 * n_times, 2 * n_times)
    words = memoryview(rig.ram)[0x20_0004 : 0x20_0004 + 4 * n_times]
    assert [int.from_bytes(words[at : at + 4], "big") for at in range(0, len(words), 4)] == list(range(1, n_times + 1))


def test_two_engines_in_two_threads_stop_each_by_their_own_time() -> None:
    ended: list[Pause] = []

    def run() -> None:
        rig = MachineRig(WallClock())
        rig.begin(asm.b(0))
        for _ in range(20):
            exit_ = rig.engine.run(machine_rig.SLICE_NS)
            assert isinstance(exit_, Pause)
            ended.append(exit_)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert ended == [Pause.SLICE_END] * 40
