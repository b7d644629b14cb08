"""Breaks on messages: what can be asked, and that whatever is written is read or refused with one line."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.break_expression import (
    MAX_CHARS,
    MAX_DEPTH,
    MAX_NTH,
    Both,
    Compare,
    Either,
    Literal,
    Name,
    Not,
    parse,
    tokens,
)
from protocol.breaks import Action, Break, BreakOrder, read_break
from protocol.codes import HCode, UCode
from protocol.errors import UserError
from protocol.hcalls import H_PUT_TCE
from protocol.links import KVM_QEMU, ULTRAVISOR_GUEST, ULTRAVISOR_KVM
from protocol.message_fields import fields_of, lpid_of
from protocol.messages import EXIT_MMIO_STORE
from protocol.registers import to_register
from protocol.roles import Role
from protocol.ucalls import UV_ESM, UV_PAGE_OUT, UV_RETURN, UV_SHARE_PAGE
from protocol.wire import Envelope, MessageKind


def read(text: str, action: str = "stop", code: str | None = None, nth: int = 0) -> Break:
    return read_break(BreakOrder(id=1, text=text, action=action, code=code, nth=nth))


def envelope(kind: MessageKind, number: int, body: object, cause: int = 0) -> Envelope:
    return Envelope(1, kind, number, 1, cause, msgspec.Raw(msgspec.msgpack.encode(body)))


def call(number: int, *registers: int, cause: int = 0) -> Envelope:
    return envelope(MessageKind.CALL, number, list(registers), cause)


PAGE_OUT = call(UV_PAGE_OUT.number, 1, 0x10000, 0x1230000, 0, 16)


def test_a_break_on_a_call_by_its_argument() -> None:
    found = read("ucall UV_PAGE_OUT if gpa == 0x1230000")

    assert found.may_mean(PAGE_OUT)
    assert found.means(fields_of(ULTRAVISOR_KVM, PAGE_OUT))
    assert not found.means(fields_of(ULTRAVISOR_KVM, call(UV_PAGE_OUT.number, 1, 0, 0x1240000, 0, 16)))
    assert not found.may_mean(call(UV_SHARE_PAGE.number, 0, 1, 2))
    assert not found.may_mean(envelope(MessageKind.REPLY, UV_PAGE_OUT.number, [0]))
    assert found.receivers() == {Role.ULTRAVISOR}


def test_a_break_on_a_result_sees_replies() -> None:
    found = read("ucall UV_PAGE_OUT if result == U_RETRY or result == U_BUSY")
    busy = envelope(MessageKind.REPLY, UV_PAGE_OUT.number, [int(UCode.U_BUSY)])

    assert found.replies
    assert found.may_mean(busy)
    assert found.means(fields_of(ULTRAVISOR_KVM, busy))
    assert not found.means(fields_of(ULTRAVISOR_KVM, envelope(MessageKind.REPLY, UV_PAGE_OUT.number, [0])))
    assert found.receivers() == {Role.KVM}


def test_registers_in_front_have_names_on_each_link() -> None:
    reflected = call(H_PUT_TCE.number, 7, 0, 0x80000000, 0x1000, 3)
    assert fields_of(ULTRAVISOR_KVM, reflected) == {
        "lpid": 7,
        "vcpu": 0,
        "liobn": 0x80000000,
        "ioba": 0x1000,
        "tce": 3,
    }
    assert fields_of(ULTRAVISOR_GUEST, call(UV_ESM.number, 0, 0x400000, 0x500000))["vcpu"] == 0
    store = envelope(MessageKind.CALL, EXIT_MMIO_STORE.number, [1 << 40, 4, 9])
    assert fields_of(KVM_QEMU, store) == {"gpa": 1 << 40, "size": 4, "value": 9}


def test_whose_partition_a_message_is_about() -> None:
    assert lpid_of(fields_of(ULTRAVISOR_KVM, PAGE_OUT), PAGE_OUT) == 1
    reply = envelope(MessageKind.REPLY, UV_PAGE_OUT.number, [0], cause=5 << 48 | 3)
    assert lpid_of(fields_of(ULTRAVISOR_KVM, reply), reply) == 5
    assert lpid_of({}, envelope(MessageKind.REPLY, UV_PAGE_OUT.number, [0])) is None


@pytest.mark.parametrize(
    "text",
    [
        "any",
        'any if vm == "vm1"',
        "hcall",
        "hcall if sender == 'vm1/guest' and not (cause == 0)",
        "message EXIT_RTAS",
        "message MAP_FAULT if access == 1",
        "hcall H_GET_TCE if tce > 0x1000",
        "any if result == H_BUSY",
        "any UV_ESM",
        "ucall UV_PAGE_OUT if gpa == 010 or flags != -1 or order == 0X10",
        "message VM_EVENT if receiver != 'vm1/qemu'",
    ],
)
def test_what_can_be_asked(text: str) -> None:
    read(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a break begins with hcall, ucall, message, any: ucall UV_PAGE_OUT if gpa == 0x1230000"),
        ("ucall UV_PAGE_OUR", 'no ultracall UV_PAGE_OUR; did you mean "UV_PAGE_OUT"?'),
        ("hcall UV_ESM", "no hypercall UV_ESM"),
        (
            "ucall UV_PAGE_OUT if gp == 1",
            'UV_PAGE_OUT has no argument gp; did you mean "gpa"?; it has lpid, dst_ra, gpa, flags, order; '
            "its reply has result; every message has sender, receiver, vm, link, cause",
        ),
        ("ucall UV_PAGE_OUT if", "a condition was expected after `if`"),
        ("ucall UV_PAGE_OUT gpa", "`if` was expected, not `gpa`"),
        ("ucall UV_PAGE_OUT if gpa", "a comparison (==, !=, <, <=, >, >=) was expected, not nothing"),
        ("ucall UV_PAGE_OUT if gpa ==", "a name, number or text was expected at the end"),
        ("ucall UV_PAGE_OUT if gpa == 'x'", 'gpa and "x" cannot be compared: one is a text, one a number'),
        ("ucall UV_PAGE_OUT if gpa == 1 2", "`2` is one too many; conditions are joined with `and`, `or`"),
        ("ucall UV_PAGE_OUT if (gpa == 1", "a parenthesis is not closed"),
        ("ucall UV_PAGE_OUT if gpa == 1 and", "a name, number or text was expected at the end"),
        ("ucall UV_PAGE_OUT if or == 1", "a name, number or text was expected, not `or`"),
        ("ucall UV_PAGE_OUT if gpa $ 1", "column 25: nothing can begin with '$' here"),
        ("ucall UV_PAGE_OUT if __import__('os')", "UV_PAGE_OUT has no argument __import__"),
        ("any if gpa == 1", "no message has gpa; all have sender, receiver, vm, link, cause, result; name one"),
        ("ucall UV_PAGE_OUT if gpa == 1 and result == 0", "gpa comes with the call and result with the reply"),
        ("hcall H_PUT_TCE if " + "(" * 30, f"more than {MAX_DEPTH} parentheses"),
        ("any if cause == 1" + " " * MAX_CHARS + "1", "a break of "),
    ],
)
def test_what_cannot_be_asked_is_refused_with_one_line(text: str, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        read(text)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("action", "code", "text", "problem"),
    [
        ("halt", None, "any", 'no action "halt"; there are: stop, stop-cluster, log, count, drop, fail'),
        ("fail", "U_RETRI", "ucall UV_PAGE_OUT", 'no code U_RETRI of a ucall; did you mean "U_RETRY"?'),
        ("fail", "U_RETRY", "hcall H_PUT_TCE", "no code U_RETRY of a hcall"),
        ("fail", None, "hcall H_PUT_TCE", "no code None of a hcall"),
        ("fail", "H_BUSY", "any", "only calls can fail with a code"),
        ("fail", "U_BUSY", "ucall if result == 0", "only calls can fail with a code"),
        ("log", "U_BUSY", "ucall", "a code is given to the action `fail` alone"),
        (
            "fail",
            "H_BUSY",
            "message DOORBELL_RUNG",
            "DOORBELL_RUNG has no answer and cannot fail; `--do drop` loses it",
        ),
    ],
)
def test_an_action_that_cannot_be_is_refused(action: str, code: str | None, text: str, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        read(text, action, code)
    assert problem in str(refused.value)


def test_an_action_with_its_code() -> None:
    found = read("hcall H_PUT_TCE", "fail", "H_PERMISSION")
    assert (found.action, found.code) == (Action.FAIL, HCode.H_PERMISSION)
    for nth in (-1, MAX_NTH + 1):
        with pytest.raises(UserError, match="time is none"):
            read("any", nth=nth)


def test_a_code_in_a_register_is_compared_as_the_code_that_it_is() -> None:
    returned = call(UV_RETURN.number, to_register(HCode.H_PARAMETER), 77)
    fields = fields_of(ULTRAVISOR_KVM, returned)

    for text, fits in (("r0 == H_PARAMETER", True), ("r0 != H_PARAMETER", False), ("r0 == 4", False)):
        assert read(f"ucall UV_RETURN if {text}").means(fields) is fits, text


NAMES = st.sampled_from(["gpa", "flags", "order"])
OPERANDS = st.one_of(NAMES.map(Name), st.integers(0, 1 << 64).map(Literal))
CONDITIONS = st.recursive(
    st.builds(Compare, OPERANDS, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), OPERANDS),
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Both(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Either(tuple(parts))),
    ),
    max_leaves=6,
)


def written(condition: object) -> str:
    """A condition as text, every part in parentheses."""
    match condition:
        case Compare(left, sign, right):
            return f"{written(left)} {sign} {written(right)}"
        case Both(parts):
            return " and ".join(f"({written(part)})" for part in parts)
        case Either(parts):
            return " or ".join(f"({written(part)})" for part in parts)
        case Not(part):
            return f"not ({written(part)})"
        case Name(name):
            return name
        case Literal(value):
            return hex(value) if isinstance(value, int) else f'"{value}"'
    raise AssertionError(condition)


def in_python(condition: object, fields: dict[str, int]) -> bool:
    """What Python makes of the same text, in which every name is known."""
    return bool(eval(written(condition), {"__builtins__": {}}, fields))


@given(CONDITIONS, st.fixed_dictionaries({"gpa": st.integers(0, 9), "flags": st.integers(0, 9), "order": st.just(16)}))
def test_a_condition_means_what_python_would(condition: Both | Either | Not | Compare, fields: dict[str, int]) -> None:
    text = written(condition)
    if len(text) > MAX_CHARS or text.count("(") > MAX_DEPTH:
        return
    parsed = parse(tokens(text), lambda _name: int)

    assert parsed.holds(dict(fields)) is in_python(condition, fields)


@given(st.text(max_size=60) | st.text("0123456789xX-_\"'()=<>! aifndorgp", max_size=60))
def test_s5_any_text_is_read_or_refused(text: str) -> None:
    for start in ("", "ucall UV_PAGE_OUT if ", "any if "):
        try:
            read(start + text)
        except UserError as refused:
            assert str(refused)


@given(st.sampled_from(list(MessageKind)), st.integers(0, 1 << 20), st.binary(max_size=40))
def test_s5_fields_of_any_message_are_found_or_none(kind: MessageKind, number: int, body: bytes) -> None:
    for link in (ULTRAVISOR_KVM, ULTRAVISOR_GUEST, KVM_QEMU):
        fields_of(link, Envelope(1, kind, number, 0, 0, msgspec.Raw(body)))
