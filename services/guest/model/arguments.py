"""What the commands of the prompt make of their words."""

from __future__ import annotations

from protocol.errors import PefboxError
from protocol.ethernet import MAC_BYTES, MULTICAST


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


def station_of(words: list[str]) -> bytes:
    """The first argument as the address of one station, six bytes in hexadecimal with colons; raises Refused."""
    parts = words[0].split(":") if words else []
    if len(parts) != MAC_BYTES or not all(len(part) == 2 for part in parts):
        raise Refused("the first argument is an address as 52:54:00:00:00:01")
    try:
        mac = bytes(int(part, 16) for part in parts)
    except ValueError:
        raise Refused("the first argument is an address as 52:54:00:00:00:01") from None
    if mac[0] & MULTICAST:
        raise Refused("that is the address of a group")
    return mac
