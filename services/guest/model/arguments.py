"""What the commands of the prompt make of their words."""

from __future__ import annotations

from protocol.errors import PefboxError


class Refused(PefboxError):
    """A command that cannot be obeyed; the text follows `error`."""


def numbers(words: list[str], n_wanted: int, defaults: tuple[int, ...] = ()) -> list[int]:
    """The arguments as numbers (0x... too), `defaults` for the last ones when left out; raises Refused."""
    n_missing = n_wanted + len(defaults) - len(words)
    if not 0 <= n_missing <= len(defaults):
        raise Refused("wrong number of arguments; try help")
    try:
        found = [int(word, 0) for word in words]
    except ValueError:
        raise Refused("not a number") from None
    if any(not 0 <= number < 1 << 64 for number in found):
        raise Refused("not a 64-bit number")
    return found + list(defaults[len(defaults) - n_missing :])
