"""A break on messages: which ones it means, and what is done with them.

    break = ("hcall" | "ucall" | "message" | "any") [NAME] ["if" condition]

It sees calls and events, or replies when its condition names what only a reply gives (`result`, the results of the
call); `any` alone sees all of them. Every message has `sender`, `receiver`, `vm` and `link`, which are texts, and
`cause`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

import msgspec

from protocol.break_expression import MAX_NTH, Condition, Value, names_in, parse, tokens
from protocol.codes import HCode, UCode
from protocol.declare import Call
from protocol.errors import UserError
from protocol.hcalls import HCALLS
from protocol.links import LINK_KINDS, LinkKind
from protocol.message_fields import RESULT, Declared, argument_types, declared, result_types
from protocol.messages import MESSAGES
from protocol.roles import Role
from protocol.ucalls import UCALLS
from protocol.wire import Envelope, MessageKind

MAX_KEPT = 256
"""Messages that a process keeps at a time; what more comes is served."""
COMMON: dict[str, type[Value]] = {"sender": str, "receiver": str, "vm": str, "link": str, "cause": int}
"""What every message has."""


class Space(Enum):
    """What kind of message a break means."""

    HCALL = "hcall"
    UCALL = "ucall"
    MESSAGE = "message"
    ANY = "any"

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers of what is declared there, by name."""
        tables = {
            Space.HCALL: {call.name: call.number for call in HCALLS},
            Space.UCALL: {call.name: call.number for call in UCALLS},
            Space.MESSAGE: {message.name: message.number for message in MESSAGES.values()},
        }
        if self is Space.ANY:
            return {name: number for table in tables.values() for name, number in table.items()}
        return tables[self]


class Action(Enum):
    """What happens to a message that a break means; each is counted."""

    STOP = "stop"
    """It is kept, and its VM is stopped, until the operator lets it pass."""
    STOP_CLUSTER = "stop-cluster"
    """The same, and every VM is stopped."""
    LOG = "log"
    COUNT = "count"
    DROP = "drop"
    FAIL = "fail"
    """A call is answered with a code, and not served."""

    @property
    def keeps(self) -> bool:
        """Whether the message waits for the operator."""
        return self in (Action.STOP, Action.STOP_CLUSTER)


class BreakOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A break as the operator gave it: `code` is the name of a result code, `nth` 0 for every time that it fits."""

    id: int
    text: str
    action: str = Action.STOP.value
    code: str | None = None
    nth: int = 0


@dataclass(frozen=True, slots=True)
class Break:
    """A break that was read. `numbers` None means every message; `replies` None calls, events and replies alike."""

    order: BreakOrder
    numbers: frozenset[int] | None
    replies: bool | None
    condition: Condition | None
    action: Action
    code: int | None

    def may_mean(self, envelope: Envelope) -> bool:
        """Whether number and kind of a message fit."""
        if self.numbers is not None and envelope.number not in self.numbers:
            return False
        return self.replies is None or self.replies is (envelope.kind is MessageKind.REPLY)

    def means(self, fields: dict[str, Value]) -> bool:
        """Whether what a message says fits."""
        return self.condition is None or self.condition.holds(fields)

    def receivers(self) -> set[Role]:
        """The roles that receive what it means."""
        return {role for kind in LINK_KINDS.values() for role in _receivers_on(kind, self)}


def read_break(order: BreakOrder) -> Break:
    """The break of `order`; raises UserError that says what of it cannot be."""
    space, name, words = _head(tokens(order.text))
    numbers = _numbers(space, name)
    known = [of for of in map(declared, numbers or ()) if of is not None] if name else []
    condition = parse(words, lambda word: _type_of(word, known, name)) if words else None
    replies = _sees_replies(space, known, names_in(condition) if condition else set())
    action = _action(order)
    code = _code(order, action, space, replies)
    if action is Action.FAIL and name is not None and not any(_is_call(of) for of in known):
        raise UserError(f"{name} has no answer and cannot fail; `--do drop` loses it")
    if not 0 <= order.nth <= MAX_NTH:
        raise UserError(f"the {order.nth}th time is none: 1 to {MAX_NTH}")
    return Break(order, numbers, replies, condition, action, code)


def _head(words: list[str]) -> tuple[Space, str | None, list[str]]:
    """What comes before `if`, and the words of the condition."""
    names = [space.value for space in Space]
    if not words or words[0] not in names:
        raise UserError(f"a break begins with {', '.join(names)}: ucall UV_PAGE_OUT if gpa == 0x1230000")
    rest = words[1:]
    name = rest.pop(0) if rest and rest[0] != "if" else None
    if rest and rest[0] != "if":
        raise UserError(f"`if` was expected, not `{rest[0]}`")
    if rest and len(rest) == 1:
        raise UserError("a condition was expected after `if`")
    return Space(words[0]), name, rest[1:]


def _numbers(space: Space, name: str | None) -> frozenset[int] | None:
    table = space.numbers
    if name is None:
        return None if space is Space.ANY else frozenset(table.values())
    if name not in table:
        kind = {Space.HCALL: "hypercall", Space.UCALL: "ultracall"}.get(space, "message")
        raise UserError(f"no {kind} {name}{_or_did_you_mean(name, table)}")
    return frozenset({table[name]})


def _type_of(word: str, known: list[Declared], name: str | None) -> type[Value]:
    names = dict(COMMON)
    for of in known:
        names |= {**argument_types(of), **result_types(of)}
    if not known:
        names[RESULT] = int
    if word in names:
        return names[word]
    if name is None:
        raise UserError(f"no message has {word}; all have {', '.join(names)}; name one for what it has")
    arguments = ", ".join(of_name for of in known for of_name in argument_types(of)) or "none"
    results = ", ".join(of_name for of in known for of_name in result_types(of)) or "none"
    raise UserError(
        f"{name} has no argument {word}{_or_did_you_mean(word, names)}; it has {arguments}; "
        f"its reply has {results}; every message has {', '.join(COMMON)}"
    )


def _sees_replies(space: Space, known: list[Declared], names: set[str]) -> bool | None:
    of_replies = {name for of in known for name in result_types(of)} or {RESULT}
    of_calls = {name for of in known for name in argument_types(of)}
    in_reply, in_call = names & (of_replies - of_calls), names & (of_calls - of_replies)
    if in_reply and in_call:
        first, second = sorted(in_call)[0], sorted(in_reply)[0]
        raise UserError(f"{first} comes with the call and {second} with the reply: no message has both")
    if space is Space.ANY and not known and not in_reply:
        return None
    return bool(in_reply)


def _action(order: BreakOrder) -> Action:
    try:
        return Action(order.action)
    except ValueError:
        actions = ", ".join(action.value for action in Action)
        raise UserError(f'no action "{order.action}"; there are: {actions}') from None


def _code(order: BreakOrder, action: Action, space: Space, replies: bool | None) -> int | None:
    if action is not Action.FAIL:
        if order.code is not None:
            raise UserError("a code is given to the action `fail` alone")
        return None
    if space is Space.ANY or replies:
        raise UserError("only calls can fail with a code: a break on hcall, ucall or message, not on their results")
    codes = UCode if space is Space.UCALL else HCode
    if order.code is None or order.code not in codes.__members__:
        names = [code.name for code in codes]
        raise UserError(f"no code {order.code} of a {space.value}{_or_did_you_mean(order.code or '', names)}")
    return int(codes[order.code])


def _is_call(of: Declared) -> bool:
    return isinstance(of, Call) or of.reply is not None


def _receivers_on(kind: LinkKind, of: Break) -> set[Role]:
    """Who receives on a link of `kind`: calls where they are served, replies where they were made."""
    roles = set()
    if of.numbers is None or of.numbers & kind.upward:
        roles |= _ends(of.replies, served_by=kind.upper, made_by=kind.lower)
    if of.numbers is None or of.numbers & kind.downward:
        roles |= _ends(of.replies, served_by=kind.lower, made_by=kind.upper)
    return roles


def _ends(replies: bool | None, *, served_by: Role, made_by: Role) -> set[Role]:
    if replies is None:
        return {served_by, made_by}
    return {made_by} if replies else {served_by}


def _or_did_you_mean(word: str, names: Iterable[str]) -> str:
    close = get_close_matches(word, list(names), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
