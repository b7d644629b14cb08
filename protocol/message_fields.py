"""What a message says, by the names of its declaration: for conditions of breaks.

Of calls with registers the names are those of the arguments, with `vcpu` and `lpid` where the link puts them in front;
of their replies `result` and the names of the results. Of other messages they are the fields of body and reply. Only
numbers and texts count.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from protocol import causes
from protocol.break_expression import Value
from protocol.declare import Call, Caller
from protocol.decoding import DECODE_ERRORS
from protocol.hcalls import HCALLS
from protocol.links import KVM_GUEST, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, LinkKind
from protocol.messages import MESSAGES, Body, Message
from protocol.ucalls import UCALLS
from protocol.wire import Envelope, MessageKind

Declared = Call | Message[Any, Any]
RESULT = "result"


def declared(number: int) -> Declared | None:
    """The call or message of that number."""
    return HCALLS.by_number.get(number) or UCALLS.by_number.get(number) or MESSAGES.get(number)


def argument_types(of: Declared) -> dict[str, type[Value]]:
    """The names that the call itself gives."""
    if isinstance(of, Message):
        return dict(_fields_of(of.body))
    in_front = ["lpid", "vcpu"] if of.number in HCALLS.by_number else ["vcpu"]
    if Caller.HYPERVISOR in of.callers:
        in_front = []
    return dict.fromkeys([*in_front, *(reg.name for reg in (*of.hardware, *of.args))], int)


def result_types(of: Declared) -> dict[str, type[Value]]:
    """The names that its reply gives."""
    if isinstance(of, Call):
        return {RESULT: int, **{reg.name: int for reg in of.results}}
    if of.reply is None:
        return {}
    names = dict(_fields_of(of.reply))
    return {RESULT: int, **names} if names.get("code") is int else names


def fields_of(kind: LinkKind, envelope: Envelope) -> dict[str, Value]:
    """What `envelope` says on a link of `kind`; empty for what is no message of its number."""
    of = declared(envelope.number)
    try:
        body = msgspec.msgpack.decode(envelope.body)
    except DECODE_ERRORS:
        return {}
    if of is None or not isinstance(body, list):
        return {}
    if envelope.kind is MessageKind.REPLY:
        return _result_fields(of, body)
    if isinstance(of, Message):
        return _named(of.body.__struct_fields__, body)
    return _named([*_in_front(kind, of), *(reg.name for reg in (*of.hardware, *of.args))], body)


def lpid_of(fields: dict[str, Value], envelope: Envelope) -> int | None:
    """The partition that a message is about: it names one, or the guest's call that it is done for does."""
    lpid = fields.get("lpid")
    if isinstance(lpid, int):
        return lpid
    return causes.lpid_of(envelope.cause)


def _result_fields(of: Declared, body: list[Any]) -> dict[str, Value]:
    if isinstance(of, Call):
        return _named([RESULT, *(reg.name for reg in of.results)], body)
    fields = {} if of.reply is None else _named(of.reply.__struct_fields__, body)
    return {RESULT: fields["code"], **fields} if isinstance(fields.get("code"), int) else fields


def _in_front(kind: LinkKind, of: Call) -> list[str]:
    if kind is ULTRAVISOR_KVM and of.number in HCALLS.by_number:
        return ["lpid", "vcpu"]
    return ["vcpu"] if kind in (KVM_GUEST, ULTRAVISOR_GUEST) else []


def _named(names: Any, values: list[Any]) -> dict[str, Value]:  # noqa: ANN401
    pairs = zip(names, values, strict=False)
    return {name: value for name, value in pairs if isinstance(value, (int, str))}


def _fields_of(body: type[Body]) -> Iterator[tuple[str, type[Value]]]:
    for name, hint in get_type_hints(body, include_extras=True).items():
        kind = _kind_of(hint)
        if kind is not None and name in body.__struct_fields__:
            yield name, kind


def _kind_of(hint: Any) -> type[Value] | None:  # noqa: ANN401
    if get_origin(hint) is Annotated:
        return _kind_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        kinds = {_kind_of(part) for part in get_args(hint) if part is not type(None)}
        return kinds.pop() if len(kinds) == 1 else None
    if not isinstance(hint, type):
        return None
    if issubclass(hint, str):
        return str
    return int if issubclass(hint, int) or (issubclass(hint, Enum) and issubclass(hint, int)) else None
