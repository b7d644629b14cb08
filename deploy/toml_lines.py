"""On which line of a TOML document each key stands.

`tomllib` gives values without positions. A mistake in a cluster file is reported with its line, so this module scans
the text once more. It expects a document that `tomllib` accepted and never raises for one it does not understand:
a key it misses is reported with the line of the table around it.
"""

from __future__ import annotations

KeyPath = tuple[str | int, ...]

_CLOSERS = {"[": "]", "{": "}"}


class LineIndex:
    """Maps the path of a key, such as `("vms", "vm1", "memory")`, to its 1-based line."""

    def __init__(self, text: str) -> None:
        self._lines: dict[KeyPath, int] = {}
        self._array_sizes: dict[KeyPath, int] = {}
        self._scan(text.splitlines())

    def line_of(self, path: KeyPath) -> int | None:
        """The line of `path`, or of the nearest enclosing key that has one."""
        while path:
            if path in self._lines:
                return self._lines[path]
            path = path[:-1]
        return None

    def _scan(self, lines: list[str]) -> None:
        table: KeyPath = ()
        number = 0
        while number < len(lines):
            line = lines[number].strip()
            if line.startswith("["):
                table = self._open_table(line, number + 1)
            elif line and not line.startswith("#"):
                key, _, value = _split_assignment(line)
                self._note(table + _dotted(key), number + 1)
                number += _extra_lines(value, lines[number + 1 :])
            number += 1

    def _open_table(self, line: str, number: int) -> KeyPath:
        is_array = line.startswith("[[")
        name = line.lstrip("[").split("]", 1)[0]
        path = self._resolve(_dotted(name))
        if is_array:
            index = self._array_sizes.get(path, 0)
            self._array_sizes[path] = index + 1
            self._note(path, number)
            path = (*path, index)
        self._note(path, number)
        return path

    def _resolve(self, path: KeyPath) -> KeyPath:
        """`path` with the index of the last element after each array of tables it passes through."""
        resolved: KeyPath = ()
        for depth, part in enumerate(path):
            resolved = (*resolved, part)
            if depth < len(path) - 1 and resolved in self._array_sizes:
                resolved = (*resolved, self._array_sizes[resolved] - 1)
        return resolved

    def _note(self, path: KeyPath, number: int) -> None:
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], number)


def _split_assignment(line: str) -> tuple[str, str, str]:
    quote = ""
    for position, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "=":
            return line[:position], "=", line[position + 1 :]
    return line, "", ""


def _dotted(text: str) -> KeyPath:
    parts: list[str | int] = []
    part, quote = "", ""
    for character in text.strip():
        if quote:
            quote, part = ("", part) if character == quote else (quote, part + character)
        elif character in "\"'":
            quote = character
        elif character == ".":
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return (*parts, part.strip())


def _extra_lines(value: str, following: list[str]) -> int:
    """How many of the `following` lines belong to a value that opens in `value`."""
    depth, quote = _scan_value(value, 0, "")
    for count, line in enumerate(following):
        if depth == 0 and not quote:
            return count
        depth, quote = _scan_value(line, depth, quote)
    return len(following)


def _scan_value(text: str, depth: int, quote: str) -> tuple[int, str]:
    """Bracket depth and open triple quote after `text`."""
    position = 0
    while position < len(text):
        if quote:
            step, quote = _inside_string(text, position, quote)
        else:
            step, depth, quote = _outside_string(text, position, depth)
        position += step
    return depth, quote if len(quote) == 3 else ""


def _inside_string(text: str, position: int, quote: str) -> tuple[int, str]:
    if quote[0] == '"' and text[position] == "\\":
        return 2, quote
    if text.startswith(quote, position):
        return len(quote), ""
    return 1, quote


def _outside_string(text: str, position: int, depth: int) -> tuple[int, int, str]:
    character = text[position]
    if character == "#":
        return len(text) - position, depth, ""
    if character in "\"'":
        quote = character * 3 if text.startswith(character * 3, position) else character
        return len(quote), depth, quote
    if character in _CLOSERS:
        return 1, depth + 1, ""
    if character in _CLOSERS.values():
        return 1, depth - 1, ""
    return 1, depth, ""
