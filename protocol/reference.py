"""Renders the protocol reference from the declarations: `python -m protocol.reference > docs/protocol.md`.

A test holds the committed page against `render()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from protocol import wire
from protocol.declare import Call, CallTable, Memory, Reg, Space
from protocol.hcalls import HCALLS
from protocol.links import GUEST_WHILE_SECURE, LINK_KINDS, LinkKind, name_of
from protocol.messages import MESSAGES, Body, Message, Register
from protocol.rtas import RTAS, SERVED_BY
from protocol.ucalls import UCALLS
from protocol.unhandled import UNHANDLED, Reason, names_of

_HEADER = """# Protocol reference

Generated from the declarations in `protocol/` by `python -m protocol.reference > docs/protocol.md`. Do not edit.
"""

_ABI = {
    Space.HCALL: "`sc 1`. R3 number, arguments from R4, result code in R3, outputs from R4. An unknown or unhandled "
    "number gets `H_FUNCTION`; too many open calls get `H_BUSY`.",
    Space.UCALL: "`sc 2`. R3 number, arguments from R4, result code in R3, outputs from R4. An unknown or unhandled "
    "number gets `U_FUNCTION`, a caller that may not issue the call gets `U_PERMISSION`, too many open calls get "
    "`U_BUSY`.",
    Space.RTAS: "H_RTAS with the address of a block of big-endian words in guest memory: token, number of arguments, "
    "number of return words, arguments, return words. The first return word is the status, which is not repeated in "
    "the results below. An unknown token gets `PARAMETER_ERROR`.",
}
_TITLES = {Space.HCALL: "Hypercalls", Space.UCALL: "Ultracalls", Space.RTAS: "RTAS services"}


def render() -> str:
    """The whole page."""
    parts = [_HEADER, _wire_section(), _links_section(), _messages_section()]
    parts += [_calls_section(table) for table in (HCALLS, UCALLS, RTAS)]
    parts.append(_unhandled_section())
    return "\n".join(parts)


def _wire_section() -> str:
    kinds = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in wire.MessageKind)
    fields = ", ".join(field.name for field in msgspec.structs.fields(wire.Envelope))
    return f"""## Wire format

Each pair of processes has a ZeroMQ DEALER-DEALER pair on `ipc://` with CURVE. Frame 1 is a MessagePack array
`[{fields}]`; a second frame exists only where the message declares one. The socket, its keys
and its ZAP domain fix peer, role and VM: no field names the sender.

| fact | value |
|-|-|
| version | {wire.VERSION} |
| kind | {kinds} |
| number | of a hypercall, ultracall or message below |
| correlation | chosen by the caller, repeated in the reply |
| cause | chosen by the guest's processor, repeated in everything done because of its call |
| body | a call: its argument registers in order, the reply `[code, outputs...]`; a message: the fields below in order |
| largest message | {wire.MAX_MESSAGE_BYTES} bytes |
| largest second frame | {wire.MAX_PAYLOAD_BYTES} bytes |
| high-water mark | {wire.HIGH_WATER_MARK} messages |
| open calls a link | {wire.MAX_OPEN_CALLS} in each direction, beyond it busy |
"""


def _links_section() -> str:
    rows = ["## Links", ""]
    rows.append("The more privileged role stands first and binds; of equals one end is told to.")
    rows.append("A reader refuses every number that is not listed.")
    for kind in LINK_KINDS.values():
        rows += ["", f"### {kind.name}", "", *_directions(kind)]
        if kind.open_numbers:
            rows.append("- an unknown call number is answered as unknown; it is no breach of the protocol")
    secure = _sentence(name_of(number) for number in sorted(GUEST_WHILE_SECURE))
    rows += ["", f"While its VM is secure a guest takes from kvm only {secure}.", ""]
    return "\n".join(rows)


def _directions(kind: LinkKind) -> Iterator[str]:
    directions = [(kind.lower, kind.upper, kind.upward), (kind.upper, kind.lower, kind.downward)]
    # Between equals both are the same.
    for sender, receiver, numbers in dict.fromkeys(directions):
        yield f"- {sender.value} to {receiver.value}: {_carried(numbers)}"


def _carried(numbers: frozenset[int]) -> str:
    parts = []
    hcalls = numbers & HCALLS.by_number.keys()
    if hcalls == HCALLS.by_number.keys():
        parts.append("every hypercall")
    elif hcalls:
        parts.append("every hypercall that a guest may issue")
    parts += [f"`{name_of(number)}`" for number in sorted(numbers - hcalls)]
    return ", ".join(parts)


def _messages_section() -> str:
    rows = [
        "## Messages",
        "",
        "Bodies and replies are arrays of the named fields in order. A leaf is answered by the reader of the link "
        "itself, without calling anyone who could be waiting for it; an event has no reply.",
        "",
        "| number | name | body | reply | | what the body says |",
        "|-|-|-|-|-|-|",
    ]
    for message in sorted(MESSAGES.values(), key=lambda message: message.number):
        reply = "" if message.reply is None else _fields(message.reply)
        facts = (message.name, _fields(message.body), reply, _nature(message), _says(message.body))
        rows.append(f"| {message.number:#x} | {' | '.join(facts)} |")
    nested = sorted(_nested_types(), key=lambda kind: kind.__name__)
    rows += ["", *(f"`{kind.__name__}` is [{_fields(kind)}]." for kind in nested), ""]
    return "\n".join(rows)


def _nature(message: Message[Any, Any]) -> str:
    if message.reply is None:
        return "event"
    return "leaf" if message.leaf else ""


def _says(body: type[Body]) -> str:
    """The docstring of a body as one line."""
    return " ".join((body.__doc__ or "").split())


def _fields(kind: type[Body]) -> str:
    hints = get_type_hints(kind, include_extras=True)
    return "<br>".join(f"{field.name}: {_type(hints[field.name])}" for field in msgspec.structs.fields(kind)) or "-"


def _type(hint: Any) -> str:  # noqa: ANN401
    """A field's type as a person reads it: `int 0..4095`, `list of u64`, an enum's values."""
    if hint == Register:
        return "u64"
    bounds = _bounds(hint)
    base = hint
    while hasattr(base, "__metadata__"):
        base = base.__origin__
    if get_origin(base) is list:
        return f"list of {_type(get_args(base)[0])}{bounds}"
    if get_origin(base) is dict:
        key, value = get_args(base)
        return f"map of {_type(key)} to {_type(value)}{bounds}"
    if issubclass(base, int) and hasattr(base, "__members__"):
        return ", ".join(f"{member.value} {member.name}" for member in base)
    return f"{base.__name__}{bounds}"


def _bounds(hint: Any) -> str:  # noqa: ANN401
    metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    text = ""
    for meta in metas:
        low = meta.ge
        high = meta.le if meta.le is not None else meta.lt - 1 if meta.lt is not None else None
        if low is not None or high is not None:
            text += f" {_number(low)}..{_number(high)}"
        if meta.max_length is not None:
            text += f", at most {meta.max_length}"
    return text


def _number(value: float | None) -> str:
    if value is None:
        return ""
    whole = int(value)
    return f"{whole:#x}" if whole > 0xFFFF else str(whole)


def _nested_types() -> set[type[Body]]:
    """Structs that stand in a list of a body."""
    found: set[type[Body]] = set()
    for message in MESSAGES.values():
        for kind in (message.body, message.reply):
            if kind is not None:
                found |= {it for hint in get_type_hints(kind).values() for it in get_args(hint) if _is_body(it)}
    return found


def _is_body(it: Any) -> bool:  # noqa: ANN401
    return isinstance(it, type) and issubclass(it, Body)


def _calls_section(table: CallTable) -> str:
    rows = [f"## {_TITLES[table.space]}", "", _ABI[table.space]]
    for call in sorted(table, key=lambda call: call.number):
        if call.name not in UNHANDLED:
            rows += ["", *_call(call)]
    return "\n".join([*rows, ""])


def _call(call: Call) -> Iterator[str]:
    yield f"### {call.name} ({call.number:#x})"
    yield ""
    if call.hardware:
        yield f"- registers of the processor, sent before the arguments: {_registers(call.hardware, 0)}"
    yield f"- arguments: {_registers(call.args, call.optional_args)}"
    yield f"- results: {_registers(call.results, call.optional_results)}"
    for reg in call.args:
        if reg.memory is not None:
            yield f"- memory at `{reg.name}`: {_memory(reg.memory)}"
    callers = sorted(caller.value for caller in call.callers)
    yield f"- callers: {', '.join(callers)}"
    if call.space is Space.RTAS:
        yield f"- served by: {SERVED_BY[call.number].value}"
    if call.open_ended:
        yield "- may stay unanswered without limit"
    for code, meaning in call.errors.items():
        yield f"- `{code.name}`: {meaning}"
    yield f"- source: {call.source}"


def _registers(registers: tuple[Reg, ...], n_optional: int) -> str:
    if not registers:
        return "none"
    first_optional = len(registers) - n_optional
    return ", ".join(
        f"`{reg.name}` {reg.kind.value}{' (may be left out)' if index >= first_optional else ''}"
        for index, reg in enumerate(registers)
    )


def _memory(memory: Memory) -> str:
    count = f"`{memory.count}`" if isinstance(memory.count, str) else str(memory.count)
    unit = "bytes" if memory.unit_bytes == 1 else f"x {memory.unit_bytes} bytes"
    bound = "" if memory.max_count is None else f", at most {memory.max_count}"
    return f"{memory.direction.value}, {count} {unit}{bound}"


def _unhandled_section() -> str:
    rows = [
        "## Declared and not handled",
        "",
        "Traces and audit lines know these calls by name and arguments; whoever issues one gets the answer of an "
        "unknown number.",
    ]
    for reason in Reason:
        rows += ["", f"**{reason.value[0].upper()}{reason.value[1:]}.**", ""]
        rows += [f"- {_short(name)}" for name in names_of(reason)]
    return "\n".join([*rows, ""])


def _short(name: str) -> str:
    call = HCALLS.by_name.get(name) or UCALLS.by_name.get(name) or RTAS.by_name[name]
    return f"{call.number:#x} {name}({', '.join(reg.name for reg in call.args)})"


def _sentence(names: Iterable[str]) -> str:
    *head, last = [f"`{name}`" for name in names]
    return f"{', '.join(head)} and {last}" if head else last


if __name__ == "__main__":
    sys.stdout.write(render())
