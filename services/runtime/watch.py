"""What is looked at before a message is served: by a debugger that waits for the next one, and by breaks.

A link end has a watch only while there is something to look for; without one it pays a comparison a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.links import LinkKind, name_of
from protocol.message_text import of_call, of_result, tamed
from protocol.trace_rules import CONFIDENTIAL_LINKS, UNDECLARED, written_form
from protocol.wire import Envelope, MessageKind, decode, encode

MAX_TEXT_CHARS = 1000
"""What is said of a message at most."""


class WatchedEnd(Protocol):
    """This process's end of a link."""

    id: str
    peer: str
    peer_state: str
    kind: LinkKind
    watch: Watcher | None

    def serve_now(self, envelope: Envelope) -> None:
        """Serve a message that was held; in the thread that reads the link."""

    def refuse_now(self, envelope: Envelope, code: int) -> None:
        """Answer a call that was held with `code` alone."""


Watcher = Callable[[WatchedEnd, Envelope], bool]
"""Whether the message is served now; if not, the watcher keeps it or drops it."""


class Watch:
    """The watchers of a process and its link ends. Used in the thread that reads the links."""

    def __init__(self, ends: Callable[[], Iterable[WatchedEnd]]) -> None:
        self._ends = ends
        self._watchers: list[Watcher] = []

    @property
    def watcher(self) -> Watcher | None:
        """What a link end that is made now is given."""
        return self._look if self._watchers else None

    def add(self, watcher: Watcher) -> None:
        """`watcher` sees every message from now on."""
        if watcher not in self._watchers:
            self._watchers = [*self._watchers, watcher]
            self._tell()

    def remove(self, watcher: Watcher) -> None:
        """No more; one that is not there is no error."""
        if watcher in self._watchers:
            self._watchers = [other for other in self._watchers if other != watcher]
            self._tell()

    def _tell(self) -> None:
        for end in list(self._ends()):
            end.watch = self.watcher

    def _look(self, end: WatchedEnd, envelope: Envelope) -> bool:
        return all(watcher(end, envelope) for watcher in self._watchers)


def describe(end: WatchedEnd, envelope: Envelope) -> str:
    """A message that came on `end`, as a person reads it; of a secure guest what a trace may hold of it, too (S1)."""
    text = f"{_text(end, envelope)} from {end.peer} on {end.id}  cause {envelope.cause}"
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 3]}..."


def _text(end: WatchedEnd, envelope: Envelope) -> str:
    if end.kind.name not in CONFIDENTIAL_LINKS:
        return _of_message(end.kind, envelope)
    frame = encode(envelope.kind, envelope.number, envelope.correlation, envelope.cause, envelope.body)
    written, is_part = written_form(frame)
    return f"{_of_message(end.kind, decode(written))}{' (in part)' if is_part else ''}"


def _of_message(kind: LinkKind, envelope: Envelope) -> str:
    if envelope.number == UNDECLARED:
        return "a message that nobody declared"
    try:
        body = tamed(msgspec.msgpack.decode(envelope.body))
    except DECODE_ERRORS as error:
        return f"malformed: {error}"
    if envelope.kind is MessageKind.REPLY:
        _, result = of_result(None, envelope.number, body, is_return=False)
        return f"{name_of(envelope.number)} -> {result}"
    return of_call(kind.name, envelope.number, body)
