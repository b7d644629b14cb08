"""One process of the cluster as the launcher sees it: asked and watched."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from deploy.control_channel import ControlChannel
from deploy.plan import ProcessPlan
from deploy.states import ProcessState, printable
from protocol import control
from protocol.errors import PeerGone, UserError
from shared.link_shape import LinkShapes

if TYPE_CHECKING:
    from deploy.dap_port import DapPort
    from deploy.debug_session import DebugSession

QUERY_SECONDS = 0.5
_ORDER_SECONDS = 2.0


class QueryRefused(UserError):
    """A process answered a query with an error."""


class Child:
    """A started process. Its row in `status` stays when it is dead."""

    def __init__(self, plan: ProcessPlan, pid: int, channel: ControlChannel) -> None:
        self.plan = plan
        self.target = plan.target
        self.pid = pid
        self.channel = channel
        self.state = ProcessState.STARTING
        self.since_s = time.time()
        self.detail = ""
        self.protections: dict[str, str] = {}
        self.peers: set[str] = set()
        self.exit_expected = False
        self.debugger: DebugSession | None = None
        self.dap_port: DapPort | None = None
        self.entering = trio.Lock()
        """Held while a debugger is let in, so that nothing of what was checked for it changes meanwhile."""
        self.kept_messages = 0
        """Messages that breaks have stopped before it served them."""
        self.time_held = False
        """Of a guest: whether it was told that its time stands still."""
        self.has_keys = False
        self.link_shapes = LinkShapes()
        """Of a qemu: what it was last told."""
        self.hello = trio.Event()
        self.confined = trio.Event()
        self.ready = trio.Event()
        self.exited = trio.Event()
        self.pings: dict[int, tuple[float, trio.Event]] = {}
        self.held: list[tuple[control.Gift, int]] = []
        self._ping_numbers = itertools.count(1)
        self._query_ids = itertools.count(1)
        self._queries: dict[int, tuple[trio.Event, list[control.Answer]]] = {}

    @property
    def is_running(self) -> bool:
        """Whether the process still exists."""
        return not self.exited.is_set()

    @property
    def holds(self) -> bool:
        """Whether others wait for it on an operator's order: a debugger holds it, or it keeps a stopped message."""
        return self.kept_messages > 0 or (self.debugger is not None and self.debugger.held)

    @property
    def settled_state(self) -> ProcessState:
        """What it is in when no signal, silence or end says otherwise."""
        if self.debugger is not None and self.debugger.held:
            return ProcessState.DEBUGGED
        return ProcessState.RUNNING if self.ready.is_set() else ProcessState.STARTING

    @property
    def settled_detail(self) -> str:
        """What `status` says of it then."""
        if self.debugger is not None:
            return "a debugger is attached"
        return "keeps a message that a break has stopped" if self.kept_messages else ""

    @property
    def told_state(self) -> str:
        """What its peers are told of it: they are patient for as long as a debugger is there, held or not."""
        may_be_late = self.debugger is not None or self.kept_messages > 0
        if may_be_late and self.state in (ProcessState.RUNNING, ProcessState.WAITING):
            return ProcessState.DEBUGGED.value
        return self.state.value

    def change(self, state: ProcessState, detail: str = "") -> bool:
        """Note a new state; False when it is none, or when the process is over already."""
        if self.state.is_over or self.state is state:
            return False
        self.state, self.since_s = state, time.time()
        self.detail = printable(detail) or (self.detail if state.is_over else "")
        return True

    def gone(self, status: int, code: int) -> None:
        """The kernel reported its end: `code` and `status` as in waitid(2)."""
        self.detail = self.detail or _exit_text(status, code)
        ended = ProcessState.GONE if self.exit_expected else ProcessState.FAILED
        self.change(ended, self.detail)
        self.exited.set()
        for event, _ in self._queries.values():
            event.set()
        for _, event in self.pings.values():
            event.set()
        self.pings.clear()
        for _, fd in self.held:
            os.close(fd)
        self.held.clear()
        self.channel.close()

    def ping(self) -> trio.Event:
        """Send a ping; the event is set when its answer comes. Raises PeerGone when it cannot be sent."""
        sequence, event = next(self._ping_numbers), trio.Event()
        self.channel.send(control.Ping(sequence))
        self.pings[sequence] = (trio.current_time(), event)
        return event

    def ponged(self, sequence: int) -> None:
        """The answer to a ping came; earlier ones count as answered."""
        for number in [number for number in self.pings if number <= sequence]:
            self.pings.pop(number)[1].set()

    def silent_seconds(self) -> float:
        """How long the oldest ping waits for its answer; 0 when none does."""
        oldest = min((sent for sent, _ in self.pings.values()), default=None)
        return 0.0 if oldest is None else trio.current_time() - oldest

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, when the process still exists."""
        if self.is_running:
            os.kill(self.pid, number)

    async def query(self, what: str, arguments: dict[str, Any], seconds: float = QUERY_SECONDS) -> Any:  # noqa: ANN401
        """Ask the process; raises QueryRefused for its refusal, PeerGone when it does not answer in `seconds`."""
        return await self._ask(lambda query_id: control.Query(query_id, what, arguments), seconds)

    async def order(self, what: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """As `query`, for what somebody asked for; raises UserError when it is refused, or not answered."""
        try:
            return await self.query(what, arguments, _ORDER_SECONDS)
        except QueryRefused as refused:
            raise UserError(printable(str(refused))) from None
        except PeerGone as gone:
            raise UserError(f"{gone.peer} is {gone.state}") from None

    def tell(self, what: str, arguments: dict[str, Any]) -> None:
        """As `query`, and nobody waits for the answer: one that starts or stands still hears it when it goes on.

        Raises PeerGone when it takes nothing.
        """
        self.channel.send(control.Query(next(self._query_ids), what, arguments))

    async def remove_vm(self, vm: str, seconds: float) -> None:
        """Have the process forget `vm`; raises as `query`. One that stands still hears it when it goes on."""
        if self.is_running and not self.state.answers:
            self.channel.send(control.RemoveVm(next(self._query_ids), vm))
        await self._ask(lambda order_id: control.RemoveVm(order_id, vm), seconds)

    async def _ask(self, packet: Callable[[int], control.ToProcess], seconds: float) -> Any:  # noqa: ANN401
        if not self.state.answers:
            raise PeerGone(self.target, self.state.value)
        query_id = next(self._query_ids)
        event, answers = self._queries[query_id] = trio.Event(), []
        try:
            self.channel.send(packet(query_id))
            with trio.move_on_after(seconds):
                await event.wait()
        finally:
            del self._queries[query_id]
        if not answers:
            raise PeerGone(self.target, self.state.value if self.state.is_over else "silent")
        if answers[0].error is not None:
            raise QueryRefused(f"{self.target}: {answers[0].error}")
        return answers[0].result

    def answered(self, answer: control.Answer) -> None:
        """The process answered a query or order; an answer to none is ignored."""
        waiting = self._queries.get(answer.id)
        if waiting is not None:
            waiting[1].append(answer)
            waiting[0].set()


def _exit_text(status: int, code: int) -> str:
    if code == os.CLD_EXITED:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(status).name}"
    except ValueError:
        return f"killed by signal {status}"
