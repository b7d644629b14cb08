"""Bodies of messages as people read them, from the declarations."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import msgspec

from protocol import messages as m
from protocol import trace as t
from protocol.codes import HCode
from protocol.declare import Call, Space
from protocol.errors import MalformedMessage
from protocol.hcalls import HCALLS
from protocol.links import KVM_GUEST, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, name_of
from protocol.registers import to_signed
from protocol.rtas import RTAS
from protocol.trace_rules import UNDECLARED
from protocol.ucalls import UCALLS

_MAX_ITEMS = 8
"""Of a list in a body; the rest is only counted."""
_MAX_DEPTH = 6
"""No declared body is deeper than 3."""
_RETURN_OUTPUTS = 2


def of_call(link_kind: str, number: int, body: Any) -> str:  # noqa: ANN401
    """A call or event: `H_PUT_TCE(liobn=0x80000000, ...) of vcpu 0`, `EXIT_MMIO_STORE(gpa=0x100, size=4, value=1)`."""
    call = HCALLS.by_number.get(number) or UCALLS.by_number.get(number)
    if call is not None and are_registers(body):
        return _of_registers(link_kind, call, body)
    message = m.MESSAGES.get(number)
    if message is not None:
        return f"{message.name}({_fields(message.body, body)})"
    return f"{_name(number)} {_plain(body)}"


def _of_registers(link_kind: str, call: Call, registers: list[int]) -> str:
    if link_kind == ULTRAVISOR_KVM.name and call.number in HCALLS.by_number and len(registers) >= 2:
        # To kvm the ultravisor puts lpid and vcpu in front (protocol.links).
        return f"{call.describe(registers[2:])} of lpid {registers[0]} vcpu {registers[1]}"
    if link_kind in (KVM_GUEST.name, ULTRAVISOR_GUEST.name) and registers:
        # A guest's processor puts its number in front.
        return f"{call.describe(registers[1:])} of vcpu {registers[0]}"
    return call.describe(registers)


def of_result(call: Call | None, number: int, body: Any, *, is_return: bool) -> tuple[str, str]:  # noqa: ANN401
    """Code and description of an answer. UV_RETURN answers `call`, which is None when the call was not seen."""
    if is_return:
        code, outputs = to_signed(body[0]), body[_RETURN_OUTPUTS:]
        if call is None:
            return Space.HCALL.code(code), Space.HCALL.code(code)
        return call.space.code(code), call.describe_result(code, outputs[: len(call.results)])
    declared = HCALLS.by_number.get(number) or UCALLS.by_number.get(number)
    if declared is not None and are_registers(body) and body:
        return declared.space.code(body[0]), declared.describe_result(body[0], body[1:])
    return _of_reply(number, body)


def _of_reply(number: int, body: Any) -> tuple[str, str]:  # noqa: ANN401
    message = m.MESSAGES.get(number)
    if message is None or message.reply is None or not isinstance(body, list):
        return "?", _plain(body)
    if not body:
        return "withheld", "withheld"
    code = Space.HCALL.code(body[0]) if isinstance(body[0], int) else "answered"
    rest = _fields(message.reply, body, skip=1)
    return (code, f"{code} {rest}".rstrip()) if message.reply.__struct_fields__[0] == "code" else (code, rest or code)


def of_request(request: t.RequestMoved) -> str:
    """A step of a device request."""
    if request.step is t.RequestStep.BEGUN:
        return f"{name_of_request(request)} begins, {request.n_bytes} bytes"
    return f"{name_of_request(request)} ends, {request.n_bytes} bytes written"


def name_of_request(request: t.RequestMoved) -> str:
    """A device request, the same at its begin and its end."""
    return f"{request.device} queue {request.queue} request {request.head}"


def are_registers(body: object) -> bool:
    """Whether a body is what calls carry."""
    return isinstance(body, list) and all(isinstance(value, int) for value in body)


def tamed(value: Any, depth: int = _MAX_DEPTH) -> Any:  # noqa: ANN401
    """A decoded body of whoever sent it, as far as JSON has words for it (bytes apart); what is deeper is left out."""
    if isinstance(value, (list, dict)) and not depth:
        return "..."
    if isinstance(value, list):
        return [tamed(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_key(key): tamed(item, depth - 1) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str, bytes)) else type(value).__name__


def _key(key: Any) -> int | str:  # noqa: ANN401
    """Registers are numbered (gprs); anything else is a name."""
    return key if isinstance(key, int) and not isinstance(key, bool) else str(key)


def _fields(struct: type[m.Body], body: Any, *, skip: int = 0) -> str:  # noqa: ANN401
    """`name=value` of each field that is there."""
    if not isinstance(body, list):
        return _plain(body)
    named = _named(struct, body)
    return ", ".join(f"{name}={value}" for name, value in named[skip:])


def _named(struct: type[m.Body], body: list[Any]) -> list[tuple[str, str]]:
    try:
        whole = msgspec.convert(body, struct)
        values = [getattr(whole, name) for name in struct.__struct_fields__]
    except (msgspec.ValidationError, MalformedMessage):
        values = body
    names = struct.__struct_fields__
    named = [(name, _shown(name, value)) for name, value in zip(names, values, strict=False)]
    return [*named, *(("?", _plain(value)) for value in body[len(names) :])]


def _shown(name: str, value: Any) -> str:  # noqa: ANN401
    if name == "number" and isinstance(value, int):
        return _name(value)
    if name == "token" and isinstance(value, int) and value in RTAS.by_number:
        return RTAS.by_number[value].name
    return _plain(value)


def _name(number: int) -> str:
    return "undeclared" if number == UNDECLARED else name_of(number)


def _plain(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, msgspec.Struct):
        return "(" + ", ".join(_plain(getattr(value, name)) for name in value.__struct_fields__) + ")"
    if isinstance(value, list):
        more = f", and {len(value) - _MAX_ITEMS} more" if len(value) > _MAX_ITEMS else ""
        return f"[{', '.join(_plain(item) for item in value[:_MAX_ITEMS])}{more}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(key)}: {_plain(item)}" for key, item in list(value.items())[:_MAX_ITEMS]) + "}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return str(value) if -_SMALL < value < _SMALL else f"{value:#x}"


_SMALL = 10
"""Alike in both notations."""
SUCCESSES = frozenset({HCode.H_SUCCESS.name, "U_SUCCESS", "answered", "withheld"})
"""Results that are no refusal."""
