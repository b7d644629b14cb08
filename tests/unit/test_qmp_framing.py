"""The QMP framer: message ends in any cut of the stream, recovery, bounds."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.qemu.qmp.framing import MAX_DEPTH, MAX_MESSAGE_BYTES, Framer, Malformed

Found = list[bytes | Malformed]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=5)
separators = st.sampled_from([b"", b"\n", b"\r\n", b" ", b"\t \n"])


def frames(pieces: list[bytes]) -> Found:
    framer = Framer()
    found: Found = []
    for piece in pieces:
        framer.feed(piece)
        while (message := framer.next_message()) is not None:
            found.append(message)
    return found


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


@given(st.lists(st.tuples(json_objects, separators, st.booleans()), max_size=6), st.lists(st.integers(0), max_size=12))
def test_messages_come_out_whole_wherever_the_stream_is_cut(
    messages: list[tuple[dict[str, object], bytes, bool]], places: list[int]
) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only).encode() for value, _, ascii_only in messages]
    stream = b"".join(text + separator for text, (_, separator, _) in zip(texts, messages, strict=True))

    assert frames(cut(stream, places)) == texts


@given(st.binary(max_size=400), st.lists(st.integers(0), max_size=8))
def test_any_bytes_give_the_same_frames_however_they_are_cut(stream: bytes, places: list[int]) -> None:
    assert frames(cut(stream, places)) == frames([stream])


@given(
    st.lists(st.sampled_from(list(b'{}[]"\\\n\xff a1:,')), max_size=200).map(bytes), st.sampled_from([b"\xff", b"\x01"])
)
def test_a_recovery_byte_makes_the_next_message_readable_after_anything(noise: bytes, recovery: bytes) -> None:
    found = frames([noise + recovery + recovery + b'{"execute":"stop"}'])

    assert found[-1] == b'{"execute":"stop"}'


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"hello world\r\n{}", [Malformed.NOT_AN_OBJECT, b"{}"]),
        (b"one\ntwo\n", [Malformed.NOT_AN_OBJECT, Malformed.NOT_AN_OBJECT]),
        (b"} {}", [Malformed.NOT_AN_OBJECT, b"{}"]),
        (b"\xff{}", [Malformed.STRAY_BYTE, b"{}"]),
        (b'{"execute": "qu\n{}', [Malformed.STRAY_BYTE, b"{}"]),
        (b'{"a": {"b\xff{}', [Malformed.STRAY_BYTE, b"{}"]),
        (b'{"a":\n\t1}', [b'{"a":\n\t1}']),
        (b'{"a": "}\\"}"}{}', [b'{"a": "}\\"}"}', b"{}"]),
        (b'{"a": "\\\n{}', [Malformed.STRAY_BYTE, b"{}"]),
        (b"[1, {}]{}", [b"[1, {}]", b"{}"]),
    ],
)
def test_input_that_is_no_message_is_named_once_and_left_behind(stream: bytes, expected: Found) -> None:
    assert frames([stream]) == expected
    assert frames([bytes((byte,)) for byte in stream]) == expected


def test_a_message_of_exactly_the_longest_length_is_kept() -> None:
    longest = b'{"a":"' + b"x" * (MAX_MESSAGE_BYTES - 8) + b'"}'

    assert frames([longest]) == [longest]


def test_a_message_one_byte_longer_is_refused_and_skipped_to_its_end() -> None:
    too_long = b'{"a":"' + b"}" * (MAX_MESSAGE_BYTES - 7) + b'"}'

    assert frames([too_long + b"{}"]) == [Malformed.TOO_LONG, b"{}"]


def test_a_message_without_end_is_refused_once_and_not_kept() -> None:
    framer = Framer()
    framer.feed(b'{"a":"')
    assert framer.next_message() is None

    found: Found = []
    for _ in range(100):
        framer.feed(b"x" * MAX_MESSAGE_BYTES)
        while (message := framer.next_message()) is not None:
            found.append(message)

    assert found == [Malformed.TOO_LONG]
    assert len(framer._message) + len(framer._data) - framer._at <= MAX_MESSAGE_BYTES


def test_nesting_beyond_the_limit_is_refused_and_skipped_to_its_end() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    too_deep = b"[" * 5000 + b"]" * 5000

    assert frames([deepest + too_deep + b"{}"]) == [deepest, Malformed.TOO_DEEP, b"{}"]


@pytest.mark.parametrize("pattern", [b"[]", b'""', b'"\\"', b"{", b"x", b"}", b"\xff"])
def test_a_hostile_piece_takes_far_less_than_the_loop_may_be_held(pattern: bytes) -> None:
    framer = Framer()
    framer.feed(b"{" + pattern * (4096 // len(pattern)))

    start = time.process_time()
    while framer.next_message() is not None:
        pass

    assert time.process_time() - start < 0.05
