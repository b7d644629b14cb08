"""When a live migration goes on, when it stops the guest, and what it says of itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import UserError
from services.qemu.migration.pacing import BURST_NS, NS, Pacer
from services.qemu.migration.parameters import MIB, MigrationParameters
from services.qemu.migration.precopy import Next, Precopy
from services.qemu.migration.status import FOLLOWS, BadStatus, MigrationStatus, step

PAGE = 64 << 10
N_PAGES = 4096
"""256 MiB."""


def run(dirty_mib_per_second: int, link_mib_per_second: int, downtime_ms: int = 300, rounds: int = 50) -> Precopy:
    """Rounds until the guest stops, or `rounds` of them."""
    now = 0
    precopy = Precopy(N_PAGES, PAGE, downtime_ms, now)
    owed = N_PAGES
    for _ in range(rounds):
        took = owed * PAGE * NS // (link_mib_per_second * MIB)
        now += took
        precopy.sent(owed * PAGE, zero_pages=0, data_pages=owed)
        owed = min(N_PAGES, dirty_mib_per_second * MIB * took // NS // PAGE)
        if precopy.end_round(owed, now) is Next.STOP:
            break
    return precopy


def test_an_idle_guest_stops_after_the_first_round() -> None:
    progress = run(0, 100).progress()

    assert progress.round == 1
    assert progress.expected_downtime_ms == progress.remaining_bytes == 0
    assert progress.transferred_bytes == progress.total_bytes == N_PAGES * PAGE
    assert progress.bytes_per_second == 100 * MIB
    assert progress.converges


def test_a_guest_that_writes_slower_than_the_link_carries_converges_within_its_downtime() -> None:
    progress = run(20, 100).progress()

    assert 1 < progress.round < 5
    assert progress.expected_downtime_ms is not None
    assert 0 < progress.expected_downtime_ms <= 300
    assert 18 * MIB < progress.dirty_pages_per_second * PAGE <= 20 * MIB


def test_nobody_knows_the_downtime_before_the_link_has_carried_anything() -> None:
    precopy = Precopy(N_PAGES, PAGE, 300, 0)

    assert precopy.progress().expected_downtime_ms is None


def test_a_guest_that_writes_faster_than_the_link_carries_is_not_stopped_and_said_to_be_so() -> None:
    progress = run(200, 100).progress()

    assert progress.round == 51
    assert not progress.converges
    assert progress.expected_downtime_ms == 2560


def test_a_longer_downtime_ends_what_does_not_converge() -> None:
    assert run(200, 100, downtime_ms=3000).progress().round == 1


def test_a_vm_of_zeros_is_done_though_next_to_nothing_was_sent() -> None:
    precopy = Precopy(N_PAGES, PAGE, 300, 0)
    precopy.sent(N_PAGES * 5, zero_pages=N_PAGES, data_pages=0)

    assert precopy.end_round(8, 50_000_000) is Next.STOP
    assert precopy.progress().zero_pages == N_PAGES


def test_a_large_vm_of_zeros_is_done_too() -> None:
    n_pages = 16 << 30 >> 16
    precopy = Precopy(n_pages, PAGE, 300, 0)
    precopy.sent(n_pages * 5, zero_pages=n_pages, data_pages=0)

    assert precopy.end_round(8, NS) is Next.STOP


def test_a_short_round_says_nothing_about_the_link() -> None:
    precopy = Precopy(N_PAGES, PAGE, 2, 0)
    precopy.sent(N_PAGES * PAGE, zero_pages=0, data_pages=N_PAGES)
    assert precopy.end_round(10, NS) is Next.ROUND
    precopy.sent(10 * PAGE, zero_pages=0, data_pages=10)

    assert precopy.end_round(1, 2 * NS) is Next.STOP
    assert precopy.progress().bytes_per_second == N_PAGES * PAGE


def test_a_page_is_never_free() -> None:
    precopy = Precopy(N_PAGES, PAGE, 0, 0)
    precopy.sent(N_PAGES * PAGE, zero_pages=0, data_pages=N_PAGES)

    assert precopy.end_round(1, 1) is Next.ROUND
    assert precopy.progress().expected_downtime_ms == 1
    assert precopy.end_round(0, 2) is Next.STOP


@given(st.integers(1, 1 << 30), st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, NS)), min_size=1))
def test_over_any_time_no_more_leaves_than_the_limit_and_a_burst(rate: int, sends: list[tuple[int, int]]) -> None:
    pacer = Pacer(rate, 0)
    now = left = 0
    for n_bytes, pause_ns in sends:
        now += pause_ns
        # What is sent now was paid for before, but for the last frame.
        assert left <= rate * (now + BURST_NS) // NS + len(sends)
        now += pacer.spend(n_bytes, now)
        left += n_bytes


def test_without_a_limit_nobody_waits() -> None:
    assert Pacer(0, 0).spend(1 << 40, 0) == 0


def test_another_limit_counts_at_once() -> None:
    pacer = Pacer(1, 0)
    assert pacer.spend(100, 0) > 99 * NS
    pacer.set_rate(1 << 30, 0)

    assert pacer.spend(1 << 20, 0) < NS


def test_parameters_have_the_names_and_defaults_of_qemu() -> None:
    changed = MigrationParameters().updated({"max-bandwidth": 5, "downtime-limit": 20})

    assert (MigrationParameters().max_bandwidth, MigrationParameters().downtime_limit) == (128 * MIB, 300)
    assert (changed.max_bandwidth, changed.downtime_limit, changed.announce_rounds) == (5, 20, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"downtime-limit": 2_000_001}, "downtime-limit: expected `int` <= 2000000"),
        ({"downtime-limit": "1"}, "downtime-limit: expected `int`, got `str`"),
        ({"max-bandwidth": -1}, "max-bandwidth: expected `int` >= 0"),
        ({"multifd-channels": 2}, "multifd-channels: not built; there is: max-bandwidth, downtime-limit"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=f"^migration parameter {said}"):
        MigrationParameters().updated(changes)


def test_announcements_come_as_qemu_makes_them() -> None:
    assert MigrationParameters().announcements_ms() == [0, 50, 150, 250, 350]
    assert MigrationParameters(announce_max=200).announcements_ms() == [0, 50, 150, 200, 200]
    assert MigrationParameters(announce_rounds=0).announcements_ms() == []


def test_every_status_is_reached_and_only_in_its_order() -> None:
    reached, todo = {MigrationStatus.NONE}, [MigrationStatus.NONE]
    while todo:
        now = todo.pop()
        for wanted in MigrationStatus:
            if wanted in FOLLOWS[now]:
                assert step(now, wanted) is wanted
                todo += [wanted] if wanted not in reached else []
                reached.add(wanted)
            else:
                with pytest.raises(BadStatus):
                    step(now, wanted)

    assert reached == set(MigrationStatus)
    assert all(FOLLOWS[status] == {MigrationStatus.SETUP} for status in MigrationStatus if not status.running)
    assert MigrationStatus.CANCELLED in FOLLOWS[MigrationStatus.CANCELLING]
