"""The virtual terminal: register packing, retained text, bounds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.codes import HCode
from protocol.errors import MalformedMessage, UserError
from services.kvm.terminal import VTY_UNIT, Terminal
from services.runtime.text_buffers import INPUT_BYTES, OUTPUT_BYTES, TextState
from shared.typed_text import MAX_TEXTS, Offer, TypedText

SUCCESS = [HCode.H_SUCCESS]
PARAMETER = [HCode.H_PARAMETER]


def show(terminal: Terminal, data: bytes, termno: int = VTY_UNIT) -> list[int]:
    padded = data.ljust(16, b"\xee")
    return terminal.h_put_term_char(
        termno, len(data), int.from_bytes(padded[:8], "big"), int.from_bytes(padded[8:], "big")
    )


def take(terminal: Terminal) -> bytes:
    code, n_bytes, high, low = terminal.h_get_term_char(VTY_UNIT)
    assert code == HCode.H_SUCCESS
    return (high.to_bytes(8, "big") + low.to_bytes(8, "big"))[:n_bytes]


def test_the_first_character_is_the_highest_byte() -> None:
    terminal = Terminal()

    assert terminal.h_put_term_char(VTY_UNIT, 9, 0x4142434445464748, 0x4900000000000000) == SUCCESS

    assert terminal.read().data == b"ABCDEFGHI"


def test_typed_text_arrives_sixteen_bytes_at_a_time() -> None:
    terminal = Terminal()
    terminal.type_in(TypedText(b"0123456789abcdefgh").offer())

    assert terminal.h_get_term_char(VTY_UNIT) == [HCode.H_SUCCESS, 16, 0x3031323334353637, 0x3839616263646566]
    assert terminal.h_get_term_char(VTY_UNIT) == [HCode.H_SUCCESS, 2, 0x6768000000000000, 0]
    assert terminal.h_get_term_char(VTY_UNIT) == [HCode.H_SUCCESS, 0, 0, 0]


def test_firmware_names_the_terminal_0() -> None:
    terminal = Terminal()

    assert show(terminal, b"SLOF", termno=0) == SUCCESS
    assert terminal.read().data == b"SLOF"


@pytest.mark.parametrize("termno", [1, VTY_UNIT + 1, 1 << 63])
def test_another_terminal_is_refused(termno: int) -> None:
    terminal = Terminal()

    assert show(terminal, b"x", termno) == PARAMETER
    assert terminal.h_get_term_char(termno) == PARAMETER


@pytest.mark.parametrize("n_bytes", [17, 1 << 40])
def test_more_than_sixteen_bytes_are_refused(n_bytes: int) -> None:
    terminal = Terminal()

    assert terminal.h_put_term_char(VTY_UNIT, n_bytes, 0, 0) == PARAMETER
    assert terminal.end == 0


def test_a_full_buffer_drops_its_oldest_text_and_never_refuses() -> None:
    terminal = Terminal()
    for _ in range(OUTPUT_BYTES // 16):
        show(terminal, b"0123456789abcdef")

    assert show(terminal, b"the end") == SUCCESS

    text = terminal.read()
    assert text.sequence == terminal.start == 7
    assert len(text.data) == OUTPUT_BYTES
    assert text.data.endswith(b"the end")


def test_a_late_reader_gets_the_retained_text_and_then_follows() -> None:
    terminal = Terminal()
    show(terminal, b"early ")

    first = terminal.read()
    show(terminal, b"late")
    second = terminal.read(first.next_sequence)

    assert (first.data, second.data) == (b"early ", b"late")
    assert terminal.read(second.next_sequence).data == b""


def test_a_reader_that_fell_behind_sees_the_gap() -> None:
    terminal = Terminal()
    for _ in range(OUTPUT_BYTES // 16 + 10):
        show(terminal, b"0123456789abcdef")

    assert terminal.read(5, 16).sequence == 160


def test_a_read_beyond_the_end_is_empty() -> None:
    terminal = Terminal()
    show(terminal, b"abc")

    assert terminal.read(100) == (3, b"")


def test_a_read_is_limited() -> None:
    terminal = Terminal()
    show(terminal, b"abcdef")

    assert terminal.read(1, 2) == (1, b"bc")
    assert terminal.read(1, -1) == (1, b"")


def test_typed_text_that_does_not_fit_is_not_taken() -> None:
    terminal = Terminal()

    assert terminal.type_in(TypedText(b"x" * (INPUT_BYTES - 1)).offer()) == INPUT_BYTES - 1
    assert terminal.type_in(TypedText(b"yz").offer()) == 1
    assert terminal.type_in(TypedText(b"z").offer()) == 0
    take(terminal)
    assert terminal.type_in(TypedText(b"z" * 20).offer()) == 16


def test_a_text_that_is_offered_again_is_typed_once() -> None:
    """Its answer did not come in time, whoever typed it does not know why."""
    terminal = Terminal()
    text = TypedText(b"x" * (INPUT_BYTES - 2) + b"write\r")

    assert terminal.type_in(text.offer()) == INPUT_BYTES
    assert terminal.type_in(text.offer()) == INPUT_BYTES
    text.took(INPUT_BYTES)
    assert [terminal.type_in(text.offer()) for _ in range(2)] == [0, 0]
    while take(terminal):
        pass
    assert terminal.type_in(text.offer()) == 4
    assert terminal.type_in(text.offer()) == 4
    assert take(terminal) == b"ite\r"


def test_the_other_host_s_terminal_knows_what_was_typed_here() -> None:
    terminal, other = Terminal(), Terminal()
    text = TypedText(b"reboot\r")
    terminal.type_in(text.offer())
    other.load(msgspec.msgpack.decode(msgspec.msgpack.encode(terminal.save()), type=TextState))

    assert other.type_in(text.offer()) == 7
    assert take(other) == b"reboot\r"


def test_the_oldest_of_many_texts_is_forgotten() -> None:
    terminal = Terminal()
    for number in range(MAX_TEXTS + 1):
        terminal.type_in(Offer(number, 0, b"a"))

    assert len(terminal.save().texts) == MAX_TEXTS
    assert 0 not in terminal.save().texts


@pytest.mark.parametrize("wrong", [{"data": "text"}, {"at": -1}, {"text": 1 << 63}, {"at": None}])
def test_s5_an_offer_of_anything_else_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Offer.of(TypedText(b"ls").offer().arguments() | wrong)


def test_a_reset_forgets_what_was_typed_only() -> None:
    terminal = Terminal()
    show(terminal, b"printed")
    terminal.type_in(TypedText(b"typed").offer())

    terminal.reset()

    assert terminal.read().data == b"printed"
    assert take(terminal) == b""


def test_a_loaded_terminal_goes_on() -> None:
    terminal = Terminal()
    show(terminal, b"printed")
    terminal.type_in(TypedText(b"typed").offer())

    fresh = Terminal()
    fresh.load(terminal.save())
    show(fresh, b"!")

    assert fresh.read(3).data == b"nted!"
    assert take(fresh) == b"typed"


@pytest.mark.parametrize(
    "state",
    [
        TextState(-1, b"", b""),
        TextState(0, bytes(OUTPUT_BYTES + 1), b""),
        TextState(0, b"", bytes(INPUT_BYTES + 1)),
        TextState(0, b"", b"", dict.fromkeys(range(MAX_TEXTS + 1), 0)),
        TextState(0, b"", b"", {0: -1}),
        TextState(0, b"", b"", {1 << 63: 0}),
    ],
)
def test_a_state_larger_than_the_buffers_is_refused(state: TextState) -> None:
    with pytest.raises(MalformedMessage):
        Terminal().load(state)


U64 = st.integers(0, (1 << 64) - 1)


@given(termno=st.sampled_from([0, VTY_UNIT]), n_bytes=U64, high=U64, low=U64)
def test_any_registers_end_in_a_code(termno: int, n_bytes: int, high: int, low: int) -> None:
    expected = SUCCESS if n_bytes <= 16 else PARAMETER

    assert Terminal().h_put_term_char(termno, n_bytes, high, low) == expected


class AgainstTwoStreams(RuleBasedStateMachine):
    """Output is a suffix of all that was printed; input is all that was taken, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal = Terminal()
        self.printed = b""
        self.typed = b""
        self.received = b""

    @rule(data=st.binary(max_size=16), times=st.integers(1, 2000))
    def guest_prints(self, data: bytes, times: int) -> None:
        for _ in range(times):
            assert show(self.terminal, data) == SUCCESS
        self.printed += data * times

    @rule(data=st.binary(max_size=INPUT_BYTES))
    def person_types(self, data: bytes) -> None:
        self.typed += data[: self.terminal.type_in(TypedText(data).offer())]

    @rule(times=st.integers(1, 100))
    def guest_reads(self, times: int) -> None:
        for _ in range(times):
            self.received += take(self.terminal)

    @invariant()
    def output_is_a_suffix(self) -> None:
        text = self.terminal.read()
        assert text.next_sequence == self.terminal.end == len(self.printed)
        assert text.data == self.printed[-OUTPUT_BYTES:]

    @invariant()
    def input_is_a_prefix(self) -> None:
        assert self.typed.startswith(self.received)
        assert len(self.typed) - len(self.received) <= INPUT_BYTES


TestAgainstTwoStreams = AgainstTwoStreams.TestCase
