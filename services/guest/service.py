"""The guest process: a processor in its own thread; trio in the main thread does control."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import trio

from protocol.causes import first_cause
from protocol.control import GDB_TAG, KILLED_BY_DEBUGGER
from protocol.errors import GuestFault, HostFault, UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gfn_of, gpa_of
from protocol.links import KVM_GUEST, LINK_KINDS, ULTRAVISOR_GUEST
from protocol.startup import BENCH_KERNEL, Keys, LinkEntry, LinkKey, VmEntry
from services.guest.address_space import AddressSpace
from services.guest.clock import GuestClock, make_clock
from services.guest.engine import Engine
from services.guest.engines import make_engine
from services.guest.in_processor import in_processor
from services.guest.link_end import LinkEnd
from services.guest.owner_target import OwnerTarget
from services.guest.processor import Processor
from services.guest.run_state import Hold
from services.guest.vm_memory import GuestVmMemory
from services.runtime.debugging.threads import PostedThread
from services.runtime.gdb.server import Debuggers
from services.runtime.process import Query, Runtime
from services.runtime.sockets import connect_socket
from shared.memfd import map_sealed

if TYPE_CHECKING:
    from services.guest.bench_engine import BenchEngine

_JOIN_SECONDS = 1.0
_QUERY_SECONDS = 1.0
_JOB_SECONDS = 60.0
NOT_DEBUGGABLE = "the VM is not debuggable: its cluster file must say `debuggable = true`"
T = TypeVar("T")


class Guest:
    """One VM's guest process."""

    def __init__(self, runtime: Runtime, keys: Keys) -> None:
        self._runtime = runtime
        self._vm: VmEntry | None = None
        self._memory: GuestVmMemory | None = None
        self._ends: list[LinkEnd] = []
        self._processor: Processor | None = None
        self._engine: Engine | None = None
        self._has_map = trio.Event()
        self._debuggers: Debuggers | None = None

    async def start(self) -> None:
        """Nothing host-wide."""

    async def add_vm(
        self, vm: VmEntry, links: list[LinkEntry], keys: dict[str, LinkKey], files: dict[str, int]
    ) -> None:
        """The VM of this process."""
        self._vm = vm
        private = socket.socket(fileno=files[f"secure:{vm.name}"])
        memory = GuestVmMemory(vm.lpid, files[f"ram:{vm.name}"], vm.memory_bytes, private, self._runtime.log)
        os.close(files[f"ram:{vm.name}"])
        clock = make_clock(vm.time)
        kvm = self._connect(next(link for link in links if link.kind == KVM_GUEST.name), keys, clock)
        ultravisor = self._connect(next(link for link in links if link.kind == ULTRAVISOR_GUEST.name), keys, clock)
        processor: list[Processor] = []
        space = AddressSpace(
            memory.normal, memory.dirty.buffer, lambda gfn, access: processor[0].resolve_fault(gfn, access)
        )
        memory.space = space
        engine = make_engine(vm, space, clock, self._runtime.log)
        processor.append(Processor(engine, memory, kvm, ultravisor, clock, self._runtime.log, vm.guest.kernel))
        processor[0].count_causes_from(first_cause(vm.lpid, vm.incarnation))
        self._memory, self._processor, self._engine = memory, processor[0], engine
        if vm.debuggable:
            self._debuggers = Debuggers(self._owner_target, self._runtime.nursery, self._runtime.log)
        self._let_debuggers_in(processor[0])
        await self._runtime.give("guest-dirty-map", vm.name, memory.dirty.fd)
        await self._runtime.give("secure-dirty-map", vm.name, memory.secure_dirty.fd)
        self._runtime.nursery.start_soon(self._run)

    def _let_debuggers_in(self, processor: Processor) -> None:
        """To the processor: the service loop of a guest does little."""
        self._runtime.more_ends += self._ends
        if self._runtime.debugger is not None:
            self._runtime.debugger.thread = PostedThread(processor.post)
            self._runtime.debugger.on_held = processor.debugger_holds

    def _connect(self, entry: LinkEntry, keys: dict[str, LinkKey], clock: GuestClock) -> LinkEnd:
        socket_ = connect_socket(self._runtime.context, entry, keys[entry.id])
        end = LinkEnd(socket_, LINK_KINDS[entry.kind], entry.id, entry.peer)
        self._ends.append(end)
        self._runtime.tracer.add_end(end, entry, clock.now_ns)
        return end

    async def _run(self) -> None:
        """The processor starts to serve once it has kvm's map."""
        await self._has_map.wait()
        assert self._processor is not None
        self._processor.start_thread()

    async def replace_links(self, links: list[LinkEntry], keys: dict[str, LinkKey]) -> None:
        """All links of this role end with the VM or with the process."""

    async def remove_vm(self, name: str) -> None:
        """A guest process ends with its VM."""

    def _owner_target(self) -> OwnerTarget:
        assert self._processor is not None
        return OwnerTarget(self._processor.debugger, self._processor.post, self._kill)

    async def _kill(self) -> None:
        """The guest's owner ends the VM, which the launcher does."""
        assert self._vm is not None
        await self._runtime.notice("vm-off", self._vm.name, KILLED_BY_DEBUGGER)

    async def gift(self, tag: str, vm: str, fd: int) -> None:
        """kvm's map of the VM while it is a normal one, marks of what devices write; a debugger's connection."""
        if tag == GDB_TAG and self._debuggers is not None:
            self._debuggers.take(fd)
            return
        if tag == "device-writes" and self._vm is not None and self._processor is not None:
            self._watch_writes(memoryview(map_sealed(fd, self._vm.memory_bytes >> PAGE_SHIFT, writable=True)))
            return
        memory, processor = self._memory, self._processor
        if tag != "normal-map" or memory is None or processor is None:
            os.close(fd)
            self._runtime.log.warning("unexpected descriptor", tag=tag, vm=vm)
            return
        if self._has_map.is_set():
            # Its thread drops the map at ESM, so it is the one to take it again.
            processor.post(lambda: memory.take_normal_map_again(fd))
            return
        memory.take_normal_map(fd)
        self._has_map.set()

    def _watch_writes(self, marks: memoryview) -> None:
        engine, processor = self._engine, self._processor
        assert engine is not None
        assert processor is not None
        processor.post(lambda: engine.watch_writes(marks))

    def peer_state(self, peer: str, state: str) -> None:
        """kvm or ultravisor died, stopped, came back."""
        for end in self._ends:
            if end.peer == peer and self._processor is not None:
                self._processor.post(self._note_peer(end, state))

    def _note_peer(self, end: LinkEnd, state: str) -> Callable[[], None]:
        def note() -> None:
            assert self._processor is not None
            self._processor.peer_is(end, state)

        return note

    def hold_time(self, on: bool) -> None:
        """As control.HoldTime."""
        processor = self._processor
        if processor is not None:
            processor.post(lambda: processor.hold(Hold.DEBUGGER) if on else processor.let_go(Hold.DEBUGGER))

    async def stop(self) -> None:
        """End the processor's thread."""
        if self._debuggers is not None:
            self._debuggers.close()
        if self._processor is not None and self._has_map.is_set():
            self._processor.quit()
            await trio.to_thread.run_sync(self._processor.join, _JOIN_SECONDS)

    # -- questions of the operator ----------------------------------------------------------------------------

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {
            "statistics": self._statistics,
            "page.guest": self._page_guest,
            "vm.status": self._vm_status,
            "bench": self._bench,
            "gdb.order": self._gdb_order,
        }

    async def _statistics(self, _arguments: dict[str, Any]) -> dict[str, dict[str, int | str]]:
        """As that of a process whose links are under trio. Orders are served at once, and none of its calls queues."""
        processor = self._processor
        return {
            end.id: {
                "peer": end.peer,
                "calls": end.n_calls,
                "open_calls": 0 if processor is None else processor.open_calls(end),
                "serving": 0,
                "queued": 0,
                "refused": 0 if processor is None else processor.refused,
            }
            for end in self._ends
        }

    async def _page_guest(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The page as the guest sees it; only of a VM started debuggable (S1)."""
        if self._vm is None or not self._vm.debuggable:
            raise UserError(NOT_DEBUGGABLE)
        gpa = gpa_of(gfn_of(int(arguments["gpa"])))
        data = await self._in_processor(lambda: self._peek(gpa))
        return {"gpa": gpa, "mapped": data is not None, "bytes": data}

    def _peek(self, gpa: int) -> bytes | None:
        assert self._memory is not None
        assert self._memory.space is not None
        try:
            return self._memory.space.peek(gpa, PAGE_BYTES)
        except GuestFault:
            return None

    async def _gdb_order(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """The byte order that the processor has now, which GDB has to be told where no program's symbols do."""
        if self._debuggers is None or self._processor is None:
            raise UserError(NOT_DEBUGGABLE)
        values = await self._in_processor(self._processor.debugger.values)
        return {"order": values.order}

    async def _vm_status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        processor = self._processor
        if processor is None:
            return {"state": "starting", "secure": False}
        return {
            "state": processor.state.value,
            "secure": processor.secure,
            "crash": processor.crash_reason,
            "instructions": None if self._engine is None else self._engine.n_instructions,
            "trail": None if self._engine is None else self._engine.trail,
        }

    async def _bench(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """Have a debuggable VM's bench kernel do a job; its outcome."""
        engine, vm = self._engine, self._vm
        if vm is None or not vm.debuggable or vm.guest.kernel != BENCH_KERNEL:
            raise UserError('jobs are for a VM with guest.kernel = "bench" and `debuggable = true`')
        bench = cast("BenchEngine", engine)
        done = trio.Event()
        outcome: list[Any] = []
        token = trio.lowlevel.current_trio_token()

        def take_outcome(result: object) -> None:
            outcome.append(result)
            token.run_sync_soon(done.set)

        job = bench.job(str(arguments["job"]), arguments, take_outcome)
        await self._in_processor(lambda: bench.take(job))
        with trio.move_on_after(_JOB_SECONDS):
            await done.wait()
        if not outcome:
            raise HostFault("the job did not end")
        return outcome[0]

    async def _in_processor(self, work: Callable[[], T]) -> T:
        if self._processor is None:
            raise HostFault("the processor has not started")
        return await in_processor(self._processor.post, work, _QUERY_SECONDS)
