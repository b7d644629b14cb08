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
    lines: list[str] = []
    names: set[str] = set()
    n_lines, start_ns = 0, None
    for event in events:
        if event.cause != cause or event.is_second_copy:
            continue
        start_ns = event.t_ns if start_ns is None else start_ns
        n_lines += 1
        if n_lines <= MAX_LINES:
            lines.append(_line(event, start_ns))
            names.update(_ends(event))
    if not lines:
        raise UserError(f"--cause: this trace has no cause {cause:#x}; `pefbox trace show` prints those that it has")
    if n_lines > MAX_LINES:
        raise UserError(f"cause {cause:#x} has {n_lines} messages, a diagram at most {MAX_LINES}; narrow it by --since")
    participants = [
        f"    participant {_id(name)} as {name.translate(_ESCAPES)}" for name in sorted(names, key=process_rank)
    ]
    return "\n".join(["sequenceDiagram", *participants, *lines]) + "\n"


def _line(event: Event, start_ns: int) -> str:
    after = f"+{(event.t_ns - start_ns) / _NS_PER_US:.0f} us"
    what = event.text.translate(_ESCAPES)
    if not event.is_message:
        return f"    Note over {_id(event.process)}: {what} ({after})"
    sender, receiver = _ends(event) if event.outward else _ends(event)[::-1]
    arrow = "-->>" if event.kind is EventKind.REPLY else "-)" if event.kind is EventKind.EVENT else "->>"
    return f"    {_id(sender)}{arrow}{_id(receiver)}: {what} ({after})"


def _ends(event: Event) -> tuple[str, ...]:
    return (event.process, event.peer) if event.peer is not None else (event.process,)


def _id(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name) or "_"
