"""One table of a cluster file, read key by key with checks.

Every reader names the key, its line, what is wrong and what is allowed. Unknown keys are refused first, with the
nearest known name, so that a misspelt key is never reported as a missing one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from deploy.toml_lines import KeyPath, LineIndex
from protocol.errors import ClusterFileError
from shared.terminal_text import one_line

T = TypeVar("T")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,40})\s*([KMGT]?)(?:i?B)?", re.ASCII)
NAME = re.compile(r"[a-z][a-z0-9-]{0,30}", re.ASCII)
"""What names a host, a VM, a disk, a network."""


def size_of(text: str) -> int | None:
    """Bytes of a size such as "512M"; None when it is none."""
    match = _SIZE.fullmatch(text)
    return None if match is None else int(match[1]) * _UNITS[match[2]]


class Document:
    """The file as a whole: its name for messages and where its keys stand."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines = LineIndex(text)

    def fail(self, key: KeyPath, problem: str) -> NoReturn:
        """Raise ClusterFileError for `key`."""
        raise ClusterFileError(self.path, one_line(_dotted(key)), one_line(problem), self.lines.line_of(key))


class Section:
    """A table at `key`. `known` lists every key that it may have."""

    def __init__(self, document: Document, key: KeyPath, values: object, known: Sequence[str]) -> None:
        self.document, self.key = document, key
        if not isinstance(values, dict):
            document.fail(key, f"must be a table, not {_kind(values)}")
        self._values: dict[str, Any] = values
        for name in values:
            if name not in known:
                self.fail(name, f"unknown key{did_you_mean(name, known)}; allowed: {', '.join(known)}")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raise ClusterFileError for key `name` of this table."""
        self.document.fail((*self.key, name), problem)

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required when `default` is None."""
        value = self._get(name, default)
        if not isinstance(value, str):
            self.fail(name, f"must be a string, not {_kind(value)}")
        if "\0" in value:
            self.fail(name, "must not contain a zero byte")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string, or None when the key is absent."""
        return self.text(name) if name in self else None

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, not {_kind(value)}")
        return value

    def integer(self, name: str, default: int, lowest: int, highest: int) -> int:
        """An integer from `lowest` to `highest`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, f"must be an integer, not {_kind(value)}")
        if not lowest <= value <= highest:
            self.fail(name, f"{value} is out of range; allowed: {lowest} to {highest}")
        return value

    def number(self, name: str, default: float) -> float:
        """An integer or a float."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, f"must be a number, not {_kind(value)}")
        try:
            return float(value)
        except OverflowError:
            self.fail(name, "is too large")

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of `allowed`; required when `default` is None."""
        value = self.text(name, default)
        if value not in allowed:
            self.fail(name, f'"{value}" is not possible{did_you_mean(value, allowed)}; allowed: {quoted(allowed)}')
        return value

    def one_of(self, name: str, allowed: Mapping[bool | str, T], default: T) -> T:
        """What a value that is a boolean or a string stands for."""
        if name not in self:
            return default
        value = self._get(name, None)
        if not isinstance(value, bool | str) or value not in allowed:
            words = ", ".join(str(word).lower() if isinstance(word, bool) else f'"{word}"' for word in allowed)
            self.fail(name, f"{value!r} is not possible; allowed: {words}")
        return allowed[value]

    def size_bytes(self, name: str, *, multiple_of: int, lowest: int, highest: int) -> int:
        """A size: an integer of bytes, or a string such as "512M" (K, M, G, T are powers of 1024)."""
        value = self._get(name, None)
        n_bytes = self._parse_size(name, value)
        if not lowest <= n_bytes <= highest:
            self.fail(name, f"{value} is out of range; allowed: {lowest} to {highest} bytes")
        if n_bytes % multiple_of:
            self.fail(name, f"{value} is no multiple of {multiple_of} bytes")
        return n_bytes

    def rate(self, name: str, default: int) -> int:
        """Bytes a second: an integer, or a string such as "100M" or "100M/s"."""
        value = self._get(name, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        n_bytes = size_of(value.removesuffix("/s")) if isinstance(value, str) else None
        if n_bytes is None:
            self.fail(name, f'{value!r} is no rate; allowed: bytes a second, or a string such as "100M"; 0: no limit')
        return n_bytes

    def _parse_size(self, name: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        n_bytes = size_of(value) if isinstance(value, str) else None
        if n_bytes is None:
            self.fail(name, f'{value!r} is no size; allowed: bytes, or a string such as "512M" or "1G"')
        return n_bytes

    def table(self, name: str, known: Sequence[str]) -> Section:
        """The table `[NAME]`, empty when absent."""
        return Section(self.document, (*self.key, name), self._get(name, {}), known)

    def named_tables(self, name: str, known: Sequence[str], *, required: bool = False) -> dict[str, Section]:
        """The tables `[NAME.x]` by their own name."""
        values = self._get(name, None if required else {})
        if not isinstance(values, dict):
            self.fail(name, f"must be tables [{_dotted((*self.key, name))}.NAME], not {_kind(values)}")
        tables = {}
        for own_name, value in values.items():
            key = (*self.key, name, own_name)
            if not NAME.fullmatch(own_name):
                self.document.fail(key, "a name has lower-case letters, digits and -, begins with a letter, up to 31")
            tables[own_name] = Section(self.document, key, value, known)
        return tables

    def listed_tables(self, name: str, known: Sequence[str]) -> list[Section]:
        """The tables `[[NAME]]` in their order."""
        return [Section(self.document, (*self.key, name, i), v, known) for i, v in enumerate(self._list(name))]

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        values = self._list(name)
        for value in values:
            if not isinstance(value, str):
                self.fail(name, f"must be a list of strings, not of {_kind(value)}")
        return values

    def _list(self, name: str) -> list[Any]:
        values = self._get(name, [])
        if not isinstance(values, list):
            self.fail(name, f"must be a list, not {_kind(values)}")
        return values

    def _get(self, name: str, default: object) -> object:
        if name not in self._values and default is None:
            self.fail(name, "is missing")
        return self._values.get(name, default)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "memory"?` or nothing."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f', did you mean "{nearest[0]}"?' if nearest else ""


def quoted(words: Iterable[str]) -> str:
    """`"wall", "instructions"`."""
    return ", ".join(f'"{word}"' for word in words)


def _dotted(key: KeyPath) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def _kind(value: object) -> str:
    names = {dict: "a table", list: "a list", str: "a string", bool: "a boolean", int: "an integer", float: "a float"}
    return names.get(type(value), type(value).__name__)
