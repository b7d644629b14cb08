"""Text typed on a console: each byte once, however often it is offered.

Whoever types may not hear in time that a text was taken, and offers it again. So every text has a number of its own,
and an offer says how much of that text was known to be taken before it; a console remembers how far it took the newest
few, also on another host.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from protocol.errors import MalformedMessage, UserError

MAX_TEXTS = 16
_TEXT_BITS = 63
_MAX = 1 << _TEXT_BITS


class Offer(NamedTuple):
    """Bytes `data`, which begin at byte `at` of the text with this number."""

    text: int
    at: int
    data: bytes

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Offer:
        """Of the arguments of a query `console.write`; raises UserError, KeyError."""
        offer = cls(arguments["text"], arguments["at"], arguments["data"])
        if not isinstance(offer.data, bytes) or not (_is_count(offer.text) and _is_count(offer.at)):
            raise UserError("console.write takes bytes, and two numbers below 2^63")
        return offer

    def arguments(self) -> dict[str, Any]:
        """As `of` takes them."""
        return self._asdict()


class TypedText:
    """A text that is being typed."""

    def __init__(self, data: bytes) -> None:
        self._number = secrets.randbits(_TEXT_BITS)
        self._data = data
        self._at = 0

    @property
    def is_taken(self) -> bool:
        """Whether all of it is."""
        return self._at >= len(self._data)

    def offer(self) -> Offer:
        """The rest of it."""
        return Offer(self._number, self._at, self._data[self._at :])

    def took(self, n_bytes: int) -> None:
        """So many bytes of the last offer were taken."""
        self._at += n_bytes


class TakenTexts:
    """What a console took of the newest texts: for each its number, and how many bytes."""

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}

    def done(self, offer: Offer) -> int:
        """How many bytes of `offer` were taken before."""
        return min(max(0, self._taken.get(offer.text, 0) - offer.at), len(offer.data))

    def took(self, offer: Offer, n_bytes: int) -> None:
        """`n_bytes` of `offer` are taken, those of before counted."""
        self._taken.pop(offer.text, None)
        self._taken[offer.text] = offer.at + n_bytes
        while len(self._taken) > MAX_TEXTS:
            del self._taken[next(iter(self._taken))]

    def save(self) -> dict[int, int]:
        """A copy, the oldest first."""
        return dict(self._taken)

    def load(self, state: dict[int, int]) -> None:
        """Take over `state`; raises MalformedMessage when it is none of `save`."""
        if len(state) > MAX_TEXTS or not all(_is_count(number) for item in state.items() for number in item):
            raise MalformedMessage("a console that remembers too much")
        self._taken = dict(state)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < _MAX
