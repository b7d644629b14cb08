"""The condition of a break: comparisons of names with numbers and texts, `and`, `or`, `not`, parentheses.

    either = both { "or" both }
    both   = single { "and" single }
    single = "not" single | "(" either ")" | value ("==" | "!=" | "<" | "<=" | ">" | ">=") value
    value  = NUMBER | TEXT | NAME

A number is decimal or 0x..., a text stands in quotes, a name is one that the message has, or a result code (U_RETRY).
Nothing is ever evaluated as Python, and size and depth are bounded.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from protocol.codes import HCode, UCode
from protocol.errors import UserError
from protocol.registers import to_register, to_signed

Value = int | str

MAX_CHARS = 1000
MAX_DEPTH = 20
MAX_NTH = 1_000_000_000
"""Of `--nth`."""
_TOKEN = re.compile(
    r"""\s*(?:(0[xX][0-9a-fA-F]+|-?\d+)|"([^"]*)"|'([^']*)'|([A-Za-z_]\w*)|(==|!=|<=|>=|<|>|\(|\)))""", re.ASCII
)
_WORDS = frozenset({"and", "or", "not", "if"})
_COMPARE: dict[str, Callable[[Value, Value], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CODES: dict[str, int] = {**{code.name: int(code) for code in HCode}, **{code.name: int(code) for code in UCode}}


@dataclass(frozen=True, slots=True)
class Name:
    """What the message says under this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A number or text."""

    value: Value


Operand = Name | Literal


@dataclass(frozen=True, slots=True)
class Compare:
    """False when the message does not have what is named."""

    left: Operand
    sign: str
    right: Operand

    def holds(self, fields: Mapping[str, Value]) -> bool:
        """Whether `fields` fit."""
        left, right = _value(self.left, fields), _value(self.right, fields)
        if left is None or right is None:
            return False
        if isinstance(left, int) and isinstance(right, int):
            return _COMPARE[self.sign](*_alike(left, right))
        return isinstance(left, str) and isinstance(right, str) and _COMPARE[self.sign](left, right)


@dataclass(frozen=True, slots=True)
class Both:
    """All of the parts hold."""

    parts: tuple[Condition, ...]

    def holds(self, fields: Mapping[str, Value]) -> bool:
        """Whether `fields` fit."""
        return all(part.holds(fields) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Either:
    """One of the parts holds."""

    parts: tuple[Condition, ...]

    def holds(self, fields: Mapping[str, Value]) -> bool:
        """Whether `fields` fit."""
        return any(part.holds(fields) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: Condition

    def holds(self, fields: Mapping[str, Value]) -> bool:
        """Whether `fields` fit."""
        return not self.part.holds(fields)


Condition = Compare | Both | Either | Not


def tokens(text: str) -> list[str]:
    """The words and signs of a break; texts keep their first quote. Raises UserError."""
    if len(text) > MAX_CHARS:
        raise UserError(f"a break of {len(text)} characters, more than {MAX_CHARS}")
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise UserError(f"column {at + 1}: nothing can begin with {text[at:].lstrip()[0]!r} here")
        number, double, single, word, sign = match.groups()
        quoted = double if double is not None else single
        found.append(f'"{quoted}' if quoted is not None else number or word or sign)
        at = match.end()
    return found


def parse(words: list[str], type_of: Callable[[str], type[Value]]) -> Condition:
    """The condition that `words` are, whose names `type_of` knows: it raises UserError for others, as does this."""
    parser = _Parser(words, type_of)
    condition = parser.either(0)
    if parser.rest:
        raise UserError(f"{_shown(parser.rest[0])} is one too many; conditions are joined with `and`, `or`")
    return condition


def names_in(condition: Condition) -> set[str]:
    """The names that a condition asks for."""
    match condition:
        case Compare(left, _, right):
            return {side.name for side in (left, right) if isinstance(side, Name)}
        case Both(parts) | Either(parts):
            return {name for part in parts for name in names_in(part)}
        case Not(part):
            return names_in(part)


def _value(operand: Operand, fields: Mapping[str, Value]) -> Value | None:
    return operand.value if isinstance(operand, Literal) else fields.get(operand.name)


def _alike(left: int, right: int) -> tuple[int, int]:
    """A register with a code in it is compared with the code: both as signed numbers where one is negative."""
    if left >= 0 and right >= 0:
        return left, right
    return to_signed(to_register(left)), to_signed(to_register(right))


def _shown(word: str) -> str:
    return f'{word}"' if word.startswith('"') else f"`{word}`"


class _Parser:
    """Takes words from the front of `rest`."""

    def __init__(self, words: list[str], type_of: Callable[[str], type[Value]]) -> None:
        self.rest = list(words)
        self._type_of = type_of

    def either(self, depth: int) -> Condition:
        parts = [self._both(depth)]
        while self._takes("or"):
            parts.append(self._both(depth))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _both(self, depth: int) -> Condition:
        parts = [self._single(depth)]
        while self._takes("and"):
            parts.append(self._single(depth))
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def _single(self, depth: int) -> Condition:
        if depth >= MAX_DEPTH:
            raise UserError(f"more than {MAX_DEPTH} parentheses or `not` within each other")
        if self._takes("not"):
            return Not(self._single(depth + 1))
        if self._takes("("):
            inner = self.either(depth + 1)
            if not self._takes(")"):
                raise UserError("a parenthesis is not closed")
            return inner
        return self._comparison()

    def _comparison(self) -> Compare:
        left = self._operand()
        if not self.rest or self.rest[0] not in _COMPARE:
            wanted = ", ".join(_COMPARE)
            found = _shown(self.rest[0]) if self.rest else "nothing"
            raise UserError(f"a comparison ({wanted}) was expected, not {found}")
        sign = self.rest.pop(0)
        right = self._operand()
        if self._kind(left) is not self._kind(right):
            raise UserError(f"{_text_of(left)} and {_text_of(right)} cannot be compared: one is a text, one a number")
        return Compare(left, sign, right)

    def _operand(self) -> Operand:
        if not self.rest:
            raise UserError("a name, number or text was expected at the end")
        word = self.rest.pop(0)
        if word.startswith('"'):
            return Literal(word[1:])
        if word[0].isdigit() or word[0] == "-":
            return Literal(int(word, 16 if word[1:2] in ("x", "X") else 10))
        if word in _CODES:
            return Literal(_CODES[word])
        if word in _WORDS or not word.isidentifier():
            raise UserError(f"a name, number or text was expected, not {_shown(word)}")
        self._type_of(word)
        return Name(word)

    def _kind(self, operand: Operand) -> type[Value]:
        return self._type_of(operand.name) if isinstance(operand, Name) else type(operand.value)

    def _takes(self, word: str) -> bool:
        if not self.rest or self.rest[0] != word:
            return False
        self.rest.pop(0)
        return True


def _text_of(operand: Operand) -> str:
    if isinstance(operand, Name):
        return operand.name
    return f'"{operand.value}"' if isinstance(operand.value, str) else str(operand.value)
