"""One virtual machine in KVM: its parts, its run state, and the two ways a hypercall of its guest comes in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.declare import Call, Caller
from protocol.errors import CallTimeout, GuestFault, PefboxError
from protocol.hcalls import HCALLS
from protocol.messages import TceWindowBody
from protocol.startup import VmEntry
from protocol.vm_state import VmState
from protocol.wire import Envelope
from services.kvm.debug import pass_on_orders, pass_on_stops
from services.kvm.dirty import DirtyPages
from services.kvm.discard import Discards
from services.kvm.guest_call import GuestCall
from services.kvm.hcalls import Hcalls
from services.kvm.interrupt_trace import InterruptTrace
from services.kvm.memory import MemSlot, VmMemory
from services.kvm.migration import Migration
from services.kvm.tce_tables import TceTables
from services.kvm.terminal import Terminal
from services.kvm.ultravisor_port import Answer, UltravisorPort
from services.kvm.user_space import UserSpace
from services.kvm.uvmem import SecurePages, Switch
from services.kvm.vcpu import RunState, Vcpus
from services.kvm.xics import Xics
from services.runtime.cause import CAUSE
from services.runtime.link import DEFERRED, Link
from services.runtime.log import Log
from services.runtime.tracer import UNTRACED, Tracer
from shared.guest_ram import GuestRam
from shared.interrupt_sources import VTY_SOURCE
from shared.memfd import SealedMemory
from shared.stream_buffer import StreamBuffer
from shared.typed_text import Offer

_GUEST_SECONDS = 2.0
_TCE_BYTES = 8
_START_RETRY_SECONDS = 0.005
TableMade = Callable[[int, int], None]
"""Told liobn and descriptor of a new TCE table, for qemu."""
MapNeeded = Callable[[], None]
"""Told that the guest, which dropped the normal VM's map while it was secure, needs it again."""


class Vm:
    """A VM. `guest` and `qemu` are its links; both exist before the first message is served.

    `stream` is closed with the VM. Without one the VM cannot be saved or loaded.
    """

    def __init__(
        self,
        entry: VmEntry,
        memory: VmMemory,
        guest: Link,
        qemu: Link,
        ultravisor: UltravisorPort,
        table_made: TableMade,
        map_needed: MapNeeded,
        log: Log,
        stream: StreamBuffer | None = None,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self.entry = entry
        self.memory = memory
        self.state = VmState.STARTING
        self.since = time.time()
        self.failure: str | None = None
        self.xics = Xics()
        self.terminal = Terminal()
        self.vcpus = Vcpus()
        self.n_resets = 0
        self._at_work = 0
        self._at_rest = trio.Event()
        self._guest = guest
        self._qemu = qemu
        self._table_made = table_made
        self._map_needed = map_needed
        self._log = log.bind(vm=entry.name)
        self._stream = stream
        self._tables: dict[int, SealedMemory] = {}
        self.tces = TceTables(self._in_ram, self._allocate_table)
        self.secure = SecurePages(
            entry.lpid, memory, ultravisor, guest, allowed=entry.secure_allowed, started=self._is_started
        )
        self.user_space = UserSpace(
            qemu, self._log, waits_for_devices=entry.time == "instructions", tells_secure=entry.dma.tell_secure
        )
        self.dirty = DirtyPages(memory.n_pages, guest, qemu, lambda: self.secure.switch is not Switch.NONE)
        self.discards = Discards(memory, self.secure, guest, self.dirty.own, self._log)
        self.ram = GuestRam(memory.ram, memory.host_view, self._want, self.dirty.own)
        self.interrupts = InterruptTrace(entry.lpid, tracer)
        self.hcalls = Hcalls(
            self.ram, self.xics, self.tces, self.terminal, self.vcpus, self.user_space, self.secure, self.interrupts
        )
        self.migration = Migration(self, ultravisor, stream, self._log)

    # -- hypercalls -------------------------------------------------------------------------------------------

    def register_guest(self, link: Link) -> None:
        """Serve the hypercalls and faults of the VM while it is a normal one."""
        link.on(m.MAP_FAULT, self._map_fault)
        link.on(m.GUEST_CRASHED, self._guest_crashed)
        pass_on_stops(link, self._qemu)
        for call in HCALLS:
            if Caller.VM not in call.callers:
                continue
            if call.number in self.hcalls.at_once:
                link.on(call, self._direct(call))
            elif call.number in self.hcalls.waiting:
                link.on_waiting(call, self._direct_waiting(call))

    def _direct(self, call: Call) -> Callable[[Envelope, list[int]], list[int] | None]:
        handler = self.hcalls.at_once[call.number]
        n_registers = 1 + call.n_args

        def serve(envelope: Envelope, registers: list[int]) -> list[int] | None:
            if len(registers) < n_registers:
                return [HCode.H_PARAMETER]

            def answer(result: list[int]) -> None:
                self._guest.reply(envelope, result)

            result = handler(GuestCall(registers[0], registers[1:n_registers], envelope.cause, answer))
            self.after_call(envelope.cause)
            return result

        return serve

    def _direct_waiting(self, call: Call) -> Callable[[Envelope, list[int]], Any]:
        handler = self.hcalls.waiting[call.number]
        n_registers = 1 + call.n_args

        async def serve(envelope: Envelope, registers: list[int]) -> list[int]:
            if len(registers) < n_registers:
                return [HCode.H_PARAMETER]
            args = registers[1:n_registers]
            CAUSE.set(envelope.cause)
            result = await handler(GuestCall(registers[0], args, envelope.cause, _answered_elsewhere))
            self.after_call(envelope.cause)
            return result

        return serve

    def reflected_at_once(self, call: Call, vcpu: int, args: list[int], cause: int, answer: Answer) -> None:
        """A hypercall that the ultravisor passed on, and that needs no waiting."""
        self.migration.runs()
        result = self.hcalls.at_once[call.number](GuestCall(vcpu, args, cause, answer))
        if result is not DEFERRED:
            answer(result)
        self.after_call(cause)

    async def reflected_waiting(self, call: Call, vcpu: int, args: list[int], cause: int) -> list[int]:
        """As `reflected_at_once`, for a handler that waits; its result."""
        self.migration.runs()
        CAUSE.set(cause)
        result = await self.hcalls.waiting[call.number](GuestCall(vcpu, args, cause, _answered_elsewhere))
        self.after_call(cause)
        return result

    def after_call(self, cause: int = 0) -> None:
        """Tell what a call or event changed: interrupt lines, ended waits."""
        for server, level in self.xics.take_line_changes():
            self._tell_line(server, level, cause)
        self.hcalls.answer_ended()

    def tell_lines(self) -> None:
        """Tell every interrupt line as it is, since a processor from elsewhere believes what it was told there."""
        self.xics.take_line_changes()
        for server in range(len(self.vcpus)):
            self._tell_line(server, self.xics.line(server))

    def _tell_line(self, server: int, level: bool, cause: int = 0) -> None:
        self.vcpus.set_line(server, level)
        self._guest.send_event(m.VCPU_LINE, m.LineBody(server, level), cause)

    # -- faults of a normal VM --------------------------------------------------------------------------------

    def _map_fault(self, _envelope: Envelope, body: m.MapFaultBody) -> m.Status:
        if self.secure.switch is not Switch.NONE:
            return m.Status(HCode.H_BUSY)
        if not self.memory.in_slots(body.gfn):
            return m.Status(HCode.H_PARAMETER)
        self.memory.bring_back([body.gfn])
        self.memory.map_around(body.gfn)
        return m.Status(HCode.H_SUCCESS if self.memory.map[body.gfn] else HCode.H_BUSY)

    def _guest_crashed(self, _envelope: Envelope, body: m.CrashBody) -> None:
        self.fail(body.reason)

    async def _want(self, gfns: list[int]) -> None:
        if await self._make_present(gfns, CAUSE.get()) != HCode.H_SUCCESS:
            raise GuestFault(f"gfn {gfns[0]:#x} cannot be made present")

    async def _make_present(self, gfns: list[int], cause: int) -> HCode:
        self.memory.bring_back(gfns)
        return await self.secure.make_present(gfns, cause)

    # -- what qemu orders -------------------------------------------------------------------------------------

    def register_qemu(self, link: Link) -> None:
        """Serve the VM's qemu."""
        link.on_waiting(m.PAGES_WANTED, self._pages_wanted)
        link.on_waiting(m.PAGES_DISCARD, self._pages_discard)
        link.on(m.IRQ_SOURCE, self._irq_source)
        link.on(m.IRQ_SET, self._irq_set)
        link.on(m.MEMSLOT_SET, self._memslot_set)
        link.on(m.TCE_WINDOW_CREATE, lambda _envelope, body: m.Status(self._create_table(body)))
        link.on(m.TCE_WINDOW_REMOVE, lambda _envelope, body: m.Status(self._remove_table(body.liobn)))
        link.on(m.TERMINAL_OUTPUT, self._terminal_output)
        link.on(m.DOORBELL_SET, lambda _envelope, body: self.user_space.set_doorbell(body))
        link.on_waiting(m.VM_START, self._vm_start)
        link.on_waiting(m.VM_STOP, self._vm_stop)
        link.on_waiting(m.VM_CONTINUE, self._vm_continue)
        link.on_waiting(m.VM_RESET, self._vm_reset)
        link.on_waiting(m.VM_POWEROFF, self._vm_poweroff)
        self.migration.register(link)
        pass_on_orders(link, self.ask_guest)

    async def _pages_wanted(self, envelope: Envelope, body: m.PagesBody) -> m.Status:
        if any(gfn >= self.memory.n_pages for gfn in body.gfns):
            return m.Status(HCode.H_PARAMETER)
        return m.Status(await self._make_present(body.gfns, envelope.cause))

    async def _pages_discard(self, envelope: Envelope, body: m.PagesBody) -> m.Status:
        with self.at_work():
            return m.Status(await self.discards.discard(body.gfns, envelope.cause))

    def _irq_source(self, _envelope: Envelope, body: m.IrqSourceBody) -> m.Status:
        return m.Status(self.xics.add_source(body.source, body.level_triggered))

    def _irq_set(self, envelope: Envelope, body: m.IrqBody) -> None:
        self.raise_irq(body.source, body.level, envelope.cause)

    def _terminal_output(self, _envelope: Envelope, body: m.TerminalBody) -> None:
        self.terminal.put(body.data)

    def raise_irq(self, source: int, level: bool, cause: int = 0) -> None:
        """A source's level changed, or an edge came."""
        if level:
            self.interrupts.raised(source, cause)
        self.xics.set_irq(source, level)
        self.after_call(cause)

    def type_in(self, offer: Offer) -> int:
        """Text typed at the terminal; how many bytes were taken."""
        taken = self.terminal.type_in(offer) if self.migration.takes_typing else 0
        if taken:
            self.raise_irq(VTY_SOURCE, level=True)
        return taken

    def _memslot_set(self, _envelope: Envelope, body: m.MemslotBody) -> m.Status:
        if self.secure.switch is not Switch.NONE:
            return m.Status(HCode.H_STATE)
        fits = self.memory.set_slot(MemSlot(body.slot, body.gpa, body.size_bytes))
        return m.Status(HCode.H_SUCCESS if fits else HCode.H_PARAMETER)

    # -- run state --------------------------------------------------------------------------------------------

    def _is_started(self) -> bool:
        return self.state in (VmState.RUNNING, VmState.PAUSED)

    def _may_start(self) -> bool:
        is_off = self.state in (VmState.STARTING, VmState.OFF) and self.secure.switch is Switch.NONE
        return is_off and self.migration.is_here

    async def _vm_start(self, envelope: Envelope, body: m.StartBody) -> m.Status:
        if body.vcpu >= len(self.vcpus):
            return m.Status(HCode.H_PARAMETER)
        deadline, n_resets = trio.current_time() + _GUEST_SECONDS, self.n_resets
        while self._may_start() and self.n_resets == n_resets:
            self.vcpus.start(body.vcpu)
            status = await self._order_guest(m.VCPU_START, body, VmState.RUNNING, envelope.cause)
            if status.code != HCode.H_BUSY or trio.current_time() > deadline:
                return status
            # The map goes another way than the order, over the launcher.
            await trio.sleep(_START_RETRY_SECONDS)
        return m.Status(HCode.H_STATE)

    async def _vm_stop(self, envelope: Envelope, _body: m.Empty) -> m.Status:
        if self.state is VmState.PAUSED:
            # A repeated order: the first one was served although its answer was lost.
            return m.Status(HCode.H_SUCCESS)
        if self.state is not VmState.RUNNING:
            return m.Status(HCode.H_STATE)
        self.vcpus.stop(0)
        return await self._order_guest(m.VCPU_STOP, m.RunBody(0), VmState.PAUSED, envelope.cause)

    async def _vm_continue(self, envelope: Envelope, _body: m.Empty) -> m.Status:
        # After an order to stop or to freeze that the guest did not answer in time, it may have stopped all the same.
        may_be_held = self.vcpus.state(0) is RunState.STOPPED
        if self.state is VmState.RUNNING and not may_be_held:
            return m.Status(HCode.H_SUCCESS)
        if self.state not in (VmState.RUNNING, VmState.PAUSED):
            return m.Status(HCode.H_STATE)
        self.migration.forget_processor()
        self.vcpus.go(0)
        return await self._order_guest(m.VCPU_CONTINUE, m.RunBody(0), VmState.RUNNING, envelope.cause)

    async def _vm_poweroff(self, envelope: Envelope, body: m.Empty) -> m.Status:
        status = await self._vm_reset(envelope, body)
        self.enter(VmState.OFF)
        return status

    async def _vm_reset(self, envelope: Envelope, _body: m.Empty) -> m.Status:
        """Everything back to power-on; wins over every open call. Memory of a normal VM keeps its content."""
        self.n_resets += 1
        self.enter(VmState.STARTING)
        self.failure = None
        was_switched = self.secure.switch is not Switch.NONE
        done = await self.secure.off(envelope.cause)
        if was_switched:
            self._map_needed()
        await self.stop_guest(envelope.cause)
        self.to_power_on()
        return m.Status(HCode.H_SUCCESS if done else HCode.H_HARDWARE)

    def to_power_on(self) -> None:
        """All that kvm keeps is as it was before the VM started; the processor stands still."""
        self.migration.forget_processor()
        self.memory.unmap_all()
        self.discards.reset()
        self.hcalls.drop_open()
        self.vcpus.reset()
        self.xics.reset()
        self.terminal.reset()
        self.user_space.reset()
        self.hcalls.areas.reset()
        self.hcalls.load_modes({})
        self.tces.clear()
        self.after_call()

    async def stop_guest(self, cause: int) -> None:
        """Have the processor stand still, whatever the run state is; the log says when it did not."""
        try:
            with self._guest.patience.fail_after(_GUEST_SECONDS):
                await self._guest.call(m.VCPU_STOP, m.RunBody(0), cause)
        except (trio.TooSlowError, PefboxError):
            self._log.warning("guest does not stop")

    async def _order_guest(self, order: m.Message[Any, m.Status], body: m.Body, then: VmState, cause: int) -> m.Status:
        status = await self.ask_guest(order, body, cause, _GUEST_SECONDS)
        if status.code == HCode.H_SUCCESS:
            self.enter(then)
        return status

    async def ask_guest(
        self, order: m.Message[m.BodyT, m.ReplyT], body: m.BodyT, cause: int, seconds: float
    ) -> m.ReplyT:
        """What the guest answers to `order`; raises CallTimeout after `seconds`, PeerGone."""
        try:
            with self._guest.patience.fail_after(seconds):
                return await self._guest.call(order, body, cause)
        except trio.TooSlowError:
            raise CallTimeout(self._guest.peer, order.name, seconds) from None

    def fail(self, reason: str) -> None:
        """The guest cannot go on; what it says after that is not heard."""
        if self.state is VmState.FAILED:
            return
        self.failure = reason
        self._log.error("VM failed", reason=reason)
        self.enter(VmState.FAILED)
        self.user_space.crashed(reason)

    def enter(self, state: VmState) -> None:
        """The run state is `state` from now on."""
        if state is not self.state:
            self.state = state
            self.since = time.time()
            self._log.info("VM state", state=state.value)

    # -- TCE tables -------------------------------------------------------------------------------------------

    def _in_ram(self, gpa: int, n_bytes: int) -> bool:
        return gpa >= 0 and gpa + n_bytes <= self.memory.size_bytes

    def _allocate_table(self, window: TceWindowBody) -> memoryview:
        table = SealedMemory(f"pefbox-tce-{window.liobn:x}", window.n_tces * _TCE_BYTES)
        self._tables[window.liobn] = table
        return table.buffer

    def _create_table(self, window: TceWindowBody) -> HCode:
        code = self.tces.create(window)
        if code is HCode.H_SUCCESS:
            self._table_made(window.liobn, self._tables[window.liobn].fd)
        return code

    def _remove_table(self, liobn: int) -> HCode:
        code = self.tces.remove(liobn)
        table = self._tables.pop(liobn, None)
        if table is not None:
            table.close()
        return code

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Memory of the VM is needed for as long as the block runs."""
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._at_rest.set()

    async def at_rest(self) -> None:
        """Returns when nothing is `at_work`; the VM has ended, so that nothing new begins."""
        while self._at_work:
            self._at_rest = trio.Event()
            await self._at_rest.wait()

    def close(self) -> None:
        """Release what the VM held; only when it is `at_rest`."""
        for liobn in list(self._tables):
            self._remove_table(liobn)
        self.dirty.close()
        self.memory.close()
        if self._stream is not None:
            self._stream.close()


def _answered_elsewhere(_result: list[int]) -> None:
    """A waiting handler returns its result; nothing is answered later."""
