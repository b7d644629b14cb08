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
    header_of,
)

HELLO = Hello(machine="pseries-7.2", vm="vm1", page_bytes=65536, n_pages=4096, secure=True, capabilities=["events"])
UNKNOWN = 200


def chunk_of(kind: FrameKind, payload: bytes) -> bytes:
    return header_of(kind, len(payload)) + payload


FIRST = chunk_of(FrameKind.HELLO, HELLO.encode())


@pytest.fixture
def reader() -> FrameReader:
    """After the hello."""
    reader = FrameReader()
    assert reader.read(FIRST) == Frame(FrameKind.HELLO, memoryview(HELLO.encode()))
    return reader


@given(st.sampled_from(list(FrameKind)), st.binary(max_size=40))
def test_a_frame_is_what_was_sent(kind: FrameKind, payload: bytes) -> None:
    reader = FrameReader()
    reader.read(FIRST)

    assert reader.read(chunk_of(kind, payload)) == Frame(kind, memoryview(payload))


def test_what_a_later_version_marks_as_optional_is_skipped(reader: FrameReader) -> None:
    assert reader.read(HEADER.pack(UNKNOWN, 0, FrameFlag.OPTIONAL, 3) + b"new") is None
    assert reader.read(chunk_of(FrameKind.START, b"")) == Frame(FrameKind.START, memoryview(b""))


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (HEADER.pack(UNKNOWN, 0, 0, 0), "kind 200, which this version does not know"),
        (HEADER.pack(FrameKind.PAGES, 0, 0, MAX_PAYLOAD_BYTES + 1), "a frame of 1179649 bytes"),
        (HEADER.pack(FrameKind.PAGES, 1, 0, 0), "of stream 1"),
        (HEADER.pack(FrameKind.PAGES, 0, 0x8000, 0), "flags 0x8000"),
        (HEADER.pack(FrameKind.PAGES, 0, 0, 3) + b"four", "4 bytes where a frame says 3"),
        (HEADER.pack(FrameKind.PAGES, 0, 0, 5) + b"four", "4 bytes where a frame says 5"),
        (b"short", "a frame of 5 bytes"),
    ],
)
def test_a_frame_that_cannot_be_read_ends_the_stream(reader: FrameReader, chunk: bytes, said: str) -> None:
    with pytest.raises(MalformedMessage, match=said):
        reader.read(chunk)


def test_a_stream_begins_with_a_hello() -> None:
    with pytest.raises(MalformedMessage, match="does not begin with a hello"):
        FrameReader().read(chunk_of(FrameKind.PAGES, b""))


@given(st.binary(max_size=200))
def test_noise_is_refused_or_a_hello(noise: bytes) -> None:
    try:
        frame = FrameReader().read(noise)
    except MalformedMessage:
        return
    assert frame is not None
    assert frame.kind is FrameKind.HELLO


@given(st.binary(max_size=200))
def test_a_hello_that_is_none_is_refused(noise: bytes) -> None:
    with pytest.raises(MalformedMessage, match="no hello"):
        Hello.decode(noise)


def test_what_is_said_of_a_hello_that_is_none_is_short() -> None:
    with pytest.raises(MalformedMessage) as refused:
        Hello.decode(b'{"' + b"x" * (MAX_PAYLOAD_BYTES - 10) + b'": 1}')

    assert len(str(refused.value)) < 1000


def test_a_hello_says_what_it_is_of() -> None:
    assert Hello.decode(HELLO.encode()) == HELLO
    with pytest.raises(MalformedMessage, match="no hello"):
        Hello.decode(HELLO.encode().replace(b"pefbox-migration", b"someones-stream"))


def test_a_payload_that_is_too_long_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="in a frame of at most"):
        header_of(FrameKind.PAGES, MAX_PAYLOAD_BYTES + 1)
