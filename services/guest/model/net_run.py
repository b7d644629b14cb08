"""Measured runs of echo requests to another kernel, and the answers to its own.

Each request has LOST_NS to be answered and is lost then; a run that hears nothing for GIVE_UP_NS is over. So a run ends
whatever the network does.
"""

from __future__ import annotations

from protocol.ethernet import HEADER_BYTES
from services.guest.model.cpu import Cpu, Step
from services.guest.model.echo import ECHO_HEADER_BYTES, MAX_SEQUENCE, Echo, EchoKind, parse_echo, payload_of
from services.guest.model.pages import PageAllocator
from services.guest.model.run_tally import RunTally
from services.guest.model.state import NetRun, Pool
from services.guest.model.virtio_net import N_SLOTS, NetDriver, NetDrop, format_mac

MAX_DEPTH = N_SLOTS // 2
"""So that a kernel which asks can answer as well."""
LOST_NS = 1_000_000_000
GIVE_UP_NS = 5_000_000_000
REQUEST_COST = 2_000


class NetRunner:
    """One run at a time over `state`; frames of the card come here."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, pool: Pool, net: NetDriver, state: NetRun) -> None:
        self._cpu = cpu
        self._net = net
        self._state = state
        self._tally = RunTally(cpu, pages, pool, state.tally)
        net.hand_to(self._received)

    @property
    def max_payload_bytes(self) -> int:
        """The longest payload that fits a frame."""
        return max(0, self._net.state.mtu + HEADER_BYTES - ECHO_HEADER_BYTES)

    def start(self, peer: bytes, count: int, payload_bytes: int, depth: int, *, ping: bool) -> None:
        """Begin `count` requests with `payload_bytes` each to the station `peer`, `depth` at a time."""
        state = self._state
        self._tally.begin()
        state.peer, state.count, state.payload_bytes, state.depth, state.ping = peer, count, payload_bytes, depth, ping
        state.n_issued = state.n_lost = 0
        state.open, state.error = {}, ""
        state.heard_ns = self._cpu.clock.now_ns()

    @property
    def finished(self) -> bool:
        """Whether every request of the run was answered or is lost, or the run is over for another reason."""
        state = self._state
        return bool(state.error) or state.tally.n_done + state.n_lost == state.count

    # -- steps --------------------------------------------------------------------------------------------------------

    def work(self) -> Step[None] | None:
        """What the run does next."""
        state = self._state
        if not state.count or self.finished:
            return None
        net = self._net.state
        deadline_ns = self.deadline_ns()
        if not net.ready or (deadline_ns is not None and self._cpu.clock.now_ns() >= deadline_ns):
            return self._give_up_some()
        may_issue = state.n_issued < state.count and len(state.open) < state.depth and self._net.has_slot
        return self._issue() if may_issue else None

    def deadline_ns(self) -> int | None:
        """When the oldest request is lost, or the run is over."""
        state = self._state
        if not state.count or self.finished:
            return None
        over_ns = state.heard_ns + GIVE_UP_NS
        return min([over_ns, *(submitted_ns + LOST_NS for submitted_ns in state.open.values())])

    def _issue(self) -> Step[None]:
        """Frames for as many requests as may be open; the card sends them in a step of its own."""
        state, own = self._state, self._net.state.mac
        while state.n_issued < state.count and len(state.open) < state.depth and self._net.has_slot:
            self._cpu.clock.charge(REQUEST_COST)
            state.sequence = state.sequence + 1 & MAX_SEQUENCE
            payload = payload_of(state.sequence, state.payload_bytes)
            self._net.send(Echo(state.peer, own, EchoKind.REQUEST, state.sequence, payload).pack())
            state.open[state.sequence] = self._cpu.clock.now_ns()
            state.n_issued += 1
        return
        yield

    def _give_up_some(self) -> Step[None]:
        """The requests that are lost; all of the run when the card is gone or nothing was heard for long."""
        state, now_ns = self._state, self._cpu.clock.now_ns()
        lost = [sequence for sequence, submitted_ns in state.open.items() if now_ns >= submitted_ns + LOST_NS]
        for sequence in lost:
            del state.open[sequence]
        state.n_lost += len(lost)
        if not self._net.state.ready:
            state.error = self._net.state.error or "the card was stopped"
        elif not self.finished and now_ns >= state.heard_ns + GIVE_UP_NS:
            state.error = f"no reply for {GIVE_UP_NS // 10**9} s"
        self._end_if_finished()
        return
        yield

    def _end_if_finished(self) -> None:
        if self.finished:
            self._state.open = {}
            self._tally.end()

    # -- frames -------------------------------------------------------------------------------------------------------

    def _received(self, frame: bytes) -> None:
        echo = parse_echo(frame)
        if echo is None or echo.destination != self._net.state.mac:
            self._net.drop(NetDrop.FOREIGN)
        elif echo.kind is EchoKind.REQUEST:
            self._net.send(echo.reply().pack())
        else:
            self._take_reply(echo)

    def _take_reply(self, echo: Echo) -> None:
        state = self._state
        submitted_ns = state.open.get(echo.sequence)
        expected = payload_of(echo.sequence, state.payload_bytes)
        if submitted_ns is None or echo.source != state.peer or echo.payload != expected:
            self._net.drop(NetDrop.STRAY)
            return
        del state.open[echo.sequence]
        state.heard_ns = self._cpu.clock.now_ns()
        self._tally.done(submitted_ns)
        self._end_if_finished()

    # -- results ------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """The result line: of a ping its replies and their times, else as RunTally.describe."""
        state = self._state
        if not state.ping:
            return self._tally.describe(state.tally.n_done * state.payload_bytes)
        p50_ns, p99_ns = self._tally.percentiles()
        return f"replies {state.tally.n_done} of {state.count} p50_ns {p50_ns} p99_ns {p99_ns}"

    def describe_lost(self) -> str:
        """A line about requests that were lost; empty when none was."""
        state = self._state
        lost = f"pefbox: net: {state.n_lost} of {state.n_issued} requests to {format_mac(state.peer)} lost"
        return lost if state.n_lost else ""
