"""Split ring layout and event arithmetic (VIRTIO 2.7)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import vring

U16 = st.integers(0, 0xFFFF)


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_parts_have_the_lengths_of_the_specification(size: int) -> None:
    assert vring.desc_bytes(size) == 16 * size
    assert vring.avail_bytes(size) == 6 + 2 * size
    assert vring.used_bytes(size) == 6 + 8 * size


def test_event_words_end_their_rings() -> None:
    assert vring.used_event(256) + 2 == vring.avail_bytes(256)
    assert vring.avail_event(256) + 2 == vring.used_bytes(256)


@given(U16, st.integers(1, 32768), U16)
def test_need_event_is_true_exactly_when_the_event_index_was_passed(old: int, moved: int, event: int) -> None:
    passed = {(old + step) & 0xFFFF for step in range(moved)}

    assert vring.need_event(event, (old + moved) & 0xFFFF, old) == (event in passed)


@given(U16, U16)
def test_need_event_is_false_when_nothing_moved(index: int, event: int) -> None:
    assert not vring.need_event(event, index, index)


@pytest.mark.parametrize("size", [0, 3, 24, 65536, -1])
def test_sizes_that_are_no_power_of_two_up_to_32768_are_invalid(size: int) -> None:
    assert not vring.valid_queue_size(size)


@pytest.mark.parametrize("size", [1, 2, 128, 32768])
def test_powers_of_two_are_valid_sizes(size: int) -> None:
    assert vring.valid_queue_size(size)
