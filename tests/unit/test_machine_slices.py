"""How many instructions a slice of the machine engine has, over either clock."""

from __future__ import annotations

import time

import pytest

from services.guest.machine.slices import (
    FIXED_INSTRUCTIONS,
    MAX_INSTRUCTIONS,
    MIN_INSTRUCTIONS,
    TARGET_NS,
    FixedSlices,
    TimedSlices,
)


class Host:
    """Time that passes with instructions; `mips` can change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        self.mips = 1000
        monkeypatch.setattr(time, "thread_time_ns", lambda: self.now_ns)

    def use_up(self, of: TimedSlices) -> int:
        """Run a whole slice; how long it took."""
        took_ns = of.n_instructions * 1000 // self.mips
        of.begin()
        self.now_ns += took_ns
        of.end(of.n_instructions)
        return took_ns


def test_slices_of_the_instruction_clock_are_all_alike() -> None:
    fixed = FixedSlices()
    fixed.begin()
    fixed.end(7)
    assert fixed.n_instructions == FIXED_INSTRUCTIONS


@pytest.mark.parametrize("mips", [40, 100, 1000, 1800])
def test_slices_come_to_take_about_the_target_at_any_speed(monkeypatch: pytest.MonkeyPatch, mips: int) -> None:
    host, timed = Host(monkeypatch), TimedSlices()
    host.mips = mips

    for _ in range(10):
        host.use_up(timed)

    assert TARGET_NS // 2 <= host.use_up(timed) <= 2 * TARGET_NS


def test_slower_code_has_a_shorter_slice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host, timed = Host(monkeypatch), TimedSlices()
    for _ in range(10):
        host.use_up(timed)
    host.mips = 50
    host.use_up(timed)

    assert host.use_up(timed) <= 2 * TARGET_NS


def test_calls_after_a_few_instructions_make_no_longer_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    Host(monkeypatch)
    timed = TimedSlices()
    for _ in range(10):
        timed.begin()
        timed.end(50)
    assert timed.n_instructions == FIXED_INSTRUCTIONS


def test_a_slice_stays_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    host, timed = Host(monkeypatch), TimedSlices()
    host.mips = 1
    host.use_up(timed)
    assert timed.n_instructions == MIN_INSTRUCTIONS
    host.mips = 1_000_000
    for _ in range(10):
        host.use_up(timed)
    assert timed.n_instructions == MAX_INSTRUCTIONS
