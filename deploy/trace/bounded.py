"""What is remembered of a trace while it is read, so far as there is room: anybody may have written it."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def remember(kept: dict[K, V], key: K, value: V, most: int) -> None:
    """Put `value` into `kept`; of `most` entries the oldest makes room."""
    if len(kept) >= most:
        kept.pop(next(iter(kept)))
    kept[key] = value
