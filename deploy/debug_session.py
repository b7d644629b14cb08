"""A debugger in one process, as the launcher sees it: what the process says of it is acted on here.

While a process is held its peers lose no patience with it, nor with whom waits for it (`waiting.py`), and the time of
its VMs stands still. When the session ends, whoever ended it, all goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import trio

from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun
from deploy.states import ProcessState, printable
from deploy.supervise import set_state, tell_peers
from deploy.waiting import follow_waits, hold_time
from protocol import control
from protocol import debugging as said
from protocol.errors import MalformedMessage, PeerGone, UserError
from protocol.roles import Role

_READ_BYTES = 64 * 1024
_NOTE_SECONDS = 1.0


class DebugSession:
    """One debugger of one process; `held` says whether the process stands still for it."""

    def __init__(self, run: ClusterRun, child: Child) -> None:
        self.held = False
        self._run = run
        self._child = child

    def begin(self) -> None:
        """Peers are patient from now on; before anything of the debugger reaches the process."""
        self._child.debugger = self
        self._child.detail = self._child.settled_detail
        tell_peers(self._run, self._child)
        self._run.log.warning("debugger attached", process=self._child.target)

    def take(self, message: said.FromProcess) -> None:
        """What the process says of itself."""
        if isinstance(message, said.Held):
            self._hold(message.where)
        elif isinstance(message, said.GoesOn):
            self._go_on()

    def end(self) -> None:
        """The debugger is gone; twice is no error."""
        child = self._child
        if child.debugger is not self:
            return
        self._go_on()
        child.debugger = None
        # What was asked while it was held is no sign of a hang.
        child.pings.clear()
        if not child.state.is_over:
            child.detail = child.settled_detail
            tell_peers(self._run, child)
        self._run.log.warning("debugger detached", process=child.target)
        self._run.nursery.start_soon(_note_end, self._run, child)

    def _hold(self, where: str) -> None:
        if self.held or self._child.debugger is not self:
            return
        self.held = True
        set_state(self._run, self._child, ProcessState.DEBUGGED, printable(f"held at {where}"))
        hold_time(self._run)
        follow_waits(self._run)

    def _go_on(self) -> None:
        if not self.held:
            return
        self.held = False
        if self._child.state is ProcessState.DEBUGGED:
            set_state(self._run, self._child, ProcessState.RUNNING, self._child.settled_detail)
        hold_time(self._run)


def debuggable_child(run: ClusterRun, child: Child) -> Child:
    """`child`, when a debugger may enter it now; raises UserError that says why not, and how it could."""
    target, plan = child.target, child.plan
    if not run.is_debuggable(plan):
        raise UserError(f"{target} was not started debuggable: {_how(run, child)}")
    if child.state.is_over:
        raise UserError(f"{target} is {child.state.value} ({child.detail})")
    if child.debugger is not None:
        raise UserError(f"{target} has a debugger already")
    if not child.state.answers:
        raise UserError(f"{target} is {child.state.value}: a debugger comes in by its service loop")
    return child


def _how(run: ClusterRun, child: Child) -> str:
    if child.plan.role is Role.GUEST:
        return (
            f"set `debuggable = true` in [vms.{child.plan.vm}], or start with `pefbox up --debuggable {child.target}`"
        )
    return f"start the cluster with `pefbox up --debug`, or with `--debuggable {child.target}`"


async def note(run: ClusterRun, child: Child, event: str, **facts: str) -> None:
    """Have the audit log say what is done to an ultravisor or guest; raises UserError when it cannot."""
    if child.plan.role not in (Role.ULTRAVISOR, Role.GUEST):
        return
    ultravisor = run.child(child.plan.host, Role.ULTRAVISOR)
    arguments = {"vm": child.plan.vm or "", "event": event, "facts": {"process": child.target, **facts}}
    try:
        if ultravisor is None:
            raise PeerGone(f"{child.plan.host}/ultravisor", "missing")
        await ultravisor.query("audit.note", arguments, _NOTE_SECONDS)
    except (PeerGone, QueryRefused) as error:
        raise UserError(f"the audit log of {child.plan.host} cannot note it: {error}") from None


async def _note_end(run: ClusterRun, child: Child) -> None:
    try:
        await note(run, child, "debugger-detached")
    except UserError as error:
        run.log.warning("not in the audit log", process=child.target, reason=str(error))


async def noted_session(run: ClusterRun, child: Child, how: str) -> DebugSession:
    """A session of `child`, which it was looked at for, that has begun once it is noted; raises UserError.

    The caller has `child.entering`.
    """
    await note(run, child, "debugger-attached", how=how)
    # The process may have ended meanwhile.
    debuggable_child(run, child)
    session = DebugSession(run, child)
    session.begin()
    return session


def open_stream(child: Child, mode: control.DebugMode) -> trio.SocketStream:
    """Send the process one end of a new stream; raises PeerGone."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        child.channel.send(control.Debug(mode), [theirs.fileno()])
    except PeerGone:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours))


async def read_messages(stream: trio.SocketStream, take: Callable[[said.FromProcess], Awaitable[None]]) -> None:
    """Give `take` what the process says, until it closes the stream or says what nobody understands."""
    frames = said.Frames()
    try:
        while data := await stream.receive_some(_READ_BYTES):
            for body in frames.feed(data):
                await take(said.decode_from_process(body))
    except (trio.BrokenResourceError, trio.ClosedResourceError, MalformedMessage):
        return


async def serve_prompt(run: ClusterRun, child: Child, operator: trio.SocketStream, greet: bytes) -> None:
    """Connect the operator to the prompt of `child` until one of them goes; `greet` is sent once it is entered.

    Raises UserError, before anything was sent, when no debugger can enter.
    """
    async with child.entering:
        debuggable_child(run, child)
        if child.dap_port is not None:
            raise UserError(f"{child.target} listens for editors already ({child.dap_port.place}): attach one of them")
        session = await noted_session(run, child, "prompt")
    try:
        stream = open_stream(child, control.DebugMode.PROMPT)
        async with stream:
            await operator.send_all(greet)
            await _relay(session, stream, operator)
    finally:
        session.end()


async def _relay(session: DebugSession, stream: trio.SocketStream, operator: trio.SocketStream) -> None:
    """Until the process has closed its end: it does so when the operator has gone, and runs then."""
    async with trio.open_nursery() as nursery:

        async def take(message: said.FromProcess) -> None:
            if isinstance(message, (said.Output, said.Prompt)):
                await _send(operator, said.frame(message))
            else:
                session.take(message)

        async def type_in() -> None:
            try:
                while data := await operator.receive_some(_READ_BYTES):
                    await stream.send_all(data)
            except trio.BrokenResourceError:
                pass
            with trio.CancelScope(shield=True):
                await _end_input(stream)

        nursery.start_soon(type_in)
        await read_messages(stream, take)
        nursery.cancel_scope.cancel()


async def _send(operator: trio.SocketStream, data: bytes) -> None:
    try:
        await operator.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def _end_input(stream: trio.SocketStream) -> None:
    try:
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
