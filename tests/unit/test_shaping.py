"""A link with a shape: when what is sent arrives, in what order, and what is lost."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from services.qemu.shaping import (
    MAX_QUEUE_BYTES,
    MAX_QUEUE_SECONDS,
    MAX_RETRANSMITS,
    MAX_WINDOW_BYTES,
    RETRANSMIT_SECONDS,
    Shaper,
)
from shared.link_shape import MIN_BANDWIDTH, LinkChanges, LinkShape, fault_of

SHAPES = st.builds(
    LinkShape,
    latency_ms=st.floats(0, 500),
    jitter_ms=st.floats(0, 500),
    bandwidth_bytes_per_second=st.one_of(st.just(0), st.integers(MIN_BANDWIDTH, 1 << 30)),
    loss=st.floats(0, 1),
    down=st.booleans(),
)
SENDS = st.lists(st.tuples(st.floats(0, 0.2), st.integers(14, 9014), st.none() | SHAPES), max_size=60)
"""After what time, how many bytes, and the shape from then on if it changes."""


def shaper(**shape: float) -> Shaper:
    return Shaper(Random(1), LinkShape(**shape))  # type: ignore[arg-type]


@given(SHAPES, SENDS, st.integers())
def test_nothing_overtakes_and_nothing_comes_before_it_can(
    shape: LinkShape, sends: list[tuple[float, int, LinkShape | None]], seed: int
) -> None:
    link, now, last = Shaper(Random(seed), shape), 0.0, 0.0
    for pause, n_bytes, other in sends:
        now += pause
        link.shape = other or link.shape
        due = link.datagram(n_bytes, now)
        if due is None:
            continue
        assert not link.shape.passes_nothing
        bandwidth = link.shape.bandwidth_bytes_per_second
        line_s = n_bytes / bandwidth if bandwidth else 0.0
        assert due >= max(last, now + line_s + link.shape.latency_ms / 1000 - 1e-9)
        last = due


@given(SHAPES.filter(lambda shape: shape.bandwidth_bytes_per_second > 0), SENDS)
def test_what_arrives_never_exceeds_the_bandwidth(
    shape: LinkShape, sends: list[tuple[float, int, LinkShape | None]]
) -> None:
    link, now, n_arrived = Shaper(Random(2), shape), 0.0, 0
    for pause, n_bytes, _ in sends:
        now += pause
        due = link.datagram(n_bytes, now)
        n_arrived += n_bytes if due is not None else 0
        assert due is None or n_arrived <= shape.bandwidth_bytes_per_second * due * (1 + 1e-9) + 1e-6


@given(SHAPES, SENDS)
def test_a_stream_loses_nothing_and_keeps_its_order(
    shape: LinkShape, sends: list[tuple[float, int, LinkShape | None]]
) -> None:
    link, now, last = Shaper(Random(3), shape), 0.0, 0.0
    for pause, n_bytes, other in sends:
        now += pause
        link.shape = other or link.shape
        due = link.segment(n_bytes, now)
        assert due >= max(last, now)
        assert due <= max(last, link._line_free + 1.0 + MAX_RETRANSMITS * RETRANSMIT_SECONDS)
        assert 0 < link.segment_bytes <= link.window_bytes <= MAX_WINDOW_BYTES
        last = due


def test_a_full_queue_drops_by_bytes_or_by_seconds() -> None:
    fast, slow = shaper(bandwidth_bytes_per_second=1 << 20), shaper(bandwidth_bytes_per_second=1500)

    n_fast = sum(fast.datagram(1024, 0.0) is not None for _ in range(1000))
    n_slow = sum(slow.datagram(1500, 0.0) is not None for _ in range(1000))

    assert n_fast == MAX_QUEUE_BYTES // 1024 + 1
    assert n_slow == MAX_QUEUE_SECONDS + 1
    assert fast.datagram(1024, 0.1) is not None


def test_latency_comes_on_top_of_the_time_on_the_line_and_jitter_on_top_of_it() -> None:
    assert shaper(latency_ms=50).datagram(1000, 7.0) == 7.05
    assert shaper(latency_ms=50, bandwidth_bytes_per_second=10_000).datagram(1000, 7.0) == 7.0 + 0.1 + 0.05
    jittery = [shaper(latency_ms=50, jitter_ms=10).datagram(1000, 0.0) or 0 for _ in range(50)]
    assert all(0.05 <= due <= 0.06 for due in jittery)


def test_frames_are_lost_at_about_the_given_rate() -> None:
    link = shaper(loss=0.25)

    n_lost = sum(link.datagram(100, n / 10) is None for n in range(4000))

    assert 850 < n_lost < 1150


def test_a_lost_segment_costs_a_retransmission() -> None:
    link = shaper(loss=0.5)
    delays = [link.segment(1000, float(10 * n)) - 10 * n for n in range(400)]

    assert set(delays) != {0.0}
    assert all(abs(delay / RETRANSMIT_SECONDS - round(delay / RETRANSMIT_SECONDS)) < 1e-6 for delay in delays)


def test_a_stream_of_a_slow_link_is_decided_piece_by_piece() -> None:
    slow, fast = shaper(bandwidth_bytes_per_second=8 << 20), shaper(bandwidth_bytes_per_second=0)

    assert slow.segment_bytes / (8 << 20) <= 0.02
    assert slow.window_bytes / (8 << 20) <= 0.11
    assert fast.window_bytes == MAX_WINDOW_BYTES


def test_changes_leave_the_other_fields_as_they_are() -> None:
    shape = LinkShape(latency_ms=5, loss=0.1)

    assert LinkChanges(down=True).applied_to(shape) == LinkShape(latency_ms=5, loss=0.1, down=True)
    assert LinkChanges().applied_to(shape) == shape


def test_a_shape_that_is_not_possible_names_its_field() -> None:
    nan = float("nan")
    for fault, shape in (
        ("latency", LinkShape(latency_ms=-1)),
        ("latency", LinkShape(latency_ms=nan)),
        ("jitter", LinkShape(jitter_ms=10_001)),
        ("bandwidth", LinkShape(bandwidth_bytes_per_second=5)),
        ("loss", LinkShape(loss=1.1)),
        ("loss", LinkShape(loss=nan)),
    ):
        found = fault_of(shape)
        assert found is not None
        assert found[0] == fault
    assert fault_of(LinkShape(latency_ms=0.5, jitter_ms=10_000, bandwidth_bytes_per_second=1024, loss=1)) is None
