"""Bundles: several messages in one frame (protocol.wire)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedMessage
from protocol.wire import MAX_BUNDLED, MessageKind, bundle, encode, is_bundle, unbundle


@given(st.lists(st.binary(max_size=300), max_size=MAX_BUNDLED))
def test_unbundling_gives_the_messages_back(frames: list[bytes]) -> None:
    assert unbundle(bundle(frames)) == frames


@given(st.integers(0, 2), st.integers(0, 2**32), st.integers(0, 2**63), st.lists(st.integers(0, 2**64 - 1)))
def test_no_message_looks_like_a_bundle(kind: int, number: int, correlation: int, body: list[int]) -> None:
    assert not is_bundle(encode(MessageKind(kind), number, correlation, 0, body))


@given(st.binary(max_size=2000))
def test_any_bytes_are_unbundled_completely_or_refused(tail: bytes) -> None:
    frame = bundle([]) + tail

    try:
        frames = unbundle(frame)
    except MalformedMessage:
        return
    assert bundle(frames) == frame


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_bundle_that_was_cut_is_refused(cut: int) -> None:
    with pytest.raises(MalformedMessage):
        unbundle(bundle([b"first", b"second"])[:-cut])


def test_more_messages_than_allowed_are_refused() -> None:
    with pytest.raises(MalformedMessage):
        unbundle(bundle([b""] * (MAX_BUNDLED + 1)))


def test_an_empty_frame_is_no_bundle() -> None:
    assert not is_bundle(b"")
