"""An idle guest whose clock jumps: a minute ahead for nothing, a tenth of real time beyond it."""

from __future__ import annotations

import pytest

from services.guest.pacing import FREE_AHEAD_NS, MAX_WAIT_NS, SPEED, Pacer

TICK_NS = 4_000_000
MS = 1_000_000


class Host:
    """A host's clock that moves by what is waited."""

    def __init__(self) -> None:
        self.ns = 1_000

    def __call__(self) -> int:
        return self.ns

    def idle(self, pacer: Pacer, total_ns: int, tick_ns: int) -> int:
        """Let guest time jump by `total_ns` in steps; the real time it took."""
        before = self.ns
        for _ in range(total_ns // tick_ns):
            self.ns += pacer.wait_ms(tick_ns) * MS
        return self.ns - before


def test_a_minute_of_guest_time_costs_nothing() -> None:
    host = Host()

    assert host.idle(Pacer(host), FREE_AHEAD_NS, TICK_NS) == 0


@pytest.mark.parametrize("tick_ns", [TICK_NS, 100 * MS, 400 * MS])
def test_beyond_it_guest_time_runs_at_most_ten_times_as_fast(tick_ns: int) -> None:
    host = Host()
    pacer = Pacer(host)
    host.idle(pacer, FREE_AHEAD_NS, tick_ns)
    more_ns = 100_000 * MS

    assert more_ns / SPEED * 0.9 <= host.idle(pacer, more_ns, tick_ns) <= more_ns / SPEED


def test_one_long_jump_waits_no_longer_than_others_may_be_held_up() -> None:
    host = Host()

    assert Pacer(host).wait_ms(10 * FREE_AHEAD_NS) * MS == MAX_WAIT_NS


def test_a_guest_that_the_host_caught_up_with_is_free_again() -> None:
    host = Host()
    pacer = Pacer(host)
    host.idle(pacer, 2 * FREE_AHEAD_NS, TICK_NS)
    host.ns += 3 * FREE_AHEAD_NS

    assert host.idle(pacer, FREE_AHEAD_NS, TICK_NS) == 0
