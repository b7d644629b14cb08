"""Entries of trace files as events: with names, arguments and results from the declarations.

Anybody may have written a file, and a guest the texts of its messages: names and `text` are safe for one line of a
terminal.

A decoder of one file remembers its links, its VMs and its open calls: so a reply tells how long its call took, and
messages between ultravisor and kvm, whose links are the host's, belong to the VM that their call names.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, cast

import msgspec

from deploy.trace.bounded import remember
from deploy.trace.link_ends import LinkEnds
from protocol import message_text
from protocol import trace as t
from protocol.declare import Call
from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.hcalls import HCALLS
from protocol.links import ULTRAVISOR_KVM, name_of
from protocol.roles import Role
from protocol.trace_rules import UNDECLARED
from protocol.ucalls import UCALLS, UV_RETURN
from protocol.wire import Envelope, MessageKind, decode
from shared.terminal_text import one_line

MAX_OPEN = 4096
"""Calls without an answer that a decoder remembers for each file; the oldest make room."""


class EventKind(StrEnum):
    """What an event is."""

    CALL = "call"
    REPLY = "reply"
    EVENT = "event"
    PAGE = "page"
    INTERRUPT = "interrupt"
    REQUEST = "request"
    MIGRATION = "migration"
    MALFORMED = "malformed"
    BEGAN = "began"
    LOST = "lost"


_DOWNWARD = [role.value for role in (Role.GUEST, Role.ULTRAVISOR, Role.KVM, Role.QEMU)]
MESSAGE_KINDS = frozenset({EventKind.CALL, EventKind.REPLY, EventKind.EVENT, EventKind.MALFORMED})


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened in `process`.

    Of a message: `peer`, whether it went there (`outward`), `link`, `number`, `correlation`, `values` (registers or
    fields of its body), `message`, which counts those of the trace: what came has that of its copy as it was sent, and
    None where there is no such copy (deploy.trace.pairing). A reply, and UV_RETURN, which answers a call, names in
    `ends` the call that it ends, and has a `result`, and `took_ns` where the call was seen. `time_ns` is the VM's own
    time. Of a device request: `request`, its name. `text` is what people read.
    """

    t_ns: int
    kind: EventKind
    process: str
    name: str
    text: str
    vm: str | None = None
    cause: int = 0
    peer: str | None = None
    outward: bool = False
    link: str | None = None
    number: int | None = None
    correlation: int | None = None
    message: int | None = None
    values: list[Any] | None = None
    ends: str | None = None
    result: str | None = None
    took_ns: int | None = None
    time_ns: int | None = None
    request: str | None = None
    withheld: bool = False

    @property
    def is_message(self) -> bool:
        """Whether it crossed a link."""
        return self.kind in MESSAGE_KINDS

    @property
    def is_second_copy(self) -> bool:
        """Whether it is a message as it came, which the trace has as it was sent, too."""
        return self.message is not None and not self.outward


def answered_by(event: Event) -> int | None:
    """The correlation id of the call that an answer ends; UV_RETURN names it by its second register."""
    if event.kind is EventKind.REPLY:
        return event.correlation
    return event.values[1] if event.values is not None and len(event.values) > 1 else None


def process_rank(process: str) -> tuple[int, str]:
    """To sort processes as a call goes down: guests, ultravisors, kvms, qemus."""
    role = process.partition("/")[2].partition(".")[0]
    return (_DOWNWARD.index(role) if role in _DOWNWARD else len(_DOWNWARD), process)


class _Open(msgspec.Struct, frozen=True):
    t_ns: int
    name: str
    call: Call | None
    vm: str | None


class EventDecoder:
    """Turns the entries of one file, in their order, into events. `place` names a process that moved here.

    Tells `ends` of its links.
    """

    def __init__(self, place: str | None = None, ends: LinkEnds | None = None) -> None:
        self.began: t.Began | None = None
        self.process = "?"
        self.clocks: dict[str, str] = {}
        """`time` of each VM by name."""
        self._place = place
        self._ends = LinkEnds() if ends is None else ends
        self._links: dict[int, t.LinkOpened] = {}
        self._vms: dict[int, str] = {}
        self._open: dict[tuple[int, bool, int], _Open] = {}
        """By link, whether the call went outward, and correlation id."""

    def event(self, entry: t.AnyEntry) -> Event | None:
        """The event; None for what only says how to understand others."""
        match entry:
            case t.MessageSeen():
                return self._message(entry)
            case t.LinkOpened():
                self._links[entry.index] = entry
                self._ends.add(entry.id, self.process)
            case t.VmKnown():
                self._vms[entry.lpid] = entry.name
                self.clocks[entry.name] = entry.time
            case t.Began():
                return self._begin(entry)
            case t.Lost():
                n = f"{entry.n_entries} entries are missing: " if entry.n_entries else ""
                return self._plain(entry, EventKind.LOST, "lost", f"{n}{entry.reason}")
            case t.PageChanged():
                what = f"gfn {entry.gfn:#x} {entry.before} -> {entry.after} ({entry.event})"
                return self._of_vm(entry, EventKind.PAGE, entry.event, what)
            case t.InterruptMoved():
                step = entry.step.name.lower()
                return self._of_vm(entry, EventKind.INTERRUPT, step, f"interrupt {entry.source:#x} {step}")
            case t.RequestMoved():
                what = message_text.of_request(entry)
                event = self._of_vm(entry, EventKind.REQUEST, entry.step.name.lower(), what)
                return msgspec.structs.replace(event, request=one_line(message_text.name_of_request(entry)))
            case t.MigrationStepped():
                return self._of_vm(entry, EventKind.MIGRATION, entry.status, f"{entry.side}: {entry.status}")
        return None

    def _begin(self, began: t.Began) -> Event:
        self.began, self.process = began, self._place or began.process
        self._links.clear()
        self._vms.clear()
        self._open.clear()
        facts = f"cluster {began.cluster}, host {began.host}, pid {began.pid}, seed {began.seed}"
        return self._plain(began, EventKind.BEGAN, "began", f"recording began: {facts}")

    def _plain(self, entry: t.Began | t.Lost, kind: EventKind, name: str, what: str) -> Event:
        return Event(t_ns=entry.t_ns, kind=kind, process=self.process, name=name, text=one_line(what))

    def _of_vm(
        self,
        entry: t.PageChanged | t.InterruptMoved | t.RequestMoved | t.MigrationStepped,
        kind: EventKind,
        name: str,
        what: str,
    ) -> Event:
        return Event(
            t_ns=entry.t_ns,
            kind=kind,
            process=self.process,
            name=one_line(name),
            text=one_line(what),
            vm=self._vms.get(entry.lpid),
            cause=entry.cause,
        )

    # -- messages ---------------------------------------------------------------------------------------------

    def _message(self, seen: t.MessageSeen) -> Event:
        link = self._links.get(seen.link)
        facts: dict[str, Any] = {
            "t_ns": seen.t_ns,
            "process": self.process,
            "outward": seen.outward,
            "time_ns": seen.time_ns,
            "withheld": seen.withheld,
            "link": None if link is None else link.id,
            "peer": None if link is None else link.peer,
            "vm": None if link is None else link.vm,
        }
        try:
            envelope = decode(seen.frame)
            body = message_text.tamed(msgspec.msgpack.decode(envelope.body))
        except (MalformedMessage, TypeError, *DECODE_ERRORS) as error:
            reason = "withheld" if seen.withheld else str(error)
            return Event(kind=EventKind.MALFORMED, name="malformed", text=one_line(f"malformed: {reason}"), **facts)
        kind = "" if link is None else link.kind
        facts |= {"number": envelope.number, "correlation": envelope.correlation, "cause": envelope.cause}
        facts["name"] = "undeclared" if envelope.number == UNDECLARED else name_of(envelope.number)
        facts["values"] = body if isinstance(body, list) else [body]
        if facts["vm"] is None and kind == ULTRAVISOR_KVM.name:
            facts["vm"] = self._vm_named_by(body)
        answered = _answered(envelope, body)
        if answered is not None:
            return self._answer(seen, envelope, body, answered, facts)
        if envelope.kind is MessageKind.CALL:
            self._remember(seen, envelope, facts)
        event_kind = EventKind.CALL if envelope.kind is MessageKind.CALL else EventKind.EVENT
        return Event(kind=event_kind, text=one_line(message_text.of_call(kind, envelope.number, body)), **facts)

    def _vm_named_by(self, body: object) -> str | None:
        lpid = body[0] if isinstance(body, list) and body else None
        return self._vms.get(lpid) if isinstance(lpid, int) else None

    def _remember(self, seen: t.MessageSeen, envelope: Envelope, facts: dict[str, Any]) -> None:
        call = HCALLS.by_number.get(envelope.number) or UCALLS.by_number.get(envelope.number)
        began = _Open(seen.t_ns, facts["name"], call, facts["vm"])
        remember(self._open, (seen.link, seen.outward, envelope.correlation), began, MAX_OPEN)

    def _answer(
        self,
        seen: t.MessageSeen,
        envelope: Envelope,
        body: Any,  # noqa: ANN401
        answered: int,
        facts: dict[str, Any],
    ) -> Event:
        began = self._open.pop((seen.link, not seen.outward, answered), None)
        facts["vm"] = facts["vm"] if began is None else began.vm
        if began is not None:
            facts["took_ns"] = seen.t_ns - began.t_ns
        is_return = envelope.kind is MessageKind.CALL
        call = began.call if is_return and began is not None else None
        name = facts["ends"] = began.name if began is not None else facts["name"]
        facts["result"], what = message_text.of_result(call, envelope.number, body, is_return=is_return)
        of = f"{facts['name']} of {name}" if is_return else name
        kind = EventKind.CALL if is_return else EventKind.REPLY
        return Event(kind=kind, text=one_line(f"{of} -> {what}"), **facts)


def _answered(envelope: Envelope, body: object) -> int | None:
    """The correlation id that a message answers: its own for a reply, the cookie for UV_RETURN."""
    if envelope.kind is MessageKind.REPLY:
        return envelope.correlation
    if envelope.kind is MessageKind.CALL and envelope.number == UV_RETURN.number and message_text.are_registers(body):
        registers = cast("list[int]", body)
        return registers[1] if len(registers) > 1 else None
    return None
