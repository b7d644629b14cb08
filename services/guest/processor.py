"""A virtual processor: one OS thread that alone owns the engine and the links to kvm and ultravisor.

    take due messages without waiting -> run the engine for at most a slice -> serve the exit

It is hardware: it holds MSR.S, routes `sc 1` to kvm, or to the ultravisor when S is set, and `sc 2` to the ultravisor,
and it takes no orders from the kernel on it. A call sends, then polls both links, and while it waits it serves
invalidations, the interrupt line, stop, start and whatever the control thread posts.

A start or an end of the secure VM that comes while the engine is inside a memory access unwinds the engine first
(`_Abandon`): only then is the memory let go and the message answered.

For a migration the processor is saved where its engine is at a safe point and nothing is open between it and the loop.
It goes on to such a point, and the order stays unanswered until it is there. A wait of the guest (H_CEDE and its kin)
does not hold that up: it ends early, as PAPR allows. Every other call is waited for, since a state has no place for it.
What keeps a processor from running is a set of holds: kvm's, and the ultravisor's, which kvm cannot end (S6).
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol import messages as m
from protocol.causes import first_cause
from protocol.codes import HCode, UCode
from protocol.declare import Reg
from protocol.errors import GuestFault, PeerError
from protocol.hcalls import H_CEDE, H_LOGICAL_CI_LOAD, H_LOGICAL_CI_STORE, HCALLS
from protocol.links import GUEST_WHILE_SECURE, name_of
from protocol.messages import Access, decode_result
from protocol.refusals import HELD_UP_STATES, Refusal, refusal
from protocol.ucalls import PIDR, UCALLS
from protocol.wire import Envelope, MessageKind
from services.guest.clock import GuestClock
from services.guest.debugger import Debugger
from services.guest.engine import Engine
from services.guest.exits import Crash, Exit, Hypercall, Idle, MmioLoad, MmioStore, Pause, Ultracall
from services.guest.host_debugger import HOST_HANDLERS, stop_body
from services.guest.inbox import Inbox
from services.guest.link_end import LinkEnd
from services.guest.pacing import Pacer
from services.guest.processor_state import VERSION, ProcessorState, decode_state, encode_state
from services.guest.run_state import Hold, Life, RunState
from services.guest.vm_memory import GuestVmMemory
from services.runtime.gdb.target import Stop
from services.runtime.link import LOST_STATES
from services.runtime.log import Log

SLICE_NS = 1_000_000
_RETRY_MS = 1
_FAULT_TRIES = 20_000
_LOST_PEER_MS = 10
_IDLE_POLL_MS = 1_000
_SHORT_WAIT_MS = 1
"""Most calls are answered sooner."""
_NS_PER_MS = 1_000_000
_SAVE_NS = 1_000_000_000
"""A processor that comes to no safe point in this time is not saved."""
_SAVE_POLL_MS = 10
_VCPU = 0


@dataclass(frozen=True, slots=True)
class _Saving:
    """An order to save the processor that is not answered yet."""

    end: LinkEnd
    envelope: Envelope
    hold: Hold
    deadline_ns: int
    """On the host's monotonic clock."""


class _Abandon(BaseException):
    """Unwinds the engine; BaseException, so that no kernel code catches it."""


class Processor:
    """Processor 0 of a VM. Every method but `post`, `start_thread` and `join` runs in its own thread."""

    def __init__(
        self,
        engine: Engine,
        memory: GuestVmMemory,
        kvm: LinkEnd,
        ultravisor: LinkEnd,
        clock: GuestClock,
        log: Log,
        kernel: str,
    ) -> None:
        """`kernel` is the setting of the VM that chose the engine: a state of another one is refused."""
        self.state = RunState.OFF
        self.secure = False
        self.crash_reason = ""
        self.refused = 0
        self._engine = engine
        self._memory = memory
        self._kvm = kvm
        self._ultravisor = ultravisor
        self._clock = clock
        self._log = log
        self._kernel = kernel
        self._ends = (kvm, ultravisor)
        for end in self._ends:
            end.serve_later = functools.partial(self._serve_later, end)
        self._inbox = Inbox(self._ends)
        self._thread = threading.Thread(target=self._main, name="vcpu0", daemon=True)
        self._quit = False
        self._in_engine = False
        self._deferred: list[tuple[LinkEnd, Envelope]] = []
        self._generation = 0
        self._next_cause = first_cause(memory.lpid, 0)
        self._replies: dict[tuple[LinkEnd, int], Envelope | None] = {}
        self._resume_with: list[int] | None = None
        self._again: MmioLoad | MmioStore | None = None
        """A device access that nobody could answer yet."""
        self._pacer = Pacer()
        self._line = False
        self._just_looked = False
        """Whether a call has just taken what was due: back-to-back calls need not look twice each."""
        self._life = Life()
        self._saving: _Saving | None = None
        self._held_up = True
        """Whether something comes before the engine: a hold, a save, a debugger's step, or that nothing was started."""
        self.debugger = Debugger(engine, memory, self, self._tell_host)
        # An object of 30 attributes and more is looked up slower by CPython: a null hypercall then takes 0.3 us longer.

    # -- for the control thread -------------------------------------------------------------------------------

    def start_thread(self) -> None:
        """Begin to serve; the processor is off until it is started."""
        self._thread.start()

    def count_causes_from(self, cause: int) -> None:
        """The next call has the cause after `cause`; before the thread runs."""
        self._next_cause = cause

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` run in the processor's thread, soon."""
        self._inbox.post(action)

    def peer_is(self, end: LinkEnd, state: str) -> None:
        """What became of kvm or ultravisor; posted by the control thread."""
        state = state if state in LOST_STATES else "up"
        if state != end.peer_state:
            end.peer_state = state
            event = "peer lost" if state != "up" else "peer is up again"
            self._log.warning(event, peer=end.peer, state=state, open_calls=self.open_calls(end))

    def debugger_holds(self, held: bool) -> None:
        """A debugger has stopped the processor's thread, or lets it run; from any thread."""
        if held:
            self._clock.hold()
        elif self.state is RunState.RUNNING:
            self._clock.go_on()

    def open_calls(self, end: LinkEnd) -> int:
        """Calls to a peer that it has not answered; for any thread."""
        return sum(1 for other, _ in list(self._replies) if other is end)

    def quit(self) -> None:
        """Leave the loop, after everything that was posted before."""
        self.post(self._leave)

    def join(self, seconds: float) -> bool:
        """Whether the thread ended within `seconds`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- the loop ---------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        self._quit = True

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # A process without its processor would look alive for ever: its end is what others notice (L1).
            self._log.error("the processor broke", exc_info=error)
            os._exit(1)

    def _loop(self) -> None:
        while not self._quit:
            if not self._just_looked:
                self._take_due()
            self._just_looked = False
            if self._held_up and self._stands():
                continue
            leaving: Exit | None
            leaving, self._again = self._again, None
            if leaving is None:
                leaving = self._run_engine()
            if leaving is not None:
                self._serve(leaving)

    def _stands(self) -> bool:
        """Save the processor where that is wanted, wait while it is held; False when the engine has to run."""
        if self._saving is not None:
            self._try_to_save(self._saving)
        if self._saving is not None:
            # On to the next safe point, also while kvm holds the processor, which it may have stopped behind a call:
            # the rest of that step is short, guest time stands still, and afterwards it is as stopped as before.
            return False
        if self.state is RunState.RUNNING:
            return False
        self.debugger.standing()
        if not self._quit:
            self._wait(_IDLE_POLL_MS)
        return True

    def _run_engine(self) -> Exit | None:
        self._in_engine = True
        try:
            if self._resume_with is not None:
                result, self._resume_with = self._resume_with, None
                self._engine.resume(result)
            if self._saving is not None:
                return self._run_to_safe_point()
            if self._held_up:
                return self.debugger.step()
            return self._engine.run(SLICE_NS)
        except _Abandon:
            return None
        except GuestFault as fault:
            return Crash(str(fault))
        except Exception as error:
            self._log.error("engine error", exc_info=error)
            return Crash(f"engine error: {error}")
        finally:
            self._in_engine = False
            if self._deferred:
                self._take_deferred()

    def _run_to_safe_point(self) -> Exit | None:
        # A slice of no length ends at the first safe point. One that ends by guest time would never end while that is
        # held, and behind the safe point may be the next call.
        return None if self._engine.at_safe_point else self._engine.run(0)

    def _serve(self, leaving: Exit) -> None:
        match leaving:
            case Hypercall(number, args):
                if number in UCALLS.by_number:
                    # Both kinds go to the ultravisor when S is set; the instruction says which one was meant.
                    self._resume_with = [HCode.H_FUNCTION]
                    return
                self._call_and_resume(self._hypervisor(), number, [_VCPU, *args])
            case Ultracall(number, args):
                call = UCALLS.by_number.get(number)
                if call is None:
                    self._resume_with = [UCode.U_FUNCTION]
                    return
                own = [_HARDWARE[reg](self._engine) for reg in call.hardware]
                self._call_and_resume(self._ultravisor, number, [_VCPU, *own, *args])
            case MmioLoad(gpa, size):
                self._access_device(leaving, H_LOGICAL_CI_LOAD.number, [_VCPU, size, gpa])
            case MmioStore(gpa, size, value):
                self._access_device(leaving, H_LOGICAL_CI_STORE.number, [_VCPU, size, gpa, value])
            case Idle():
                self._idle(leaving)
            case Crash(reason):
                self._crash(reason)
            case Pause.TRAP:
                self.debugger.trapped()
            case Pause():
                pass

    def _call_and_resume(self, end: LinkEnd, number: int, registers: list[int]) -> None:
        reply = self._call(end, number, registers, None)
        if reply is not None:
            self._resume_with = self._result(reply)

    def _access_device(self, access: MmioLoad | MmioStore, number: int, registers: list[int]) -> None:
        """As `_call_and_resume`, later once more when it is busy: a load or store could not tell the guest so."""
        self._call_and_resume(self._hypervisor(), number, registers)
        if self._resume_with is not None and self._resume_with[0] == HCode.H_BUSY:
            self._resume_with, self._again = None, access
            self._wait(_LOST_PEER_MS)

    def _result(self, reply: Envelope) -> list[int]:
        try:
            return decode_result(reply.body)
        except PeerError as error:
            self._refuse(str(error))
            return [HCode.H_HARDWARE]

    def _idle(self, idle: Idle) -> None:
        """H_CEDE. The decrementer is the processor's own and ends it; kvm ends it for an interrupt."""
        until_ns = idle.until_ns
        if self._line or self._saving is not None:
            return
        if until_ns is None:
            self._cede(None)
            return
        # Time does not jump over an open device request, or its time-out would fire first: the device has as long.
        before_ns = self._clock.now_ns()
        if not idle.device_open and self._clock.skip_to(until_ns):
            wait_ms = self._pacer.wait_ms(max(0, until_ns - before_ns))
            if wait_ms:
                self._take_next(wait_ms)
            return
        deadline_ns = time.monotonic_ns() + until_ns - self._clock.now_ns()
        self._cede(deadline_ns)
        if not self._line and time.monotonic_ns() >= deadline_ns:
            self._clock.skip_to(until_ns)

    def _cede(self, deadline_ns: int | None) -> None:
        reply = self._call(self._hypervisor(), H_CEDE.number, [_VCPU], deadline_ns)
        if reply is not None and self._result(reply)[0] == HCode.H_BUSY:
            # Who would end the wait is held up, so there was none: the next one must not follow at once.
            self._wait(_LOST_PEER_MS)

    def _crash(self, reason: str) -> None:
        self._become(RunState.CRASHED)
        self.crash_reason = reason
        self._log.error("guest crashed", reason=reason)
        body = m.CrashBody(_VCPU, reason[:512])
        self._hypervisor().send_event(m.GUEST_CRASHED.number, body, self._new_cause())
        self.debugger.crashed(reason)

    def _hypervisor(self) -> LinkEnd:
        """Where `sc 1` and faults go."""
        return self._ultravisor if self.secure else self._kvm

    # -- calls ------------------------------------------------------------------------------------------------

    def _call(self, end: LinkEnd, number: int, body: Any, deadline_ns: int | None) -> Envelope | None:  # noqa: ANN401
        """Call and wait; None when the processor was started or ended meanwhile.

        A peer that is held up is waited for, since it may have the call already, and what it does for it (takes an
        interrupt, prints a line) is done once. Only a wait of the guest ends with H_BUSY then.

        With `deadline_ns`, on the host's monotonic clock, it also ends then and when the interrupt line rises. A wait
        of the guest ends with H_SUCCESS as soon as the processor is to be saved or to do a debugger's step; kvm's own
        answer is passed over.
        """
        generation = self._generation
        may_send = end.peer_state == "up" or _outlasts(number, end.peer_state)
        correlation = end.send_call(number, body, self._new_cause()) if may_send else None
        if correlation is None:
            self._wait(_LOST_PEER_MS)
            return self._lost_reply(end, number) if generation == self._generation else None
        key = (end, correlation)
        self._replies[key] = None
        try:
            while generation == self._generation and not self._quit:
                reply = self._replies[key]
                if reply is not None:
                    return reply
                if end.peer_state != "up" and not _outlasts(number, end.peer_state):
                    return self._lost_reply(end, number)
                if deadline_ns is not None and (deadline_ns <= time.monotonic_ns() or self._line):
                    return None
                if self._saving is not None and self._is_left(self._saving, number):
                    return _own_reply(number, [HCode.H_SUCCESS])
                if self.debugger.steps and number in _WAITS:
                    return _own_reply(number, [HCode.H_SUCCESS])
                self._take_next(self._patience_ms(deadline_ns))
        finally:
            del self._replies[key]
        return None

    def _patience_ms(self, deadline_ns: int | None) -> int:
        if self._saving is not None:
            return _SAVE_POLL_MS
        if deadline_ns is None or self.state is not RunState.RUNNING:
            return _IDLE_POLL_MS
        return max(1, min(_IDLE_POLL_MS, -(-(deadline_ns - time.monotonic_ns()) // _NS_PER_MS)))

    def _lost_reply(self, end: LinkEnd, number: int) -> Envelope:
        """What a call gets whose peer is dead or takes no messages; a wait of the guest also when it is held up."""
        return _own_reply(number, refusal(number, Refusal.of_peer(end.peer_state)))

    def _is_left(self, saving: _Saving, number: int) -> bool:
        """Whether an open call is not waited for, as the processor is to be saved; a save that is late ends here."""
        if time.monotonic_ns() >= saving.deadline_ns:
            self._end_saving(HCode.H_BUSY)
            return False
        return number in _WAITS

    def _new_cause(self) -> int:
        self._next_cause += 1
        return self._next_cause

    def resolve_fault(self, gfn: int, access: Access) -> None:
        """Have the map give `gfn`; called by the address space from inside the engine. Raises GuestFault."""
        body = m.MapFaultBody(_VCPU, gfn, access)
        for _ in range(_FAULT_TRIES):
            generation = self._generation
            reply = self._call(self._hypervisor(), m.MAP_FAULT.number, body, None)
            if self._deferred or generation != self._generation or self._quit:
                raise _Abandon
            code = HCode.H_HARDWARE if reply is None else m.MAP_FAULT.decode_reply(reply.body).code
            if code == HCode.H_SUCCESS:
                return
            if code != HCode.H_BUSY:
                raise GuestFault(f"no memory at gfn {gfn:#x} ({access.name.lower()}): code {code}")
            self._wait(_RETRY_MS)
            self._take_due()
        raise GuestFault(f"gfn {gfn:#x} stays busy")

    # -- messages ---------------------------------------------------------------------------------------------

    def _wait(self, milliseconds: int) -> list[LinkEnd]:
        """Sleep until something comes; the links that may have a message."""
        if self._engine.ticks:
            ready = self._inbox.wait(min(milliseconds, _SHORT_WAIT_MS))
            if ready or milliseconds <= _SHORT_WAIT_MS:
                return ready
            self._engine.rest()
        return self._inbox.wait(milliseconds)

    def _take_next(self, milliseconds: int) -> None:
        """Sleep until something comes, and take a message of each link that has one."""
        for end in self._wait(milliseconds):
            self._take_one(end)
        self._inbox.run_posted()
        self._just_looked = True

    def _take_due(self) -> None:
        for end in self._ends:
            while self._take_one(end):
                pass
        self._inbox.run_posted()

    def _take_one(self, end: LinkEnd) -> bool:
        try:
            envelope = end.receive()
            if envelope is None:
                return False
            self._take(end, envelope)
        except PeerError as error:
            self._refuse(f"{end.peer}: {error}")
        return True

    def _take(self, end: LinkEnd, envelope: Envelope) -> None:
        if end.watch is None or end.watch(end, envelope):
            self._dispatch(end, envelope)

    def _serve_later(self, end: LinkEnd, envelope: Envelope) -> None:
        def serve() -> None:
            try:
                self._dispatch(end, envelope)
            except PeerError as error:
                self._refuse(f"{end.peer}: {error}")

        self.post(serve)

    def _dispatch(self, end: LinkEnd, envelope: Envelope) -> None:
        if envelope.kind is MessageKind.REPLY:
            key = (end, envelope.correlation)
            if key in self._replies:
                self._replies[key] = envelope
            return
        if end is self._kvm and self.secure and envelope.number not in GUEST_WHILE_SECURE:
            end.reply(envelope, refusal(envelope.number, Refusal.PERMISSION))
            self._refuse(f"{name_of(envelope.number)} from kvm while S is set")
            return
        if self._in_engine and envelope.number in _UNWINDING:
            self._deferred.append((end, envelope))
            raise _Abandon
        self._handle(end, envelope)

    def _take_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for end, envelope in deferred:
            try:
                self._handle(end, envelope)
            except PeerError as error:
                self._refuse(f"{end.peer}: {error}")

    def _handle(self, end: LinkEnd, envelope: Envelope) -> None:
        body = m.MESSAGES[envelope.number].decode_body(envelope.body)
        if envelope.number in _SAVES:
            self._want_save(end, envelope)
            return
        if envelope.number in HOST_HANDLERS:
            end.reply(envelope, self._serve_host_debugger(envelope.number, body))
            return
        code = _HANDLERS[envelope.number](self, body)
        end.reply(envelope, m.Status(code))

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        if self.refused <= 100 or self.refused % 1000 == 0:
            self._log.warning("refused", reason=reason, refused=self.refused)

    # -- what kvm and ultravisor order ------------------------------------------------------------------------

    def _invalidate(self, _body: Any) -> int:  # noqa: ANN401
        self._engine.flush_translations()
        return HCode.H_SUCCESS

    def _start_normal(self, body: m.StartBody) -> int:
        if not self._memory.use_normal():
            # It is on its way over the launcher, which the order did not take.
            return HCode.H_BUSY
        self._begin(body.pc, body.gprs, secure=False)
        return HCode.H_SUCCESS

    def _start_secure(self, body: m.StartBody) -> int:
        if not self._memory.use_secure():
            return HCode.H_NO_MEM
        self._begin(body.pc, body.gprs, secure=True)
        return HCode.H_SUCCESS

    def _begin(self, pc: int, gprs: dict[int, int], *, secure: bool) -> None:
        self._engine.start(pc, gprs, secure=secure)
        self._come_alive(secure=secure)

    def _come_alive(self, *holds: Hold, secure: bool) -> None:
        """The engine has something new to run, as soon as nothing holds it."""
        self.secure = secure
        self.debugger.begins(secure=secure)
        self._engine.set_line(self._line)
        self._become(RunState.RUNNING, *holds)

    def _end_secure(self, _body: m.Empty) -> int:
        self.secure = False
        self._become(RunState.OFF)
        self._memory.drop_secure()
        return HCode.H_SUCCESS

    def _stop(self, _body: m.RunBody) -> int:
        # Kept also while the processor is off: kvm may order it before a secure VM that is paused arrives.
        self._life.holds.add(Hold.HYPERVISOR)
        self._follow_holds()
        return HCode.H_SUCCESS

    def _continue(self, _body: m.RunBody) -> int:
        self._release(Hold.HYPERVISOR)
        return HCode.H_SUCCESS

    def _thaw(self, _body: m.RunBody) -> int:
        if not self.secure:
            return HCode.H_STATE
        self._release(Hold.ULTRAVISOR)
        return HCode.H_SUCCESS

    def _release(self, hold: Hold) -> None:
        if self._saving is not None and self._saving.hold is hold:
            # Who lets the processor run waits for the save no more; it must not stand still for it afterwards.
            self._end_saving(HCode.H_BUSY)
        self._life.holds.discard(hold)
        self._follow_holds()

    def _become(self, life: RunState, *holds: Hold) -> None:
        """Begin or end to run something, of which only `holds` keep it: nothing of before is waited for."""
        self._generation += 1
        self._resume_with = self._again = None
        self._life.become(life, *holds)
        self._end_saving(HCode.H_STATE)

    def _follow_holds(self) -> None:
        self.state = state = self._life.state
        self._held_up = state is not RunState.RUNNING or self._saving is not None or self.debugger.steps
        if state is RunState.RUNNING:
            self._clock.go_on()
        else:
            self._clock.hold()

    def _set_line(self, body: m.LineBody) -> int:
        self._line = body.level
        self._engine.set_line(body.level)
        return HCode.H_SUCCESS

    # -- for a debugger ---------------------------------------------------------------------------------------

    def hold(self, hold: Hold) -> None:
        """As services.guest.debugger.Processor."""
        self._life.holds.add(hold)
        self._follow_holds()

    def let_go(self, hold: Hold) -> None:
        """As services.guest.debugger.Processor."""
        self._release(hold)

    def follow(self) -> None:
        """As services.guest.debugger.Processor."""
        self._follow_holds()

    def _serve_host_debugger(self, number: int, body: Any) -> Any:  # noqa: ANN401
        if self._life.unheld is RunState.OFF:
            # Its registers may be those of a secure VM that has ended.
            return refusal(number, Refusal.PERMISSION)
        return HOST_HANDLERS[number](self.debugger, body)

    def _tell_host(self, stop: Stop) -> None:
        body = stop_body(stop)
        if body is not None:
            self._kvm.send_event(m.VCPU_DEBUG_STOP.number, body, 0)

    @property
    def stands(self) -> bool:
        """As services.guest.debugger.Processor."""
        return not self._in_engine

    @property
    def is_free(self) -> bool:
        """As services.guest.debugger.Processor."""
        return not self._replies and not self._in_engine and self._life.unheld is RunState.RUNNING

    @property
    def is_frozen(self) -> bool:
        """As services.guest.debugger.Processor."""
        return self.state is RunState.FROZEN

    # -- migration --------------------------------------------------------------------------------------------

    def _want_save(self, end: LinkEnd, envelope: Envelope) -> None:
        code = self._why_no_save(end)
        if code is not None:
            end.reply(envelope, m.SavedProcessor(code))
            return
        hold = Hold.ULTRAVISOR if end is self._ultravisor else Hold.HYPERVISOR
        self._saving = _Saving(end, envelope, hold, time.monotonic_ns() + _SAVE_NS)
        self._follow_holds()

    def _why_no_save(self, end: LinkEnd) -> int | None:
        if self._life.unheld is not RunState.RUNNING or self.secure is not (end is self._ultravisor):
            return HCode.H_STATE
        return None if self._saving is None else HCode.H_BUSY

    def _try_to_save(self, saving: _Saving) -> None:
        """Save the processor if it is where that is possible, unless it is too late."""
        if time.monotonic_ns() >= saving.deadline_ns:
            self._end_saving(HCode.H_BUSY)
        elif self._resume_with is None and self._again is None and self._engine.at_safe_point:
            self._save(saving)

    def _save(self, saving: _Saving) -> None:
        # Held first: the time base in the engine's state and the clock's time have to be of one moment.
        self._clock.hold()
        try:
            engine = self._engine.save()
            data = encode_state(ProcessorState(VERSION, self._kernel, self.secure, self._clock.now_ns(), engine))
        except Exception as error:
            # What cannot be saved goes on here.
            self._log.error("processor not saved", exc_info=error)
            self._end_saving(HCode.H_FUNCTION)
            return
        self._life.holds.add(saving.hold)
        self._end_saving(HCode.H_SUCCESS, data)

    def _end_saving(self, code: int, data: bytes = b"") -> None:
        """Answer the order to save, if there is one, with the holds as they are now."""
        saving, self._saving = self._saving, None
        self._follow_holds()
        if saving is not None:
            saving.end.reply(saving.envelope, m.SavedProcessor(code, data))

    # A state is loaded into a processor that is off: its engine does not run, so there is nothing to unwind.

    def _load_normal(self, body: m.LoadProcessorBody) -> int:
        if self.state is not RunState.OFF:
            return HCode.H_STATE
        if not self._memory.use_normal():
            return HCode.H_BUSY
        if not self._load(body.state, secure=False):
            return HCode.H_PARAMETER
        self._come_alive(Hold.HYPERVISOR, secure=False)
        return HCode.H_SUCCESS

    def _load_secure(self, body: m.LoadProcessorBody) -> int:
        if self.state is not RunState.OFF:
            self._memory.refuse_secure()
            return HCode.H_STATE
        if not self._memory.use_secure():
            return HCode.H_NO_MEM
        if not self._load(body.state, secure=True):
            self._memory.drop_secure()
            return HCode.H_PARAMETER
        self._come_alive(*self._life.holds, Hold.ULTRAVISOR, secure=True)
        return HCode.H_SUCCESS

    def _load(self, data: bytes, *, secure: bool) -> bool:
        """Have clock and engine go on from `data`; False, with its reason in the log, when it is no state of theirs."""
        before_ns = self._clock.now_ns()
        try:
            state = decode_state(data, self._kernel, secure=secure)
            # The engine reckons its time base from what the clock shows.
            self._clock.hold()
            self._clock.move_to(state.now_ns)
            self._engine.load(state.engine)
            if self._engine.secure is not secure:
                raise ValueError("MSR.S of the engine's state is another")
        except Exception as error:
            # It comes from a peer, and what decodes may still be nothing that an engine can be built from. Of errors
            # other than a refusal only the kind is told: their text may be of the guest (S1).
            self._clock.move_to(before_ns)
            self._refuse(f"processor state: {error if isinstance(error, ValueError) else type(error).__name__}")
            return False
        return True


def _outlasts(number: int, peer_state: str) -> bool:
    """Whether an open call to a peer that is not up goes on: it will be answered, and no wait would end early by it."""
    return peer_state in HELD_UP_STATES and number not in _WAITS


def _own_reply(number: int, body: Any) -> Envelope:  # noqa: ANN401
    """A reply to call `number` that no peer sent."""
    return Envelope(1, MessageKind.REPLY, number, 0, 0, msgspec.Raw(msgspec.msgpack.encode(body)))


_HARDWARE: dict[Reg, Callable[[Engine], int]] = {PIDR: lambda engine: engine.pidr}
"""What the processor puts before the arguments of a call that declares it."""
_WAITS = frozenset(call.number for call in HCALLS if call.open_ended)
"""Hypercalls by which the guest waits."""
_SAVES = frozenset({m.VCPU_SAVE.number, m.SVM_FREEZE.number})
"""Orders that are answered later."""
_UNWINDING = frozenset({m.VCPU_START.number, m.SVM_START.number, m.SVM_ENDED.number})
_HANDLERS: dict[int, Callable[[Processor, Any], int]] = {
    m.MAP_INVALIDATE.number: Processor._invalidate,
    m.VCPU_START.number: Processor._start_normal,
    m.SVM_START.number: Processor._start_secure,
    m.SVM_ENDED.number: Processor._end_secure,
    m.VCPU_STOP.number: Processor._stop,
    m.VCPU_CONTINUE.number: Processor._continue,
    m.VCPU_LINE.number: Processor._set_line,
    m.VCPU_LOAD.number: Processor._load_normal,
    m.SVM_LOAD.number: Processor._load_secure,
    m.SVM_THAW.number: Processor._thaw,
}
