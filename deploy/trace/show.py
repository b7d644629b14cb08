"""Events as lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from deploy.trace.events import Event, EventKind
from deploy.trace.filters import Filter

_WHERE_WIDTH = 34
_NS_PER_US = 1000
_NS_PER_S = 1e9


def line(event: Event) -> str:
    """`4456.133622 vm1/guest > vm1/kvm   H_CEDE() of vcpu 0  12 us  cause 7`."""
    took = "" if event.took_ns is None else f"  {event.took_ns / _NS_PER_US:.0f} us"
    held_back = "  (in part)" if event.withheld else ""
    cause = f"  cause {event.cause:#x}" if event.cause else ""
    return f"{event.t_ns / _NS_PER_S:.6f} {_where(event):<{_WHERE_WIDTH}} {event.text}{took}{held_back}{cause}"


def row(event: Event) -> dict[str, Any]:
    """For `--json`; bytes as base64."""
    facts: dict[str, Any] = msgspec.to_builtins(event)
    return facts


def each_message_once(events: Iterator[Event], filter_: Filter) -> Iterator[Event]:
    """Messages as they were sent, and as they came those that their sender's file does not have.

    With a process asked for, all that it sent and got.
    """
    for event in events:
        if filter_.process is not None or not event.is_second_copy:
            yield event


def _where(event: Event) -> str:
    if not event.is_message:
        return event.process
    arrow = "<" if event.kind is EventKind.REPLY else ">"
    sender, receiver = (event.process, event.peer) if event.outward else (event.peer, event.process)
    return f"{sender} {arrow} {receiver}" if arrow == ">" else f"{receiver} {arrow} {sender}"
