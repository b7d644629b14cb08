"""The allowance of lines of a log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.runtime.line_limit import BURST_LINES, LINES_PER_SECOND, LineLimit


def test_a_burst_is_written_and_what_follows_it_is_counted() -> None:
    limit = LineLimit(lambda: 5.0)

    answers = [limit.admit("vm1", "share") for _ in range(BURST_LINES + 7)]

    assert answers == [0] * BURST_LINES + [None] * 7
    assert limit.take_left_out("vm1") == {"share": 7}
    assert limit.take_left_out("vm1") == {}


def test_the_next_line_that_is_written_tells_how_many_were_left_out() -> None:
    now = [0.0]
    limit = LineLimit(lambda: now[0])
    for _ in range(BURST_LINES + 3):
        limit.admit("vm1", "share")

    now[0] = 1 / LINES_PER_SECOND

    assert limit.admit("vm1", "share") == 3
    assert limit.admit("vm1", "share") is None


def test_one_vm_or_event_takes_nothing_from_another() -> None:
    limit = LineLimit(lambda: 0.0)
    for _ in range(BURST_LINES + 1):
        limit.admit("vm1", "share")

    assert limit.admit("vm1", "esm") == 0
    assert limit.admit("vm2", "share") == 0


@given(st.lists(st.floats(0, 10), max_size=2000))
def test_s5_never_more_lines_than_the_allowance(pauses: list[float]) -> None:
    now = [0.0]
    limit = LineLimit(lambda: now[0])
    written = 0
    for pause in pauses:
        now[0] += pause
        written += limit.admit("vm1", "share") is not None

    assert written <= BURST_LINES + now[0] * LINES_PER_SECOND
