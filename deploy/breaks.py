"""The breaks on messages of a cluster: set in every process that receives what they mean, listed, and let go on.

A message that a break stops stays where it was received. Its VM is stopped as QMP `stop` does, and runs again when
nothing of it is kept any more. Peers of the process that keeps it lose no patience meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun
from deploy.debug_session import note
from deploy.sides import vm_hosts
from deploy.states import printable
from deploy.supervise import tell_peers
from deploy.waiting import follow_waits
from protocol.breaks import MAX_KEPT, Action, Break, BreakOrder, read_break
from protocol.control import BreakHit
from protocol.errors import PeerGone, UserError
from protocol.roles import Role

_RUN_SECONDS = 10.0


class KeptRow(msgspec.Struct, kw_only=True):
    """A message that a break has stopped."""

    number: int
    id: int
    process: str
    vm: str | None
    text: str


class BreakRow(msgspec.Struct, kw_only=True):
    """A break. `counts` says for each process where it is set how often it fitted, None when that was not heard."""

    id: int
    text: str
    action: str
    code: str | None
    nth: int
    counts: dict[str, int | None]


class BreakList(msgspec.Struct, kw_only=True):
    """What `pefbox break` shows."""

    breaks: list[BreakRow]
    kept: list[KeptRow]


@dataclass(slots=True)
class _Kept:
    child: Child
    message: int
    row: KeptRow
    stops: frozenset[str]
    """The VMs that stand still for it."""

    def is_of(self, vm: str | None) -> bool:
        """Whether it is one of `vm`'s, or names no VM and stops this one; None means any VM."""
        return vm in (None, self.row.vm) or (self.row.vm is None and vm in self.stops)


@dataclass(slots=True)
class Breaks:
    """Of one run of a cluster."""

    run: ClusterRun
    set_breaks: dict[int, Break] = field(default_factory=dict)
    kept: list[_Kept] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    """The VMs that a break has stopped; not those that their users have paused."""
    _run_orders: dict[str, trio.Lock] = field(default_factory=dict)
    """A VM is ordered to stop or to go on once what the order before came to is known."""
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    # -- orders of the operator -------------------------------------------------------------------------------

    async def add(self, text: str, action: str, code: str | None, nth: int) -> BreakRow:
        """Set a break; raises UserError, and then it is set nowhere."""
        self._refuse_without_debug()
        number = next(self._ids)
        order = BreakOrder(id=number, text=text, action=action, code=code, nth=nth)
        read = read_break(order)
        places = self._places(read)
        if not places:
            raise UserError(self._nobody(read))
        for child in places:
            await note(self.run, child, "break-set", text=text, action=action)
        self.set_breaks[number] = read
        refusals = await self._set_in(places, read)
        if refusals:
            await self._undo(places, number)
            raise UserError(refusals[0])
        return await self._row(read)

    async def delete(self, number: int) -> None:
        """Remove a break; what it kept goes on.

        Raises UserError for one that is not set, and while a process where it is set cannot be told.
        """
        read = self.set_breaks.get(number)
        if read is None:
            raise UserError(f"no break {number}; there are: {', '.join(map(str, self.set_breaks)) or 'none'}")
        refusals = []
        for child in self._places(read):
            answer = await _ask(child, "break.delete", {"id": number})
            if isinstance(answer, str):
                refusals.append(answer)
            else:
                self._forget([kept for kept in self.kept if kept.row.id == number and kept.child is child])
        if not refusals:
            self.set_breaks.pop(number, None)
            self._forget([kept for kept in self.kept if kept.row.id == number])
        await self._go_on_where_possible(self.run.vms)
        if refusals:
            raise UserError(f"break {number} is still set: {refusals[0]}")

    async def shown(self) -> BreakList:
        """Every break with its counts, and what is kept."""
        rows = [await self._row(read) for read in list(self.set_breaks.values())]
        return BreakList(breaks=rows, kept=[kept.row for kept in self.kept])

    async def step(self, vm: str | None) -> KeptRow:
        """Let the oldest kept message pass, of `vm` or of all; its row. Raises UserError when there is none."""
        self._refuse_without_debug()
        kept = next((kept for kept in self.kept if kept.is_of(vm)), None)
        if kept is None:
            raise UserError(f"no message{f' of {vm}' if vm else ''} is stopped")
        await self._pass(kept)
        return kept.row

    async def go_on(self, vm: str | None) -> int:
        """Let every kept message pass and run the VMs again that breaks have stopped; how many messages it was."""
        self._refuse_without_debug()
        passing = [kept for kept in self.kept if kept.is_of(vm)]
        for kept in passing:
            await self._pass(kept)
        await self._go_on_where_possible(self.run.vms)
        return len(passing)

    # -- news of the processes --------------------------------------------------------------------------------

    def hit(self, child: Child, hit: BreakHit) -> None:
        """A process keeps a message."""
        of = self.set_breaks.get(hit.id)
        if of is None or not self._may_hit(child, of, hit.vm):
            self.run.log.error("break hit refused", process=child.target, id=hit.id)
            # Of a break that was deleted meanwhile, or could not be set everywhere: nobody else would let it pass.
            _tell(child, "break.release", {"message": hit.message})
            return
        vm = hit.vm if hit.vm in self.run.vms else None
        number = next(self._numbers)
        row = KeptRow(number=number, id=hit.id, process=child.target, vm=vm, text=printable(hit.text))
        stops = self._to_stop(child, of, vm)
        self.kept.append(_Kept(child, hit.message, row, stops))
        child.kept_messages += 1
        child.detail = child.settled_detail
        tell_peers(self.run, child)
        follow_waits(self.run)
        self.run.report(f"break {hit.id} at {child.target}: {row.text}", process=child.target, vm=vm)
        self.run.nursery.start_soon(self._note_hit, child, of)
        self.run.nursery.start_soon(self._stop_all, stops)

    def started(self, child: Child) -> None:
        """A new process has every break too; and a VM that is started anew runs, one that arrives is as it was."""
        if child.plan.role is Role.QEMU and child not in self.run.incoming.values():
            self.stopped.discard(child.plan.vm or "")
        if self.set_breaks and self.run.is_debuggable(child.plan):
            self.run.nursery.start_soon(self._set_all_in, child)

    def ended(self, child: Child) -> None:
        """What a process kept is gone with it."""
        gone = [kept for kept in self.kept if kept.child is child]
        self._forget(gone)
        if gone:
            self.run.nursery.start_soon(self._go_on_where_possible, list(self.run.vms))

    # -- details ----------------------------------------------------------------------------------------------

    def _refuse_without_debug(self) -> None:
        if not self.run.options.debug:
            raise UserError("breaks on messages are for a cluster started with `pefbox up --debug`")

    def _debuggable(self) -> list[Child]:
        return [child for child in self.run.living() if self.run.is_debuggable(child.plan)]

    def _places(self, read: Break) -> list[Child]:
        """Where it is looked at."""
        roles = read.receivers()
        return [child for child in self._debuggable() if child.plan.role in roles]

    def _nobody(self, read: Break) -> str:
        roles = read.receivers()
        closed = [child.target for child in self.run.living() if child.plan.role in roles]
        return (
            f"only {', '.join(closed) or 'nobody'} receives it: a guest is looked into where its VM says "
            "`debuggable = true`"
        )

    def _may_hit(self, child: Child, of: Break, vm: str | None) -> bool:
        """Whether `child` can have met it: what a process says of others must not stop them (S5)."""
        if not of.action.keeps or child.kept_messages >= MAX_KEPT:
            return False
        if child.plan.role not in of.receivers() or not self.run.is_debuggable(child.plan):
            return False
        if child.plan.vm is not None:
            return vm in (None, child.plan.vm)
        record = self.run.vms.get(vm or "")
        return record is None or child.plan.host in vm_hosts(record)

    async def _set_in(self, places: Iterable[Child], read: Break) -> list[str]:
        """Why it is not set, of those where it is not."""
        arguments = msgspec.to_builtins(read.order)
        answers = [await _ask(child, "break.set", arguments) for child in places]
        return [answer for answer in answers if isinstance(answer, str)]

    async def _undo(self, places: Iterable[Child], number: int) -> None:
        """Nothing is left of a break that could not be set everywhere; who stands still hears it when it goes on."""
        self.set_breaks.pop(number, None)
        for child in places:
            _tell(child, "break.delete", {"id": number})
        self._forget([kept for kept in self.kept if kept.row.id == number])
        await self._go_on_where_possible(self.run.vms)

    async def _set_all_in(self, child: Child) -> None:
        for read in list(self.set_breaks.values()):
            if child.plan.role not in read.receivers():
                continue
            try:
                await note(self.run, child, "break-set", text=read.order.text, action=read.order.action)
                refusals = await self._set_in([child], read)
            except UserError as error:
                refusals = [str(error)]
            if refusals:
                self.run.report(f"break {read.order.id} is not set in {child.target}: {refusals[0]}")

    async def _row(self, read: Break) -> BreakRow:
        counts: dict[str, int | None] = {}
        for child in self._places(read):
            answer = await _ask(child, "break.counts", {})
            count = answer.get(str(read.order.id)) if isinstance(answer, dict) else None
            counts[child.target] = count if isinstance(count, int) else None
        order = read.order
        return BreakRow(
            id=order.id, text=order.text, action=order.action, code=order.code, nth=order.nth, counts=counts
        )

    async def _note_hit(self, child: Child, of: Break) -> None:
        try:
            await note(self.run, child, "break-hit", text=of.order.text)
        except UserError as error:
            self.run.log.warning("not in the audit log", process=child.target, reason=str(error))

    async def _stop_all(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            await self._stop(name)

    def _to_stop(self, child: Child, of: Break, vm: str | None) -> frozenset[str]:
        """Of a message that names no VM those of the host."""
        if of.action is Action.STOP_CLUSTER:
            return frozenset(self.run.vms)
        if vm is not None:
            return frozenset({vm})
        return frozenset(name for name, record in self.run.vms.items() if record.spec.host == child.plan.host)

    async def _stop(self, name: str) -> None:
        async with self._order_of(name):
            if not self._is_held(name):
                return
            answer = await _ask(self.run.child(name, Role.QEMU), "run.stop", {}, _RUN_SECONDS)
            if isinstance(answer, str):
                # The order may be what a break keeps: it is obeyed later, so the VM counts as stopped.
                self.run.log.warning("not stopped yet", vm=name, reason=answer)
            if not isinstance(answer, dict) or answer.get("stopped") is not False:
                # Otherwise its user has paused it, or it does not run: that is not ours to undo.
                self.stopped.add(name)
        await self._go_on_where_possible([name])

    async def _pass(self, kept: _Kept) -> None:
        answer = await _ask(kept.child, "break.release", {"message": kept.message})
        if isinstance(answer, str):
            raise UserError(f"message {kept.row.number} does not pass: {answer}")
        self._forget([kept])

    def _forget(self, gone: list[_Kept]) -> None:
        for kept in gone:
            if kept not in self.kept:
                continue
            self.kept.remove(kept)
            kept.child.kept_messages -= 1
            if not kept.child.kept_messages and kept.child.is_running:
                kept.child.detail = kept.child.settled_detail
                tell_peers(self.run, kept.child)

    async def _go_on_where_possible(self, names: Iterable[str]) -> None:
        """Run those VMs again that breaks have stopped and that stand still for nothing that is kept."""
        for name in sorted(names):
            if self._is_held(name):
                continue
            async with self._order_of(name):
                if name in self.stopped and not self._is_held(name):
                    self.stopped.discard(name)
                    await self._run_again(name)

    def _is_held(self, name: str) -> bool:
        return any(name in kept.stops for kept in self.kept)

    def _order_of(self, name: str) -> trio.Lock:
        return self._run_orders.setdefault(name, trio.Lock())

    async def _run_again(self, name: str) -> None:
        answer = await _ask(self.run.child(name, Role.QEMU), "run.cont", {}, _RUN_SECONDS)
        if isinstance(answer, str):
            self.run.log.warning("does not go on", vm=name, reason=answer)


async def _ask(child: Child | None, what: str, arguments: dict[str, Any], seconds: float = 1.0) -> Any:  # noqa: ANN401
    """The answer of a process, or the line that says why there is none."""
    if child is None:
        return "the process is missing"
    try:
        return await child.query(what, arguments, seconds)
    except (PeerGone, QueryRefused) as error:
        return printable(str(error))


def _tell(child: Child, what: str, arguments: dict[str, Any]) -> None:
    """An order that nobody waits for; what kept a message is gone with a process that takes none."""
    try:
        child.tell(what, arguments)
    except PeerGone:
        return


def breaks_of(run: ClusterRun) -> Breaks:
    """The breaks of `run`, made when they are first asked for."""
    if run.breaks is None:
        run.breaks = Breaks(run)
    return run.breaks
