"""One cause as a Mermaid sequence diagram: from the guest's call to the device and back."""

from __future__ import annotations

from collections.abc import Iterable

from deploy.trace.events import Event, EventKind, process_rank
from protocol.errors import UserError

MAX_LINES = 200
"""A diagram with more is none."""
_ESCAPES = str.maketrans({";": "#59;", "#": "#35;", "<": "#lt;"})
_NS_PER_US = 1000


def sequence_diagram(events: Iterable[Event], cause: int) -> str:
    """All of `cause`, one line a message; raises UserError when there is nothing of it, or too much to draw."""
    of_cause = [event for event in events if event.cause == cause]
    lines = _lines(of_cause)
    if not lines:
        raise UserError(f"--cause: this trace has no cause {cause:#x}; `pefbox trace show` prints those that it has")
    if len(lines) > MAX_LINES:
        raise UserError(
            f"cause {cause:#x} has {len(lines)} messages, a diagram at most {MAX_LINES}; narrow it by --since"
        )
    names = sorted({name for event in of_cause for name in _ends(event)}, key=process_rank)
    participants = [f"    participant {_id(name)} as {name.translate(_ESCAPES)}" for name in names]
    return "\n".join(["sequenceDiagram", *participants, *lines]) + "\n"


def _lines(events: list[Event]) -> list[str]:
    start_ns = events[0].t_ns if events else 0
    lines = []
    for event in events:
        after = f"+{(event.t_ns - start_ns) / _NS_PER_US:.0f} us"
        what = event.text.translate(_ESCAPES)
        if not event.is_message:
            lines.append(f"    Note over {_id(event.process)}: {what} ({after})")
        elif not event.is_second_copy:
            sender, receiver = _ends(event) if event.outward else _ends(event)[::-1]
            arrow = "-->>" if event.kind is EventKind.REPLY else "-)" if event.kind is EventKind.EVENT else "->>"
            lines.append(f"    {_id(sender)}{arrow}{_id(receiver)}: {what} ({after})")
    return lines


def _ends(event: Event) -> tuple[str, ...]:
    return (event.process, event.peer) if event.peer is not None else (event.process,)


def _id(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name) or "_"
