"""The machine around the board: its link to kvm, its run state, what the monitor may do to it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import GuestFault, PeerGone, PefboxError
from protocol.wire import Envelope
from services.qemu.dma_windows import DmaWindows
from services.qemu.qmp import (
    BalloonChange,
    CommandFailed,
    ErrorClass,
    MonitorEvents,
    Reset,
    Resumed,
    RunState,
    Shutdown,
    ShutdownCause,
    Stopped,
)
from services.runtime.cause import CAUSE
from services.runtime.link import Link
from services.runtime.log import Log
from shared.machine_type import N_CPUS
from shared.virtio_pci import NOTIFY_BYTES

if TYPE_CHECKING:
    from services.qemu.board import Board
    from services.qemu.virtio_balloon import VirtioBalloon

_ORDER_SECONDS = 5.0
_RUNS = frozenset({RunState.RUNNING, RunState.PRELAUNCH, RunState.FINISH_MIGRATE})
"""States in which a debugger that waits for a stop goes on waiting."""


class Machine:
    """Implements the board's port to kvm and the monitor's MachineControl.

    `load` puts firmware, kernel and device tree into RAM and returns program counter and registers of the start.
    """

    def __init__(self, link: Link, events: MonitorEvents, nursery: trio.Nursery, log: Log) -> None:
        self._state = RunState.PRELAUNCH
        self._news = trio.Event()
        """Set, and replaced, with each change that `until_stopped` looks at."""
        self.debug_stop: m.DebugStopBody | None = None
        """Where the processor stopped for a debugger, until that looks."""
        self.held = False
        """Whether a debugger has it stand still."""
        self._paused = False
        """Whether its user has paused it, also while a debugger lets it run all the same."""
        self.quit_asked = trio.Event()
        self.exit_status: int | None = None
        """What the guest's program said when it ended itself."""
        self.panic: str | None = None
        """What the guest's kernel said when it gave up."""
        self._started_s: float | None = None
        self._ended_s: float | None = None
        self.board: Board | None = None
        self.windows: DmaWindows | None = None
        self.load: Callable[[], Awaitable[tuple[int, dict[int, int]]]] | None = None
        self._link = link
        self._events = events
        self._nursery = nursery
        self._log = log
        self.orders = trio.Lock()
        """Held by whoever changes the run state."""
        self._asked: set[ShutdownCause] = set()
        """What the guest has asked for and nobody has begun."""

    @property
    def state(self) -> RunState:
        """What the machine does."""
        return self._state

    @state.setter
    def state(self, state: RunState) -> None:
        self._state = state
        self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def until_stopped(self) -> None:
        """Returns when the machine neither runs nor starts anew, or its processor stopped for a debugger.

        One that is about to move may stay all the same, and then it runs on.
        """
        while self.debug_stop is None and not self.held and self.state in _RUNS:
            await self._news.wait()

    async def until_started(self) -> None:
        """Returns when the machine is loaded and its processor started, or that has failed."""
        while self.state is RunState.PRELAUNCH:
            await self._news.wait()

    @property
    def is_running(self) -> bool:
        """Whether it runs, or would if no debugger had it stand still."""
        is_only_held = self.state is RunState.PAUSED and self.held and not self._paused
        return self.state is RunState.RUNNING or is_only_held

    @property
    def run_seconds(self) -> float | None:
        """How long the machine has run since its last start, or ran until it ended; None before the first."""
        if self._started_s is None:
            return None
        return (time.monotonic() if self._ended_s is None else self._ended_s) - self._started_s

    # -- exits from kvm ---------------------------------------------------------------------------------------

    def register(self, link: Link) -> None:
        """Serve kvm's exits to user space."""
        link.on(m.EXIT_MMIO_LOAD, self._mmio_load)
        link.on_waiting(m.EXIT_MMIO_STORE, self._mmio_store)
        link.on_waiting(m.EXIT_RTAS, self._rtas)
        link.on_waiting(m.EXIT_HCALL, self._hcall)
        link.on(m.VM_EVENT, self._vm_event)
        link.on(m.DOORBELL_RUNG, self._doorbell_rung)
        link.on(m.MAP_INVALIDATE, self._map_invalidate)
        link.on(m.VCPU_DEBUG_STOP, self._stopped_for_debugger)

    def _map_invalidate(self, _envelope: Envelope, _body: m.InvalidateBody) -> m.Status:
        """A view of guest RAM outlives no wait, so none is in use while a message is served."""
        return m.Status(HCode.H_SUCCESS)

    def _stopped_for_debugger(self, _envelope: Envelope, body: m.DebugStopBody) -> None:
        self.debug_stop = body
        self._tell_news()

    def _mmio_load(self, envelope: Envelope, body: m.MmioLoadBody) -> m.MmioLoadReply:
        CAUSE.set(envelope.cause)
        code, value = self._board().mmio_load(body.gpa, body.size)
        return m.MmioLoadReply(code, value)

    async def _mmio_store(self, envelope: Envelope, body: m.MmioStoreBody) -> m.Status:
        CAUSE.set(envelope.cause)
        return m.Status(await self._board().mmio_store(body.gpa, body.size, body.value))

    def _doorbell_rung(self, envelope: Envelope, body: m.MmioStoreBody) -> None:
        """A store that kvm has answered already; the register may be gone since."""
        CAUSE.set(envelope.cause)
        self._board().ring(body.gpa, body.size, body.value)

    async def _rtas(self, envelope: Envelope, body: m.RtasBody) -> m.RtasReply:
        CAUSE.set(envelope.cause)
        return m.RtasReply(await self._board().rtas_token(body.token, body.args, body.n_rets))

    async def _hcall(self, envelope: Envelope, body: m.HcallBody) -> m.HcallReply:
        CAUSE.set(envelope.cause)
        return m.HcallReply(await self._board().hcalls.call(body.number, body.args))

    def _vm_event(self, _envelope: Envelope, body: m.VmEventBody) -> None:
        if body.kind is m.VmEventKind.SECURE:
            self._log.info("the VM turned secure: its virtio devices move behind the IOMMU")
            self._board().turned_secure()
            return
        self._log.error("guest crashed", reason=body.reason)
        self.state = RunState.GUEST_PANICKED
        self._ended_s = time.monotonic()

    def _board(self) -> Board:
        if self.board is None:
            raise GuestFault("the machine has no devices yet")
        return self.board

    # -- the board's port -------------------------------------------------------------------------------------

    async def want(self, gfns: list[int]) -> None:
        """Have kvm make frames present; raises GuestFault when it refuses."""
        for first in range(0, len(gfns), m.MAX_PAGES):
            status = await self._link.call(m.PAGES_WANTED, m.PagesBody(gfns[first : first + m.MAX_PAGES]), CAUSE.get())
            if status.code not in (HCode.H_SUCCESS, HCode.H_BUSY):
                raise GuestFault(f"gfn {gfns[first]:#x} cannot be made present: code {status.code}")

    async def discard(self, gfns: list[int]) -> int:
        """Have kvm take frames that are in the balloon; its first code that is not H_SUCCESS."""
        for first in range(0, len(gfns), m.MAX_PAGES):
            try:
                status = await self._link.call(
                    m.PAGES_DISCARD, m.PagesBody(gfns[first : first + m.MAX_PAGES]), CAUSE.get()
                )
            except PeerGone:
                # Stopped, perhaps: what it did not take now it may take later.
                return HCode.H_BUSY
            if status.code != HCode.H_SUCCESS:
                return status.code
        return HCode.H_SUCCESS

    def balloon_changed(self, actual_bytes: int) -> None:
        """The guest has so much memory now."""
        self._events.emit(BalloonChange(actual_bytes))

    def msi(self, source: int) -> None:
        """An edge of `source`."""
        self._link.send_event(m.IRQ_SET, m.IrqBody(source, level=True), CAUSE.get())

    def lsi(self, source: int, level: bool) -> None:
        """The new level of `source`."""
        self._link.send_event(m.IRQ_SET, m.IrqBody(source, level), CAUSE.get())

    def doorbell(self, gpa: int, on: bool) -> None:
        """kvm answers stores to the notify register at `gpa`, or no more."""
        self._link.send_event(m.DOORBELL_SET, m.DoorbellBody(gpa, NOTIFY_BYTES, on), CAUSE.get())

    async def define(self, source: int, *, level_triggered: bool) -> None:
        """`source` exists from now on."""
        await self._link.call(m.IRQ_SOURCE, m.IrqSourceBody(source, level_triggered), CAUSE.get())

    async def create_window(self, window: m.TceWindowBody) -> bool:
        """Have kvm make a TCE table, and the devices use it."""
        return self.windows is not None and await self.windows.create(window)

    async def remove_window(self, liobn: int) -> None:
        """A TCE table goes."""
        if self.windows is not None:
            await self.windows.remove(liobn)

    def display(self, character: int) -> None:
        """One byte for the first terminal."""
        self._link.send_event(m.TERMINAL_OUTPUT, m.TerminalBody(bytes([character])), CAUSE.get())

    def power_off(self) -> None:
        """The guest switched itself off."""
        self._begin_once(ShutdownCause.GUEST_SHUTDOWN, self._end, RunState.SHUTDOWN)

    def exit(self, status: int) -> None:
        """The guest's program is done."""
        self.exit_status = status
        self.power_off()

    def reboot(self) -> None:
        """The guest wants a system reset."""
        self._begin_once(ShutdownCause.GUEST_RESET, self._reboot)

    def _begin_once(self, cause: ShutdownCause, work: Callable[..., Awaitable[None]], *args: RunState) -> None:
        """Have `work` done in a task of its own, unless one for the same cause waits to begin."""
        if cause not in self._asked:
            self._asked.add(cause)
            self._nursery.start_soon(work, cause, *args)

    def os_term(self, text: str) -> None:
        """The guest's kernel gave up; as with QEMU's default, that switches the machine off."""
        self._log.error("guest: ibm,os-term", text=text)
        self.panic = text
        self._begin_once(ShutdownCause.GUEST_PANIC, self._end, RunState.GUEST_PANICKED)

    def wall_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        return time.time_ns()

    def cpu_stopped(self, cpu: int) -> bool | None:
        """Whether the processor is stopped; None when there is none of this number."""
        return self.state is not RunState.RUNNING if cpu < N_CPUS else None

    def device_fault(self, device: str, reason: str) -> None:
        """A driver broke `device`, or was refused by it."""
        self._log.warning("device fault", device=device, reason=reason)

    def cas_refused(self, reason: str) -> None:
        """The guest's kernel asked for a machine that this is not."""
        self._log.warning("client architecture refused", reason=reason)

    def io_error(self, device: str, reason: str) -> None:
        """The host refused a request of `device`."""
        self._log.error("disk error", device=device, reason=reason)

    # -- run state --------------------------------------------------------------------------------------------

    async def power_on(self) -> None:
        """Load the machine and start its processor; raises PefboxError."""
        async with self.orders:
            await self._power_on()

    async def _power_on(self) -> None:
        assert self.load is not None
        try:
            pc, gprs = await self.load()
            self._started_s, self._ended_s = time.monotonic(), None
            self._paused = self.held = False
            # Before kvm answers: a short program may have ended by then, and what it came to must stay.
            self.state = RunState.RUNNING
            await self._order(m.VM_START, m.StartBody(0, pc, gprs))
        except PefboxError:
            self.state = RunState.INTERNAL_ERROR
            raise

    def arrived(self, state: RunState) -> None:
        """The machine has come from another host, and is in `state` here."""
        self._started_s, self._ended_s = time.monotonic(), None
        self._paused, self.state = state is RunState.PAUSED, state

    async def stop(self) -> None:
        """As MachineControl."""
        async with self.orders:
            await self._stop()
            self._paused = self.state is RunState.PAUSED

    async def cont(self) -> None:
        """As MachineControl; while a debugger holds the machine, it goes on when that lets it."""
        async with self.orders:
            if not self.held:
                await self._cont()
            self._paused = False

    async def _stop(self) -> None:
        if self.state is not RunState.RUNNING:
            return
        await self._order(m.VM_STOP, m.Empty())
        self.state = RunState.PAUSED
        self._events.emit(Stopped())

    async def _cont(self) -> None:
        if self.state is not RunState.PAUSED:
            return
        await self._order(m.VM_CONTINUE, m.Empty())
        self.state = RunState.RUNNING
        self._events.emit(Resumed())

    # For the host's debugger, whose holding the machine is no pause of its user's.

    async def hold(self) -> None:
        """A debugger has it stand still. Raises PefboxError."""
        async with self.orders:
            await self._stop()
            self.held = True
            self._tell_news()

    async def go(self) -> None:
        """A debugger has it run, whether its user has paused it or not. Raises PefboxError."""
        async with self.orders:
            await self._cont()
            self.held = False

    async def let_go(self) -> None:
        """No debugger has it any more: it runs, unless its user has paused it. Raises PefboxError.

        Its processor may have stopped for the debugger a moment ago, which kvm does not know: so it is stopped first.
        """
        async with self.orders:
            await self._stop()
            if not self._paused:
                await self._cont()
            self.held = False

    async def reset(self) -> None:
        """As MachineControl."""
        await self._reset(ShutdownCause.HOST_RESET)

    async def quit(self) -> None:
        """As MachineControl."""
        self._events.emit(Shutdown.by(ShutdownCause.HOST_QUIT))
        self.quit_asked.set()

    async def status(self) -> RunState:
        """As MachineControl."""
        return self.state

    async def balloon(self) -> int:
        """As MachineControl."""
        return self._balloon().actual_bytes

    async def set_balloon(self, target_bytes: int) -> None:
        """As MachineControl."""
        balloon = self._balloon()
        if balloon.stopped is not None:
            raise CommandFailed(f"The balloon device has stopped: {balloon.stopped}")
        balloon.set_target(target_bytes)

    def _balloon(self) -> VirtioBalloon:
        balloon = None if self.board is None else self.board.balloon
        if balloon is None:
            raise CommandFailed("No balloon device has been activated", ErrorClass.DEVICE_NOT_ACTIVE)
        return balloon

    async def _reset(self, cause: ShutdownCause) -> None:
        async with self.orders:
            self._asked.discard(cause)
            if self.state.elsewhere:
                raise CommandFailed(f"The machine is in state '{self.state}': it is not here to be reset")
            self._events.emit(Reset.by(cause))
            self.state = RunState.PRELAUNCH
            try:
                await self._order(m.VM_RESET, m.Empty())
                await self._board().reset()
                await self._power_on()
            except PefboxError as error:
                self.state = RunState.INTERNAL_ERROR
                self._log.error("reset failed", reason=str(error))
                raise CommandFailed(str(error)) from None

    async def _reboot(self, cause: ShutdownCause) -> None:
        try:
            await self._reset(cause)
        except CommandFailed:
            # No monitor asked for it, and the log has the reason.
            return

    async def _end(self, cause: ShutdownCause, state: RunState) -> None:
        async with self.orders:
            self._asked.discard(cause)
            if self.state.elsewhere:
                return
            self._events.emit(Shutdown.by(cause))
            self.state = state
            self._ended_s = time.monotonic()
            try:
                await self._order(m.VM_POWEROFF, m.Empty())
                await self._board().reset()
            except PefboxError as error:
                self.state = RunState.INTERNAL_ERROR
                self._log.error("power-off failed", reason=str(error))

    async def _order(self, message: m.Message[m.BodyT, m.Status], body: m.BodyT) -> None:
        with self._link.patience.bound(_ORDER_SECONDS):
            status = await self._link.call(message, body, CAUSE.get())
            if status.code != HCode.H_SUCCESS:
                raise GuestFault(f"kvm refused {message.name}: code {status.code}")
            return
        raise GuestFault(f"kvm did not answer {message.name} within {_ORDER_SECONDS:g} s")
