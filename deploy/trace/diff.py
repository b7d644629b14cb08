"""Two traces compared: where does the second run first do something else?

For each pair of processes what one of them sent the other is compared in its order: name, arguments, result of every
call, and every event. The two directions are compared apart, as nothing orders them but time, which no two runs share.
Calls of one name that one cause makes side by side (the pages of a share) have no order among themselves.
The VM's own time is compared where both runs count it in instructions. Ids are not: correlation and cause number
messages, and a cookie is random, as is what a private call gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from deploy.trace.events import Event, EventKind, answered_by
from deploy.trace.filters import Filter
from deploy.trace.merge import Selection, Survey
from protocol.errors import UserError
from protocol.hcalls import HCALLS
from protocol.ucalls import UCALLS

_INSTRUCTIONS = "instructions"
MAX_MESSAGES = 1_000_000
"""Of each trace, half a GiB: what two runs did differently may be told only by an answer that comes last."""


class Said(msgspec.Struct):
    """A message of one process to another, a call with its result."""

    t_ns: int
    name: str
    text: str
    values: list[Any] | None
    time_ns: int | None = None
    result: str | None = None
    """Of a call that was answered: code and outputs."""
    is_private: bool = False
    cause: int = 0

    def line(self) -> str:
        """For people."""
        at = "" if self.time_ns is None else f"  at {self.time_ns} ns of the VM's time"
        return f"{self.text}{'' if self.result is None else f' -> {self.result}'}{at}"


class PairDiff(msgspec.Struct, frozen=True):
    """One direction between two processes. `n_same` messages are alike; then come `a` and `b`, None where it ends."""

    sender: str
    receiver: str
    link: str
    n_same: int
    n_a: int
    n_b: int
    differs: bool
    a: str | None = None
    b: str | None = None
    t_ns: int = 0


class TraceDiff(msgspec.Struct, frozen=True):
    """All pairs; `first` is the one that differs first in the time of the first trace. `notes` say what was unlike
    before anything happened."""

    same: bool
    first: PairDiff | None
    pairs: list[PairDiff]
    notes: list[str]


def compare(a: Path, b: Path, filter_: Filter, *, to_the_end: bool) -> TraceDiff:
    """Compare two traces. One that goes on after the other has ended differs only `to_the_end`.

    Raises UserError when one has more than MAX_MESSAGES.
    """
    sides = [Selection(where, filter_) for where in (a, b)]
    repeatable = {vm for vm, clock in sides[0].survey.clocks.items() if clock == _INSTRUCTIONS}
    repeatable &= {vm for vm, clock in sides[1].survey.clocks.items() if clock == _INSTRUCTIONS}
    said = [_said(selection, where, repeatable) for selection, where in zip(sides, (a, b), strict=True)]
    pairs = [
        _compare_pair(key, said[0].get(key, []), said[1].get(key, []), to_the_end=to_the_end)
        for key in sorted({**said[0], **said[1]})
    ]
    different = [pair for pair in pairs if pair.differs]
    first = min(different, key=lambda pair: pair.t_ns, default=None)
    return TraceDiff(first is None, first, pairs, list(_notes(sides[0].survey, sides[1].survey)))


_Key = tuple[str, str, str]


def _said(events: Iterable[Event], where: Path, repeatable: set[str]) -> dict[_Key, list[Said]]:
    """What was sent on each link, by (link, sender, receiver), as its sender saw it, or only its receiver."""
    said: defaultdict[_Key, list[Said]] = defaultdict(list)
    waiting: dict[tuple[str, str, bool, int | None], Said] = {}
    n_messages = 0
    for event in events:
        if not event.is_message or event.link is None or event.peer is None:
            continue
        if event.ends is not None:
            _take_answer(waiting, event)
            continue
        if event.is_second_copy:
            continue
        n_messages += 1
        if n_messages > MAX_MESSAGES:
            raise UserError(
                f"{where}: more than {MAX_MESSAGES:,} messages to compare; "
                "narrow them by --vm, --process, --call or --since"
            )
        sender, receiver = (event.process, event.peer) if event.outward else (event.peer, event.process)
        call = HCALLS.by_number.get(event.number or -1) or UCALLS.by_number.get(event.number or -1)
        time_ns = event.time_ns if event.vm in repeatable else None
        one = Said(event.t_ns, event.name, event.text, event.values, time_ns, is_private=bool(call and call.private))
        one.cause = event.cause
        said[event.link, sender, receiver].append(one)
        if event.kind is EventKind.CALL:
            waiting[event.process, event.link, event.outward, event.correlation] = one
    return {key: _ordered(messages) for key, messages in said.items()}


def _ordered(messages: list[Said]) -> list[Said]:
    """With those that nothing orders in an order of their own."""
    ordered: list[Said] = []
    for (_, cause), group in groupby(messages, key=lambda one: (one.name, one.cause)):
        together = list(group)
        if cause:
            together.sort(key=lambda one: one.text)
        ordered += together
    return ordered


def _take_answer(waiting: dict[tuple[str, str, bool, int | None], Said], event: Event) -> None:
    assert event.link is not None
    call = waiting.pop((event.process, event.link, not event.outward, answered_by(event)), None)
    if call is not None:
        call.result = event.result if call.is_private else event.text.partition(" -> ")[2]


def _compare_pair(key: _Key, a: list[Said], b: list[Said], *, to_the_end: bool) -> PairDiff:
    link, sender, receiver = key
    facts: dict[str, Any] = {"sender": sender, "receiver": receiver, "link": link, "n_a": len(a), "n_b": len(b)}
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if not _alike(one, other):
            return PairDiff(n_same=index, differs=True, a=one.line(), b=other.line(), t_ns=one.t_ns, **facts)
    n_same = min(len(a), len(b))
    longer = (a if len(a) > len(b) else b)[n_same:]
    if not longer:
        return PairDiff(n_same=n_same, differs=False, **facts)
    line_a, line_b = (longer[0].line(), None) if longer is a[n_same:] else (None, longer[0].line())
    return PairDiff(n_same=n_same, differs=to_the_end, a=line_a, b=line_b, t_ns=longer[0].t_ns, **facts)


def _alike(a: Said, b: Said) -> bool:
    """What only one of two knows is no difference: the answer, or the VM's time, which the receiver does not have."""
    answered_alike = a.result == b.result or a.result is None or b.result is None
    timed_alike = a.time_ns == b.time_ns or a.time_ns is None or b.time_ns is None
    return (a.name, a.values) == (b.name, b.values) and timed_alike and answered_alike


def _notes(a: Survey, b: Survey) -> Iterator[str]:
    for side, it in (("A", a), ("B", b)):
        yield from (f"{side} goes as far as it can be read: {error}" for error in it.unreadable.values())
        yield from (f"{side} goes as far as it can be read: {path} was cut off inside an entry" for path in it.cut)
    for process in sorted({*a.began, *b.began}):
        one, other = a.began.get(process), b.began.get(process)
        if one is None or other is None:
            yield f"{process} has a trace only in {'B' if one is None else 'A'}"
        elif one.seed != other.seed:
            yield f"{process} ran with seed {one.seed} in A and {other.seed} in B"
