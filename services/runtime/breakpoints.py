"""The breaks on messages of one process: looked at where it receives, before anything is served.

A message that a break stops is kept, and only it: the service goes on. In a guest messages are looked at in the
processor's thread and orders come in the service loop; each touches one entry of a dictionary at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.break_expression import Value
from protocol.breaks import MAX_KEPT, Action, Break, BreakOrder, read_break
from protocol.control import BreakHit
from protocol.errors import PeerError, PeerGone, UserError
from protocol.message_fields import fields_of, lpid_of
from protocol.wire import Envelope, MessageKind
from services.runtime.log import Log
from services.runtime.watch import Watch, WatchedEnd, describe


@dataclass(frozen=True, slots=True)
class _Kept:
    break_id: int
    end: WatchedEnd
    envelope: Envelope


class Breakpoints:
    """Of one process. `report` may be called in the thread that reads the links."""

    def __init__(
        self, target: str, watch: Watch, vm_names: Mapping[int, str], log: Log, report: Callable[[BreakHit], None]
    ) -> None:
        """`vm_names` are the VMs that this process knows by lpid."""
        self._target = target
        self._watch = watch
        self._vm_names = vm_names
        self._log = log
        self._report = report
        self._breaks: dict[int, Break] = {}
        self._hits: Counter[int] = Counter()
        self._kept: dict[int, _Kept] = {}
        self._numbers = itertools.count(1)

    # -- orders -----------------------------------------------------------------------------------------------

    async def set(self, arguments: dict[str, Any]) -> None:
        """A new break; raises UserError."""
        try:
            order = msgspec.convert(arguments, BreakOrder)
        except msgspec.ValidationError as error:
            raise UserError(f"no break: {error}") from None
        self._breaks[order.id] = read_break(order)
        self._watch.add(self._look)

    async def delete(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A break is gone; what it kept is served. The numbers of these messages."""
        number = int(arguments["id"])
        self._breaks.pop(number, None)
        self._hits.pop(number, None)
        passed = [message for message, kept in self._kept.copy().items() if kept.break_id == number]
        for message in passed:
            self._pass(message)
        if not self._breaks:
            self._watch.remove(self._look)
        return {"passed": passed}

    async def release(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Serve a message that is kept; whether it was."""
        return {"passed": self._pass(int(arguments["message"]))}

    async def counts(self, _arguments: dict[str, Any]) -> dict[str, int]:
        """How often each break fitted, by its number."""
        return {str(number): self._hits[number] for number in self._breaks}

    def _pass(self, message: int) -> bool:
        kept = self._kept.pop(message, None)
        if kept is None:
            return False
        if kept.end.peer_state != "closed":
            kept.end.serve_now(kept.envelope)
        return True

    # -- messages ---------------------------------------------------------------------------------------------

    def _look(self, end: WatchedEnd, envelope: Envelope) -> bool:
        try:
            return self._is_served(end, envelope)
        except Exception as error:
            # Whoever sends what nobody thought of must not end the service that looks at it (S5).
            self._log.error("a break could not look at a message", link=end.id, exc_info=error)
            return True

    def _is_served(self, end: WatchedEnd, envelope: Envelope) -> bool:
        """Of several breaks that fit, all count and the first that does something about the message decides."""
        fitting = [it for it in list(self._breaks.values()) if it.may_mean(envelope)]
        if not fitting:
            return True
        fields = fields_of(end.kind, envelope)
        vm = self._vm_of(end, envelope, fields)
        # What every message has comes last: a name of the declaration never hides it.
        fields |= {"sender": end.peer, "receiver": self._target, "link": end.id, "cause": envelope.cause}
        if vm is not None:
            fields["vm"] = vm
        met = [it for it in fitting if it.means(fields) and self._counts(it)]
        return all(self._act(it, end, envelope, vm) for it in met)

    def _counts(self, of: Break) -> bool:
        """Whether it is the time at which the break does what it does."""
        number = of.order.id
        self._hits[number] += 1
        return of.order.nth in (0, self._hits[number])

    def _vm_of(self, end: WatchedEnd, envelope: Envelope, fields: dict[str, Value]) -> str | None:
        owner = end.id.partition(":")[0]
        if owner in self._vm_names.values():
            return owner
        lpid = lpid_of(fields, envelope)
        if lpid is None and len(self._vm_names) == 1:
            return next(iter(self._vm_names.values()))
        return None if lpid is None else self._vm_names.get(lpid)

    def _act(self, of: Break, end: WatchedEnd, envelope: Envelope, vm: str | None) -> bool:
        """Whether the message is served, as far as this break goes."""
        match of.action:
            case Action.COUNT:
                return True
            case Action.LOG:
                self._log.warning("break", id=of.order.id, vm=vm, message=describe(end, envelope))
                return True
            case Action.DROP:
                return False
            case Action.FAIL:
                return self._fail(of, end, envelope)
            case Action.STOP | Action.STOP_CLUSTER:
                return self._keep(of, end, envelope, vm)

    def _fail(self, of: Break, end: WatchedEnd, envelope: Envelope) -> bool:
        if envelope.kind is not MessageKind.CALL or of.code is None:
            return True
        try:
            end.refuse_now(envelope, of.code)
        except (PeerError, PeerGone) as error:
            self._log.warning("break", id=of.order.id, reason=str(error))
        return False

    def _keep(self, of: Break, end: WatchedEnd, envelope: Envelope, vm: str | None) -> bool:
        if len(self._kept) >= MAX_KEPT:
            self._log.warning("break", id=of.order.id, reason=f"{MAX_KEPT} messages are kept already")
            return True
        text = describe(end, envelope)
        message = next(self._numbers)
        self._kept[message] = _Kept(of.order.id, end, envelope)
        if of.order.id not in self._breaks and self._kept.pop(message, None) is not None:
            # Deleted in the other thread, which may have looked through what is kept already.
            return True
        self._report(BreakHit(of.order.id, message, vm, text))
        return False
