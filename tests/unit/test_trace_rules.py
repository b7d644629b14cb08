"""S1: what of a secure VM's messages is written into a trace, whoever sends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.codes import HCode
from protocol.declare import Call, Caller, Kind
from protocol.hcalls import H_PUT_TCE, H_RANDOM, H_SVM_PAGE_IN, HCALLS
from protocol.links import QEMU_MIGRATION, ULTRAVISOR_GUEST, LinkKind
from protocol.trace_rules import _FIELDS_LEFT, UNDECLARED, written_form
from protocol.ucalls import UCALLS, UV_ESMB_GET_FILE
from protocol.wire import MessageKind, decode, encode
from tests.unit.trace_rig import Recording, events_of

SECRET = 0x5EC12E7_5EC12E7
GUEST_CALLS = [call for call in (*HCALLS, *UCALLS) if call.callers & {Caller.VM, Caller.SVM}]
STATE = b"all registers of a secure VM"


def body_of(written: bytes) -> Any:  # noqa: ANN401
    return msgspec.msgpack.decode(decode(written).body)


@pytest.mark.parametrize("call", GUEST_CALLS, ids=lambda call: call.name)
def test_s1_of_a_call_nothing_is_written_but_its_declared_registers(call: Call) -> None:
    declared = [0] * (1 + len(call.hardware) + call.n_args)
    results = [0] * (1 + len(call.results))
    more = [SECRET] * (16 - len(declared))

    asked, is_less = written_form(encode(MessageKind.CALL, call.number, 1, 2, [*declared, *more]))
    answered, _ = written_form(encode(MessageKind.REPLY, call.number, 1, 2, [*results, *more][:16]))

    assert is_less
    assert SECRET not in body_of(asked)
    assert SECRET not in body_of(answered)
    assert (decode(asked).correlation, decode(asked).cause) == (1, 2)


def test_a_call_with_its_declared_registers_is_written_as_it_is() -> None:
    frame = encode(MessageKind.CALL, H_PUT_TCE.number, 1, 2, [0, 1, 2, 3])

    assert written_form(frame) == (frame, False)


@pytest.mark.parametrize("call", [H_RANDOM, UV_ESMB_GET_FILE], ids=lambda call: call.name)
def test_s1_a_private_call_is_written_without_what_it_says_and_gives(call: Call) -> None:
    asked, _ = written_form(encode(MessageKind.CALL, call.number, 1, 2, [0, *[SECRET] * 10]))
    answered, is_less = written_form(encode(MessageKind.REPLY, call.number, 1, 2, [0, *[SECRET] * len(call.results)]))

    assert body_of(asked) == body_of(answered) == [0]
    assert is_less


def test_s1_a_call_that_is_not_a_guest_s_is_written_without_its_registers() -> None:
    written, _ = written_form(encode(MessageKind.CALL, H_SVM_PAGE_IN.number, 1, 2, [0, SECRET, SECRET, SECRET]))

    assert body_of(written) == [0]


def test_s1_a_number_that_nobody_declared_is_not_written() -> None:
    written, is_less = written_form(encode(MessageKind.CALL, SECRET, 1, 2, [SECRET]))

    assert (decode(written).number, body_of(written), is_less) == (UNDECLARED, [], True)


@pytest.mark.parametrize(
    ("kind", "number", "body"),
    [
        (MessageKind.REPLY, m.SVM_FREEZE.number, m.SavedProcessor(HCode.H_SUCCESS, STATE)),
        (MessageKind.CALL, m.SVM_LOAD.number, m.LoadProcessorBody(0, STATE)),
        (MessageKind.CALL, m.SVM_LOAD.number, STATE),
        (MessageKind.CALL, m.SVM_LOAD.number, [0, 1, STATE]),
        (MessageKind.EVENT, m.GUEST_CRASHED.number, m.CrashBody(0, STATE.decode())),
        (MessageKind.CALL, m.MIGRATION_KEY.number, m.MigrationKeyBody(STATE.ljust(32))),
        (MessageKind.REPLY, m.MAP_INVALIDATE.number, [0, STATE]),
        (MessageKind.CALL, H_PUT_TCE.number, [STATE]),
        (MessageKind.CALL, H_PUT_TCE.number, {"a": STATE}),
    ],
    ids=str,
)
def test_s1_registers_keys_texts_and_what_is_no_body_are_not_written(kind: MessageKind, number: int, body: Any) -> None:  # noqa: ANN401
    written, is_less = written_form(encode(kind, number, 7, 0, body))

    assert STATE not in written
    assert is_less


@given(st.binary(max_size=200))
def test_s1_what_is_no_message_is_not_written(frame: bytes) -> None:
    written, is_less = written_form(frame)

    if is_less:
        assert written == b"" or len(written) <= len(frame) + 8
    else:
        assert written == frame
        assert decode(frame).number


@pytest.mark.parametrize("kind", [ULTRAVISOR_GUEST, QEMU_MIGRATION], ids=lambda kind: kind.name)
def test_s1_the_tracer_writes_the_confidential_links_by_these_rules(kind: Any, tmp_path: Path) -> None:  # noqa: ANN401
    recording = Recording(tmp_path, "alpha/ultravisor")
    link = recording.link(kind)
    recording.came(link, MessageKind.CALL, m.MIGRATION_KEY.number, 1, [STATE.ljust(32)])
    recording.came(link, MessageKind.CALL, m.SVM_LOAD.number, 2, [0, STATE])
    recording.saw(link, STATE)

    path = recording.close()

    assert STATE not in path.read_bytes()
    assert [event.withheld for event in events_of(path) if event.is_message] == [True, True, True]


def opaque_fields(struct: type[m.Body]) -> list[int]:
    """Which fields of a body are bytes or text: nobody knows what is in them."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    return [index for index, field in enumerate(info.fields) if is_opaque(field.type)]


def is_opaque(kind: msgspec.inspect.Type) -> bool:
    """Whether bytes or text are anywhere in it."""
    match kind:
        case msgspec.inspect.BytesType() | msgspec.inspect.StrType() | msgspec.inspect.AnyType():
            return True
        case msgspec.inspect.ListType():
            return is_opaque(kind.item_type)
        case msgspec.inspect.DictType():
            return is_opaque(kind.key_type) or is_opaque(kind.value_type)
        case msgspec.inspect.UnionType():
            return any(is_opaque(one) for one in kind.types)
        case msgspec.inspect.StructType():
            return any(is_opaque(field.type) for field in kind.fields)
    return False


@pytest.mark.parametrize("link", [ULTRAVISOR_GUEST, QEMU_MIGRATION], ids=lambda link: link.name)
def test_s1_of_no_declared_message_bytes_or_text_are_written(link: LinkKind) -> None:
    """Also of those that are declared later: who adds one has to say what of it is written."""
    for number in link.upward | link.downward:
        message = m.MESSAGES.get(number)
        if message is None:
            continue
        asked = MessageKind.EVENT if message.reply is None else MessageKind.CALL
        for kind, body in ((asked, message.body), (MessageKind.REPLY, message.reply)):
            opaque = [] if body is None else opaque_fields(body)
            assert not opaque or _FIELDS_LEFT[kind, number] <= opaque[0], message.name


def test_s1_an_ultracall_of_a_secure_vm_with_text_in_its_registers_is_private() -> None:
    for call in UCALLS:
        if Caller.SVM in call.callers and any(reg.kind is Kind.TEXT for reg in (*call.args, *call.results)):
            assert call.private, call.name
