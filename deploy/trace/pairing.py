"""The two copies of a message, as it was sent and as it came, find each other: by link, direction, number and ids.

One copy may be missing: its process was killed before it wrote, began to record later, lost entries, or has no file.
So whoever shows each message once shows what was sent, and what came without a copy of its sender's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import msgspec

from deploy.trace.events import Event, EventKind
from deploy.trace.link_ends import LinkEnds
from services.runtime.tracer import FLUSH_SECONDS

WINDOW_NS = int(FLUSH_SECONDS * 1e9)
"""An offered event is noted when it was taken: its peer may have noted it already, but not so long before."""
MAX_ON_THE_WAY = 1 << 16
"""Messages of one direction of a link that were sent and did not come; the oldest make room."""
_FOREVER_NS = 1 << 64
_Key = tuple[EventKind, int | None, int | None, int]


@dataclass(slots=True)
class _Held:
    """An event that is not given yet; `way` is that of a message that came before its copy as it was sent."""

    event: Event
    message: int | None = None
    way: _Way | None = None


class _Way:
    """One direction of a link: copies that wait for the other one."""

    def __init__(self) -> None:
        self._sent: dict[_Key, deque[tuple[int, int]]] = {}
        self._order: deque[tuple[int, _Key]] = deque()
        self._early: dict[_Key, deque[_Held]] = {}

    def sent(self, event: Event, message: int) -> None:
        """A message left."""
        key = _key_of(event)
        early = self._early.get(key)
        if early:
            early.popleft().message = message
            return
        self._sent.setdefault(key, deque()).append((message, event.t_ns))
        self._order.append((message, key))
        if len(self._order) > MAX_ON_THE_WAY:
            self._drop_oldest()

    def came(self, held: _Held) -> None:
        """A message came."""
        key = _key_of(held.event)
        waiting = self._sent.get(key)
        if not waiting:
            self._early.setdefault(key, deque()).append(held)
            held.way = self
            return
        held.message, sent_ns = waiting.popleft()
        # A link keeps its order, up to what several threads do at once: what was sent before has not come at all.
        while self._order and self._is_older(sent_ns - WINDOW_NS):
            self._drop_oldest()

    def give_up(self, held: _Held) -> None:
        """It waited long enough for its copy as it was sent."""
        key = _key_of(held.event)
        early = self._early[key]
        if early and early[0] is held:
            early.popleft()
        if not early:
            del self._early[key]

    def _is_older(self, limit_ns: int) -> bool:
        message, key = self._order[0]
        waiting = self._sent.get(key)
        return not waiting or waiting[0][0] != message or waiting[0][1] < limit_ns

    def _drop_oldest(self) -> None:
        """Nothing but its place, when it has come."""
        message, key = self._order.popleft()
        waiting = self._sent.get(key)
        if waiting and waiting[0][0] == message:
            waiting.popleft()
        if not waiting:
            self._sent.pop(key, None)


class Pairing:
    """Takes events in the order of their time, and gives them with `peer` and `message` as the whole trace has them."""

    def __init__(self, ends: LinkEnds) -> None:
        self._ends = ends
        self._messages = count(1)
        self._held: deque[_Held] = deque()
        self._ways: dict[tuple[str, str], _Way] = {}
        """By link and receiver."""

    def take(self, event: Event) -> None:
        """The next event."""
        held = _Held(event)
        self._held.append(held)
        if not event.is_message:
            return
        peer = self._ends.peer(event.link, event.process)
        if event.outward:
            held.message = next(self._messages)
        if peer is None or event.link is None:
            return
        way = self._ways.setdefault((event.link, peer if event.outward else event.process), _Way())
        if held.message is not None:
            way.sent(event, held.message)
        else:
            way.came(held)

    def settled(self, until_ns: int = _FOREVER_NS) -> Iterator[Event]:
        """Those up to `until_ns`, which lies WINDOW_NS before what is still to be taken."""
        while self._held and self._held[0].event.t_ns <= until_ns:
            held = self._held.popleft()
            if held.way is not None:
                held.way.give_up(held)
            event = held.event
            if event.is_message:
                peer = self._ends.peer(event.link, event.process) or event.peer
                event = msgspec.structs.replace(event, peer=peer, message=held.message)
            yield event


def paired(events: Iterable[Event], ends: LinkEnds) -> Iterator[Event]:
    """All events of a trace, which come in the order of their time."""
    pairing = Pairing(ends)
    for event in events:
        pairing.take(event)
        yield from pairing.settled(event.t_ns - WINDOW_NS)
    yield from pairing.settled()


def _key_of(event: Event) -> _Key:
    return event.kind, event.number, event.correlation, event.cause
