"""The life of a service process: start, confine, take keys, open links, serve, stop.

The order matters (protocol.control): everything is imported before this runs; open files come with `Start`; then the
process is confined; only then does it read its keys.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import trio
import zmq
from setproctitle import setproctitle

from protocol import control
from protocol.errors import HostFault, PefboxError, UserError
from protocol.links import LINK_KINDS
from protocol.roles import Role
from protocol.startup import Keys, LinkEntry, LinkKey, ProcessConfig, VmEntry
from services.runtime.channel import ZmqChannel
from services.runtime.confine import confine, die_with_parent
from services.runtime.control import ControlEnd, LauncherGone
from services.runtime.link import Link
from services.runtime.log import Log, open_service_log
from services.runtime.sockets import bind_socket, connect_socket
from services.runtime.tracer import FLUSH_SECONDS, Tracer
from services.runtime.watch import Watch, WatchedEnd
from services.runtime.zap import ZapServer
from shared.process_end import leave
from shared.quick_imports import quick_imports

if TYPE_CHECKING:
    from services.runtime.breakpoints import Breakpoints
    from services.runtime.debugging.debugger import Debugger

Query = Callable[[dict[str, Any]], Awaitable[Any]]


class Service(Protocol):
    """What a role implements. Every method runs in the trio thread."""

    async def start(self) -> None:
        """Host-wide links are open; VMs of the configuration follow by `add_vm`."""

    async def add_vm(
        self, vm: VmEntry, links: list[LinkEntry], keys: dict[str, LinkKey], files: dict[str, int]
    ) -> None:
        """A VM begins. `files` are descriptors by name (`ram:VM`, `disk:NAME`, ...), owned by the service."""

    async def replace_links(self, links: list[LinkEntry], keys: dict[str, LinkKey]) -> None:
        """A peer is in its next incarnation: take these links in the place of those to it."""

    async def remove_vm(self, name: str) -> None:
        """A VM ends: release all that it held."""

    async def gift(self, tag: str, vm: str, fd: int) -> None:
        """A descriptor that another process made for this one; owned by the service."""

    def peer_state(self, peer: str, state: str) -> None:
        """What became of a linked process."""

    def hold_time(self, on: bool) -> None:
        """Of a guest: time stands still, or goes on (control.HoldTime)."""

    def queries(self) -> dict[str, Query]:
        """Questions of the operator by name."""

    async def stop(self) -> None:
        """End in good order; bounded."""


@dataclass(frozen=True, slots=True)
class _Serving:
    scope: trio.CancelScope
    ended: trio.Event


class Runtime:
    """What a service gets from its shell."""

    def __init__(self, control_end: ControlEnd, config: ProcessConfig, files: dict[str, int], log: Log) -> None:
        self.config = config
        self.role = Role(config.role)
        self.log = log
        self.files = files
        self.protections: dict[str, str] = {}
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.links: dict[str, Link] = {}
        self.tracer = Tracer(files["trace"], config)
        self.more_ends: list[WatchedEnd] = []
        """Link ends that are served outside this class."""
        self.watch = Watch(lambda: [*self.links.values(), *self.more_ends])
        self.vm_names = {vm.lpid: vm.name for vm in config.vms}
        """The VMs of this process by lpid."""
        self.breakpoints: Breakpoints | None = None
        self.debugger: Debugger | None = None
        """Only in a process that was started debuggable."""
        self._control = control_end
        self._zap: ZapServer | None = None
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._serving: dict[str, _Serving] = {}

    @property
    def nursery(self) -> trio.Nursery:
        """Tasks that live as long as the process."""
        assert self._nursery is not None
        return self._nursery

    async def open(self, nursery: trio.Nursery) -> None:
        """Begin to authenticate and record; before any link."""
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._zap = ZapServer(self.context)
        await nursery.start(self._zap.run)
        self.tracer.switch(on=self.config.record)
        nursery.start_soon(self._flush_trace)

    async def open_link(self, entry: LinkEntry, key: LinkKey, register: Callable[[Link], None]) -> Link:
        """Open, register handlers on, and serve one link; raises HostFault when it cannot be bound."""
        link = self.make_link(entry, key)
        register(link)
        await self.serve_link(link)
        return link

    def make_link(self, entry: LinkEntry, key: LinkKey) -> Link:
        """Open one link; handlers are registered before `serve_link`. Raises HostFault when it cannot be bound."""
        kind = LINK_KINDS[entry.kind]
        if entry.binds:
            assert self._zap is not None
            socket = bind_socket(self.context, self._zap, entry, key)
        else:
            socket = connect_socket(self.context, entry, key)
        link = Link(ZmqChannel(socket), kind, self.role, entry.id, entry.peer, self.log)
        self.tracer.add_end(link, entry)
        link.watch = self.watch.watcher
        return link

    async def serve_link(self, link: Link) -> None:
        """Read and serve until `close_link`."""
        self.links[link.id] = link
        await self.nursery.start(self._run_link, link)

    async def close_link(self, link: Link) -> None:
        """Stop serving a link; returns when its socket is closed and everything open on it has ended."""
        self.tracer.forget_end(link.id, link)
        serving = self._serving.pop(link.id, None)
        if self.links.get(link.id) is link:
            del self.links[link.id]
        if self._zap is not None:
            self._zap.forget(link.id)
        if serving is not None:
            serving.scope.cancel()
            await serving.ended.wait()

    async def give(self, tag: str, vm: str, fd: int) -> None:
        """Hand a descriptor to the other processes of the VM through the launcher; `fd` stays the caller's."""
        await self._control.send(control.Give(tag, vm), [fd])

    async def notice(self, what: str, vm: str | None, detail: str = "") -> None:
        """Tell the launcher something that it acts on or shows."""
        await self._control.send(control.Notice(what, vm, detail))

    def report_break(self, hit: control.BreakHit) -> None:
        """Tell the launcher that a break has stopped a message; from any thread."""
        assert self._token is not None

        def send() -> None:
            self.nursery.start_soon(self._control.send, hit)

        self._token.run_sync_soon(send)

    async def _run_link(self, link: Link, task_status: trio.TaskStatus[None]) -> None:
        serving = self._serving[link.id] = _Serving(trio.CancelScope(), trio.Event())
        try:
            with serving.scope:
                await link.run(task_status)
        finally:
            serving.ended.set()

    async def _flush_trace(self) -> None:
        """In a thread, so that no message waits for the disk."""
        while True:
            await trio.sleep(FLUSH_SECONDS)
            if self.tracer.has_work:
                await self.flush_trace()

    async def flush_trace(self) -> None:
        """What was noted until now is in the file, as far as there is room."""
        await trio.to_thread.run_sync(self.tracer.flush)
        if self.tracer.is_full:
            self.tracer.switch(on=False)


def _nothing(_config: ProcessConfig) -> None:
    """No preparation."""


@dataclass(frozen=True)
class ServiceMain:
    """What is particular about a role's process.

    `prepare` imports or opens what the start configuration asks for, before the process is confined; `landlock_dirs`
    says which directories stay reachable then, None that Landlock is not needed.
    """

    role: Role
    make: Callable[[Runtime, Keys], Service]
    landlock_dirs: Callable[[ProcessConfig], Sequence[str] | None]
    prepare: Callable[[ProcessConfig], None] = _nothing


def run_service(main: ServiceMain) -> NoReturn:
    """The main function of a service process that was started by its module's name."""
    parser = argparse.ArgumentParser(prog=f"services.{main.role.value}", description="A process of a pefbox cluster.")
    parser.add_argument("--control-fd", type=int, required=True, help="inherited end of the control socketpair")
    arguments = parser.parse_args()
    serve(main, arguments.control_fd, os.getppid())


def serve(main: ServiceMain, control_fd: int, launcher_pid: int) -> NoReturn:
    """Be this service; ends the process when the launcher says stop or is gone."""
    die_with_parent(launcher_pid)
    trio.run(_Shell(main, control_fd).run)
    leave()


class _Shell:
    """Start sequence and control loop of one process."""

    def __init__(self, main: ServiceMain, control_fd: int) -> None:
        self._main = main
        self._control_fd = control_fd

    async def run(self) -> None:
        end = ControlEnd(self._control_fd)
        try:
            await self._start(end)
        except LauncherGone:
            return
        except (PefboxError, ExceptionGroup) as error:
            reason = _reason(error)
            if reason is None:
                raise
            await end.send(control.Failed(reason))
            raise SystemExit(1) from None

    async def _start(self, end: ControlEnd) -> None:
        await end.send(control.Hello(os.getpid()))
        start, descriptors = await end.receive()
        if not isinstance(start, control.Start) or start.config.role != self._main.role.value:
            raise HostFault("the launcher did not begin with the start configuration of this role")
        config = start.config
        setproctitle(f"pefbox {config.cluster} {config.target}")
        files = dict(zip(config.descriptors, descriptors, strict=True))
        log = open_service_log(files["log"], config.target)
        with quick_imports():
            self._main.prepare(config)
        if config.debuggable:
            # They take as long to import as all else here, and hardly a process needs them.
            from services.runtime.breakpoints import Breakpoints
            from services.runtime.debugging.debugger import Debugger, prepare

            prepare()
        protections = confine(dumpable=config.debuggable, landlock_dirs=self._main.landlock_dirs(config))
        await end.send(control.Confined(protections))
        keys, _ = await end.receive()
        if not isinstance(keys, control.TakeKeys):
            raise HostFault("the launcher did not send keys after confinement")
        log.info("started", pid=os.getpid(), protections=protections)
        runtime = Runtime(end, config, files, log)
        runtime.protections = protections
        if config.debuggable:
            runtime.debugger = Debugger(config.target, runtime.watch, log)
            runtime.breakpoints = Breakpoints(config.target, runtime.watch, runtime.vm_names, log, runtime.report_break)
        await self._serve(end, runtime, keys.keys)

    async def _serve(self, end: ControlEnd, runtime: Runtime, keys: Keys) -> None:
        config = runtime.config
        async with trio.open_nursery() as nursery:
            await runtime.open(nursery)
            service = self._main.make(runtime, keys)
            await service.start()
            loop = _ControlLoop(end, runtime, service)
            link_keys = {key.link: key for key in keys.links}
            for vm in config.vms:
                links = [link for link in config.links if link.vm == vm.name]
                runtime.tracer.add_vm(vm)
                await service.add_vm(vm, links, link_keys, runtime.files)
            nursery.start_soon(loop.run, nursery)
            await end.send(control.Ready())
        runtime.tracer.flush()


def _reason(error: PefboxError | ExceptionGroup[Exception]) -> str | None:
    """The line for the operator; None when there is an error in `error` that nobody raised on purpose."""
    if isinstance(error, PefboxError):
        return str(error)
    reasons = [_reason(it) if isinstance(it, (PefboxError, ExceptionGroup)) else None for it in error.exceptions]
    return None if None in reasons else reasons[0]


class _ControlLoop:
    """Serves the launcher's packets in their order, so that the answer to a ping says that all before it is done.

    Whatever takes long is bounded: while it goes on no ping is answered.
    """

    def __init__(self, end: ControlEnd, runtime: Runtime, service: Service) -> None:
        self._end = end
        self._runtime = runtime
        self._service = service
        self._removals: dict[str, trio.Event] = {}
        self._record_number = 0
        self._queries: dict[str, Query] = {
            "statistics": self._statistics,
            "record": self._record,
            "recording": self._recording,
            **service.queries(),
        }
        if runtime.breakpoints is not None:
            self._queries |= {
                "break.set": runtime.breakpoints.set,
                "break.delete": runtime.breakpoints.delete,
                "break.release": runtime.breakpoints.release,
                "break.counts": runtime.breakpoints.counts,
            }

    async def run(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                packet, descriptors = await self._end.receive()
                if isinstance(packet, control.Stop):
                    break
                await self._take(packet, descriptors, nursery)
        except LauncherGone:
            self._runtime.log.warning("the launcher is gone")
        with trio.move_on_after(2):
            await self._service.stop()
        nursery.cancel_scope.cancel()

    async def _take(self, packet: control.ToProcess, descriptors: list[int], nursery: trio.Nursery) -> None:
        match packet:
            case control.Ping(sequence):
                await self._end.send(control.Pong(sequence))
            case control.PeerState(peer, state):
                self._peer_state(peer, state)
            case control.Query():
                nursery.start_soon(self._answer, packet)
            case control.Gift(tag, vm, giver):
                await self._take_gift(tag, vm, giver, descriptors[0])
            case control.AddVm(vm, links, keys, names):
                files = dict(zip(names, descriptors, strict=True))
                await self._add_vm(vm, links, keys, files)
            case control.ReplaceLinks(links, keys):
                await self._service.replace_links(links, {key.link: key for key in keys.links})
            case control.Debug(mode):
                self._debug(mode, descriptors[0])
            case control.HoldTime(on):
                self._service.hold_time(on)
            case control.RemoveVm(order, vm):
                nursery.start_soon(self._remove_vm, order, vm)
            case _:
                self._runtime.log.error("packet out of turn", packet=type(packet).__name__)

    async def _add_vm(self, vm: VmEntry, links: list[LinkEntry], keys: Keys, files: dict[str, int]) -> None:
        """A VM that cannot begin here fails; the others go on."""
        self._runtime.tracer.add_vm(vm)
        self._runtime.vm_names[vm.lpid] = vm.name
        try:
            await self._service.add_vm(vm, links, {key.link: key for key in keys.links}, files)
        except Exception as error:
            self._runtime.log.error("VM not added", vm=vm.name, exc_info=error)
            await self._runtime.notice("vm-failed", vm.name, f"{self._runtime.config.target}: {error}")

    def _debug(self, mode: control.DebugMode, fd: int) -> None:
        if self._runtime.debugger is None:
            os.close(fd)
            self._runtime.log.error("debugger refused", reason="not started debuggable")
            return
        self._runtime.debugger.enter(mode, fd)

    async def _take_gift(self, tag: str, vm: str, giver: str, fd: int) -> None:
        """Its giver may be hostile: what cannot be used is refused, and the process goes on."""
        try:
            await self._service.gift(tag, vm, fd)
        except HostFault as fault:
            self._runtime.log.error("gift refused", tag=tag, vm=vm, giver=giver, reason=str(fault))

    async def _remove_vm(self, order: int, vm: str) -> None:
        """Waits for other processes, so it is a task; a repeated order is answered when the first is done."""
        if vm in self._removals:
            await self._removals[vm].wait()
            await self._end.send(control.Answer(order))
            return
        removed = self._removals[vm] = trio.Event()
        try:
            await self._service.remove_vm(vm)
            for lpid in [lpid for lpid, name in self._runtime.vm_names.items() if name == vm]:
                del self._runtime.vm_names[lpid]
        finally:
            del self._removals[vm]
            removed.set()
        await self._end.send(control.Answer(order))

    def _peer_state(self, peer: str, state: str) -> None:
        for link in list(self._runtime.links.values()):
            if link.peer == peer:
                link.peer_is(state)
        self._service.peer_state(peer, state)

    async def _answer(self, query: control.Query) -> None:
        handler = self._queries.get(query.what)
        if handler is None:
            await self._end.send(control.Answer(query.id, error=f"{self._runtime.config.target} knows no {query.what}"))
            return
        try:
            result = await handler(query.arguments)
        except (PefboxError, UserError, KeyError, ValueError, TypeError) as error:
            await self._end.send(control.Answer(query.id, error=str(error) or type(error).__name__))
            return
        except OSError as error:
            self._runtime.log.error("query failed", what=query.what, trace=traceback.format_exc())
            await self._end.send(control.Answer(query.id, error=f"{query.what}: {error.strerror}"))
            return
        await self._end.send(control.Answer(query.id, result))

    async def _statistics(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        return {link.id: link.statistics() for link in self._runtime.links.values()}

    async def _record(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Begin or end to record; answered as `recording`. Of orders with a `number` only the latest counts."""
        number = int(arguments.get("number", self._record_number))
        if number < self._record_number:
            return await self._recording({})
        self._record_number = number
        self._runtime.tracer.switch(on=bool(arguments["on"]))
        return await self._recording({})

    async def _recording(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Whether it records; what was noted until now is in the file then."""
        tracer = self._runtime.tracer
        await self._runtime.flush_trace()
        return {"recording": tracer.on, "full": tracer.is_full}
