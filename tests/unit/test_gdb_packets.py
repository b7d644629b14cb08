"""Framing of GDB's remote serial protocol."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.runtime.gdb.packets import MAX_PACKET_BYTES, Decoder, Event, Mark, Packet, encode, escape, unescape


def decoded(data: bytes, decoder: Decoder | None = None) -> list[Event]:
    return list((decoder or Decoder()).feed(data))


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(1, 7))
def test_packets_come_out_as_they_went_in_however_they_are_cut(contents: list[bytes], n_bytes: int) -> None:
    wire = b"".join(encode(content) for content in contents)
    decoder = Decoder()

    events = [event for at in range(0, len(wire), n_bytes) for event in decoder.feed(wire[at : at + n_bytes])]

    assert events == [Packet(content) for content in contents]


@given(st.binary(max_size=200))
def test_escaping_leaves_no_byte_of_framing(data: bytes) -> None:
    assert not {b"$", b"#", b"*"} & {escape(data)[n : n + 1] for n in range(len(escape(data)))}
    assert unescape(escape(data)) == data


@given(st.binary(max_size=400))
def test_any_bytes_are_taken(data: bytes) -> None:
    decoder = Decoder()
    for event in decoder.feed(data):
        assert isinstance(event, Packet | Mark)
    decoder.feed(b"#00#00")

    assert Packet(b"g") in decoded(b"#00" + encode(b"g"), decoder)


def test_a_checksum_that_does_not_fit_is_told_until_it_does_not_count() -> None:
    decoder = Decoder()

    assert decoded(b"$g#00", decoder) == [Mark.BAD]
    decoder.checked = False
    assert decoded(b"$g#00", decoder) == [Packet(b"g")]


def test_marks_between_packets_and_noise() -> None:
    assert decoded(b"+\x00\xff-\x03$g#67+") == [Mark.ACK, Mark.NAK, Mark.INTERRUPT, Packet(b"g"), Mark.ACK]


def test_an_interrupt_byte_inside_a_packet_is_data() -> None:
    assert decoded(encode(b"X0,1:\x03")) == [Packet(b"X0,1:\x03")]


def test_a_packet_that_was_cut_off_gives_way_to_the_next() -> None:
    assert decoded(b"$m100,4$g#67") == [Packet(b"g")]


def test_a_packet_without_end_is_bounded_and_refused() -> None:
    decoder = Decoder()

    assert decoded(b"$" + b"a" * (4 * MAX_PACKET_BYTES), decoder) == []
    assert decoder._data is not None
    assert len(decoder._data) == MAX_PACKET_BYTES
    assert decoded(b"#00", decoder) == [Mark.BAD]
    assert decoded(encode(b"?"), decoder) == [Packet(b"?")]
