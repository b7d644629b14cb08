"""Frames between two qemus, read from bytes that may be anything (S5)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedMessage
from services.qemu.migration.stream import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameFlag,
    FrameKind,
    FrameReader,
    Hello,
    encode,
)

HELLO = Hello(machine="pseries-7.2", vm="vm1", page_bytes=65536, n_pages=4096, secure=True, capabilities=["events"])
FIRST = encode(FrameKind.HELLO, HELLO.encode())
FRAMES = st.lists(st.tuples(st.sampled_from(list(FrameKind)), st.binary(max_size=40)), max_size=10)
UNKNOWN = 200


@given(FRAMES, st.lists(st.integers(1, 20)))
def test_frames_come_out_whole_wherever_the_stream_is_cut(
    frames: list[tuple[FrameKind, bytes]], cuts: list[int]
) -> None:
    stream = FIRST + b"".join(encode(kind, payload) for kind, payload in frames)
    reader, found = FrameReader(), []
    for n_bytes in [*cuts, len(stream)]:
        found += reader.feed(stream[:n_bytes])
        stream = stream[n_bytes:]

    assert found == [Frame(FrameKind.HELLO, HELLO.encode()), *(Frame(*frame) for frame in frames)]
    assert not reader.within_frame


def test_a_stream_that_ends_within_a_frame_was_cut() -> None:
    reader = FrameReader()
    assert reader.feed(FIRST[:-1]) == []
    assert reader.within_frame


def test_what_a_later_version_marks_as_optional_is_skipped() -> None:
    later = HEADER.pack(UNKNOWN, 0, FrameFlag.OPTIONAL, 3) + b"new"

    frames = FrameReader().feed(FIRST + later + encode(FrameKind.START, b""))

    assert [frame.kind for frame in frames] == [FrameKind.HELLO, FrameKind.START]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (HEADER.pack(UNKNOWN, 0, 0, 0), "kind 200, which this version does not know"),
        (HEADER.pack(FrameKind.PAGES, 0, 0, MAX_PAYLOAD_BYTES + 1), "a frame of 1179649 bytes"),
        (HEADER.pack(FrameKind.PAGES, 1, 0, 0), "of stream 1"),
        (HEADER.pack(FrameKind.PAGES, 0, 0x8000, 0), "flags 0x8000"),
    ],
)
def test_a_frame_that_cannot_be_read_ends_the_stream_at_its_header(header: bytes, said: str) -> None:
    reader = FrameReader()
    reader.feed(FIRST)

    with pytest.raises(MalformedMessage, match=said):
        reader.feed(header)


def test_a_stream_begins_with_a_hello() -> None:
    with pytest.raises(MalformedMessage, match="does not begin with a hello"):
        FrameReader().feed(encode(FrameKind.PAGES, b""))


@given(st.binary(max_size=200))
def test_noise_is_refused_or_waits_for_more(noise: bytes) -> None:
    reader = FrameReader()
    try:
        frames = reader.feed(noise)
    except MalformedMessage:
        return
    assert reader.within_frame or not noise or frames


@given(st.binary(max_size=200))
def test_a_hello_that_is_none_is_refused(noise: bytes) -> None:
    with pytest.raises(MalformedMessage, match="no hello"):
        Hello.decode(noise)


def test_a_hello_says_what_it_is_of() -> None:
    assert Hello.decode(HELLO.encode()) == HELLO
    with pytest.raises(MalformedMessage, match="no hello"):
        Hello.decode(HELLO.encode().replace(b"pefbox-migration", b"someones-stream"))


def test_a_payload_that_is_too_long_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="in a frame of at most"):
        encode(FrameKind.PAGES, bytes(MAX_PAYLOAD_BYTES + 1))
