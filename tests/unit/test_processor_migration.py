"""A processor is saved where it runs and goes on elsewhere, and runs in one place only: holds, engines, clocks."""

from __future__ import annotations

import itertools
import os
import queue
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import msgspec
import pytest
import structlog

from protocol import hcalls as h
from protocol import messages as m
from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES
from protocol.links import KVM_GUEST, ULTRAVISOR_GUEST
from protocol.messages import MAX_PROCESSOR_STATE_BYTES, Access, Body
from protocol.ucalls import UV_ESM
from protocol.wire import Envelope, MessageKind
from services.guest import processor as processor_module
from services.guest.address_space import AddressSpace
from services.guest.bench_engine import BenchEngine
from services.guest.clock import GuestClock, InstructionClock, WallClock
from services.guest.engine import Engine
from services.guest.exits import Exit, Hypercall, Idle, MmioLoad, Pause, Ultracall
from services.guest.host_debugger import HOST_HANDLERS
from services.guest.link_end import LinkEnd
from services.guest.machine.engine import MachineEngine
from services.guest.machine.interrupts import Vector
from services.guest.machine.registers import Msr, Spr
from services.guest.machine.state import MAX_STATE_BYTES as MAX_MACHINE_BYTES
from services.guest.machine.time_base import TICKS_PER_US
from services.guest.model.engine import ModelEngine
from services.guest.model.parts import Parts
from services.guest.model.state import MAX_STATE_BYTES as MAX_MODEL_BYTES
from services.guest.model.state import KernelState, Phase, encode_state
from services.guest.processor import _HANDLERS, _SAVES, Processor
from services.guest.processor_state import VERSION, ProcessorState
from services.guest.run_state import RunState
from services.guest.vm_memory import GuestVmMemory
from shared.memfd import SealedMemory
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig
from tests.unit.power_asm import R3, R4, R5, R8, R9

N_PAGES = 64
RAM_BYTES = N_PAGES * PAGE_BYTES
REGISTER = 1 << 45
SECONDS = 5.0
SOON_SECONDS = 0.5
"""Well within the second after which a save is given up."""
NOT_YET_SECONDS = 0.05
SEED = 31
RUN = m.RunBody(0)
LOG = structlog.wrap_logger(structlog.ReturnLogger())
STATE = b"state of the played engine"

Host = Callable[[int, list[int]], list[int] | Body | None]


class Reply:
    """The answer to an order, as it comes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, body: Any) -> None:  # noqa: ANN401
        self._queue.put(body)

    def take(self, seconds: float = SECONDS) -> Any:  # noqa: ANN401
        return self._queue.get(timeout=seconds)

    @property
    def came(self) -> bool:
        return not self._queue.empty()


class PlayedEnd:
    """A link whose peer answers the guest's calls by `host`, where None leaves a call open, and gives orders."""

    peer = "alpha/peer"
    peer_state = "up"
    watch = None

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.host: Host = lambda _number, _body: [HCode.H_SUCCESS]
        self.calls: list[int] = []
        self.open: dict[int, int] = {}
        """Correlation id by number."""
        self.events: list[int] = []
        self._inbox: deque[Envelope] = deque()
        self._orders: dict[int, Reply] = {}
        self._numbers = itertools.count(1)

    # -- for the processor ------------------------------------------------------------------------------------

    def may_have_message(self) -> bool:
        return bool(self._inbox)

    def receive(self) -> Envelope | None:
        if self._inbox:
            return self._inbox.popleft()
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        return None

    def send_call(self, number: int, body: Any, _cause: int) -> int:  # noqa: ANN401
        correlation = next(self._numbers)
        self.open[number] = correlation
        self.calls.append(number)
        answer = self.host(number, body)
        if answer is not None:
            self.answer(number, answer)
        return correlation

    def send_event(self, number: int, _body: object, _cause: int) -> None:
        self.events.append(number)

    def reply(self, envelope: Envelope, body: Body) -> None:
        self._orders.pop(envelope.correlation).put(body)

    # -- for the test -----------------------------------------------------------------------------------------

    def answer(self, number: int, result: list[int] | Body) -> None:
        """The reply to a call that is open."""
        self._put(MessageKind.REPLY, number, self.open.pop(number), result)

    def order(self, message: m.Message[Any, Any], body: Body = RUN) -> Reply:
        """Give an order."""
        correlation, reply = next(self._numbers), Reply()
        self._orders[correlation] = reply
        self._put(MessageKind.CALL, message.number, correlation, body)
        return reply

    def ask(self, message: m.Message[Any, Any], body: Body = RUN) -> Any:  # noqa: ANN401
        """Give an order and wait for what comes of it."""
        return self.order(message, body).take()

    def await_call(self, number: int, n_times: int = 1) -> None:
        """Wait until the guest has made a call `n_times`."""
        eventually(lambda: self.calls.count(number) >= n_times)

    def _put(self, kind: MessageKind, number: int, correlation: int, body: list[int] | Body) -> None:
        raw = msgspec.Raw(msgspec.msgpack.encode(body))
        self._inbox.append(Envelope(1, kind, number, correlation, 0, raw))
        os.eventfd_write(self.fd, 1)


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.001)


class PlayedEngine:
    """Makes `exits` in turn, then nothing. At a safe point whenever no exit waits for its outcome; with `steps` only
    once it has run after that, and with `job` it believes to be at one always."""

    ticks = False
    secure = False
    pidr = 0

    def __init__(self, *exits: Exit, steps: bool = False, job: bool = False) -> None:
        self.exits = deque(exits)
        self.at_safe_point = True
        self.outcomes: list[list[int]] = []
        self.slices: list[int] = []
        self.n_flushes = 0
        self.n_runs = 0
        self._steps, self._job = steps, job
        self._awaited = False
        self.lines: list[bool] = []
        self.n_saves = 0

    def start(self, _pc: int, _gprs: dict[int, int], *, secure: bool) -> None:
        self.secure, self.at_safe_point, self._awaited = secure, True, False

    def run(self, slice_ns: int) -> Exit:
        assert not self._awaited
        self.n_runs += 1
        self.slices = [*self.slices[-3:], slice_ns]
        exit_ = self.exits.popleft() if self.exits else Pause.SLICE_END
        self._awaited = isinstance(exit_, Hypercall | Ultracall | MmioLoad)
        self.at_safe_point = not self._awaited or self._job
        return exit_

    def resume(self, result: list[int]) -> None:
        self.outcomes.append(result)
        self._awaited = False
        self.at_safe_point = not self._steps

    def flush_translations(self) -> None:
        self.n_flushes += 1

    def set_line(self, level: bool) -> None:
        self.lines.append(level)

    def save(self) -> bytes:
        assert self.at_safe_point and not self._awaited
        self.n_saves += 1
        return STATE

    def load(self, state: bytes) -> None:
        self.secure = state.startswith(b"secure")
        if state not in (STATE, b"secure " + STATE):
            raise ValueError("no state of the played engine")


MakeEngine = Callable[[AddressSpace, Any], Any]


class Rig:
    """A processor in a thread of its own, its memory, and both of its peers as they are played."""

    def __init__(self, make_engine: MakeEngine, clock: GuestClock, kernel: str, *, has_map: bool = True) -> None:
        self.clock = clock
        self.kvm, self.ultravisor = PlayedEnd(), PlayedEnd()
        self.private, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs = theirs
        ram = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(ram, RAM_BYTES)
        self.memory = GuestVmMemory(5, ram, RAM_BYTES, theirs, LOG)
        os.close(ram)
        self.secure = os.memfd_create("pefbox-secure-vm1", os.MFD_CLOEXEC)
        os.ftruncate(self.secure, RAM_BYTES)
        self.maps = {kind: map_of(kind) for kind in (MapKind.NORMAL, MapKind.SECURE)}
        self.space = AddressSpace(self.memory.normal, self.memory.dirty.buffer, self._fault)
        self.memory.space = self.space
        if has_map:
            self.give_map()
        self.engine = make_engine(self.space, clock)
        ends = (cast(LinkEnd, self.kvm), cast(LinkEnd, self.ultravisor))
        self.processor = Processor(cast(Engine, self.engine), self.memory, *ends, clock, LOG, kernel)
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _fault(self, gfn: int, access: Access) -> None:
        self.processor.resolve_fault(gfn, access)

    def _run(self) -> None:
        try:
            self.processor._loop()
        except BaseException as error:
            self.errors.append(error)

    def give_map(self) -> None:
        """kvm's map comes."""
        self.memory.take_normal_map(os.dup(self.maps[MapKind.NORMAL].fd))

    def send_secure_memory(self) -> None:
        """What the ultravisor sends before SVM_START and SVM_LOAD."""
        announcement = msgspec.msgpack.encode((RAM_BYTES, N_PAGES))
        socket.send_fds(self.private, [announcement], [self.secure, self.maps[MapKind.SECURE].fd])

    def start(self, *, secure: bool = False) -> None:
        """Begin to run at ENTRY."""
        body = m.StartBody(0, ENTRY, {})
        if secure:
            self.send_secure_memory()
        status = self.ultravisor.ask(m.SVM_START, body) if secure else self.kvm.ask(m.VCPU_START, body)
        assert status == m.Status(HCode.H_SUCCESS)

    def load(self, state: bytes, *, secure: bool = False) -> int:
        """The code of VCPU_LOAD or SVM_LOAD."""
        body = m.LoadProcessorBody(0, state)
        if secure:
            self.send_secure_memory()
        status: m.Status = self.ultravisor.ask(m.SVM_LOAD, body) if secure else self.kvm.ask(m.VCPU_LOAD, body)
        return status.code

    def save(self, *, secure: bool = False) -> bytes:
        """The state by VCPU_SAVE or SVM_FREEZE."""
        saved: m.SavedProcessor = self.ultravisor.ask(m.SVM_FREEZE) if secure else self.kvm.ask(m.VCPU_SAVE)
        assert saved.code == HCode.H_SUCCESS
        return saved.state

    def stands(self) -> bool:
        """Whether the engine is not run, as far as one can see."""
        n_runs = self.engine.n_runs
        time.sleep(NOT_YET_SECONDS)
        return bool(self.engine.n_runs == n_runs)

    def is_in(self, state: RunState) -> bool:
        """What the processor says of itself."""
        return self.processor.state is state

    def close(self) -> None:
        """Stop the thread; it must not have broken."""
        self.processor.quit()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert not self.errors
        self.memory.drop_secure()
        for end in (self.private, self._theirs):
            end.close()
        for fd in (self.secure, self.kvm.fd, self.ultravisor.fd):
            os.close(fd)


def map_of(kind: MapKind) -> SealedMemory:
    """A map that gives every page."""
    file = SealedMemory("pefbox-map", N_PAGES * ENTRY_BYTES)
    entries = PartitionMap(file.buffer)
    for gfn in range(N_PAGES):
        entries.set(gfn, kind, gfn)
    return file


@contextmanager
def rig_of(
    engine: MakeEngine, clock: GuestClock | None = None, kernel: str = "model", *, has_map: bool = True
) -> Iterator[Rig]:
    rig = Rig(engine, clock or WallClock(), kernel, has_map=has_map)
    try:
        yield rig
    finally:
        rig.close()


def played(*exits: Exit, steps: bool = False, job: bool = False) -> MakeEngine:
    return lambda _space, _clock: PlayedEngine(*exits, steps=steps, job=job)


def model(space: AddressSpace, clock: GuestClock) -> ModelEngine:
    return ModelEngine(space, clock)


def bench(space: AddressSpace, clock: GuestClock) -> BenchEngine:
    return BenchEngine(space, clock)


def machine(space: AddressSpace, clock: GuestClock) -> MachineEngine:
    return MachineEngine(space, clock, lambda _word, _address: None)


def state_of(engine: bytes = STATE, **others: Any) -> bytes:  # noqa: ANN401
    """A processor's state, in which `others` are as they are given."""
    fields: dict[str, Any] = {"version": VERSION, "kernel": "model", "secure": False, "now_ns": 5_000_000_000}
    return msgspec.msgpack.encode(ProcessorState(**fields | {"engine": engine} | others))


SECURE_STATE = state_of(b"secure " + STATE, secure=True)


# -- save -------------------------------------------------------------------------------------------------------------


def test_a_running_processor_is_saved_and_stopped_until_kvm_continues_it() -> None:
    with rig_of(played()) as rig:
        rig.start()
        saved = rig.kvm.ask(m.VCPU_SAVE)

        assert saved.code == HCode.H_SUCCESS
        assert msgspec.msgpack.decode(saved.state, type=ProcessorState).engine == STATE
        assert rig.is_in(RunState.STOPPED) and rig.stands()
        assert rig.kvm.ask(m.VCPU_CONTINUE).code == HCode.H_SUCCESS
        assert rig.is_in(RunState.RUNNING) and not rig.stands()


def test_guest_time_stands_still_from_the_save_on() -> None:
    with rig_of(played()) as rig:
        rig.start()
        state = msgspec.msgpack.decode(rig.save(), type=ProcessorState)
        time.sleep(0.01)

        assert rig.clock.now_ns() == state.now_ns


@pytest.mark.parametrize("wait", [Idle(None), Idle(1 << 60), Hypercall(h.H_CEDE.number)])
def test_a_cede_does_not_hold_up_a_save(wait: Exit) -> None:
    with rig_of(played(wait)) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_CEDE.number)

        assert rig.kvm.order(m.VCPU_SAVE).take(SOON_SECONDS).code == HCode.H_SUCCESS
        assert rig.engine.outcomes == ([[HCode.H_SUCCESS]] if isinstance(wait, Hypercall) else [])


@pytest.mark.parametrize("call", [h.H_CEDE, h.H_CONFER, h.H_JOIN])
def test_a_wait_that_a_save_ends_is_over_with_success_and_kvms_own_answer_is_passed_over(call: Any) -> None:  # noqa: ANN401
    with rig_of(played(Hypercall(call.number))) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(call.number)
        rig.save()

        rig.kvm.ask(m.VCPU_CONTINUE)
        rig.kvm.answer(call.number, [HCode.H_PARAMETER])
        eventually(lambda: not rig.kvm.may_have_message())

        assert rig.engine.outcomes == [[HCode.H_SUCCESS]]


def test_an_idle_processor_does_not_wait_while_a_save_is_wanted() -> None:
    """An idle exit behind a call that was finished for the save must not wait for kvm."""
    with rig_of(played(MmioLoad(REGISTER, 4), Idle(None), steps=True)) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_LOGICAL_CI_LOAD.number)
        saving = rig.kvm.order(m.VCPU_SAVE)
        rig.kvm.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])

        assert saving.take(SOON_SECONDS).code == HCode.H_SUCCESS
        assert h.H_CEDE.number not in rig.kvm.calls


def test_a_device_access_is_finished_before_the_processor_is_saved() -> None:
    with rig_of(played(MmioLoad(REGISTER, 4))) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_LOGICAL_CI_LOAD.number)
        saving = rig.kvm.order(m.VCPU_SAVE)
        time.sleep(NOT_YET_SECONDS)
        assert not saving.came and rig.is_in(RunState.RUNNING)

        assert rig.kvm.ask(m.MAP_INVALIDATE, m.InvalidateBody([])).code == HCode.H_SUCCESS
        rig.kvm.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])

        assert saving.take().code == HCode.H_SUCCESS
        assert rig.engine.outcomes == [[HCode.H_SUCCESS, 7]]


@pytest.mark.parametrize("job", [False, True], ids=["kernel", "job of a bench kernel"])
def test_a_device_that_is_busy_is_asked_again_until_the_processor_can_be_saved(job: bool) -> None:
    answers = deque([[HCode.H_BUSY, 0], [HCode.H_BUSY, 0], [HCode.H_SUCCESS, 7]])
    savings: list[Reply] = []
    with rig_of(played(MmioLoad(REGISTER, 4), job=job)) as rig:

        def serve(_number: int, _body: object) -> list[int]:
            if not savings:
                savings.append(rig.kvm.order(m.VCPU_SAVE))
            return list(answers.popleft())

        rig.kvm.host = serve
        rig.start()
        eventually(lambda: bool(savings))

        assert savings[0].take().code == HCode.H_SUCCESS
        assert rig.engine.outcomes == [[HCode.H_SUCCESS, 7]]


def test_a_processor_that_comes_to_no_safe_point_goes_on_as_if_nothing_had_been_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor_module, "_SAVE_NS", 100_000_000)
    with rig_of(played(MmioLoad(REGISTER, 4))) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_LOGICAL_CI_LOAD.number)

        assert rig.kvm.order(m.VCPU_SAVE).take(SOON_SECONDS) == m.SavedProcessor(HCode.H_BUSY)

        rig.kvm.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])
        eventually(lambda: rig.engine.outcomes == [[HCode.H_SUCCESS, 7]])
        assert rig.is_in(RunState.RUNNING) and not rig.stands()
        assert rig.engine.n_saves == 0


def test_a_second_save_is_busy_and_the_first_one_comes() -> None:
    with rig_of(played(MmioLoad(REGISTER, 4))) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_LOGICAL_CI_LOAD.number)
        saving = rig.kvm.order(m.VCPU_SAVE)

        assert rig.kvm.ask(m.VCPU_SAVE) == m.SavedProcessor(HCode.H_BUSY)

        rig.kvm.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])
        assert saving.take().code == HCode.H_SUCCESS


@pytest.mark.parametrize("secure", [False, True])
def test_who_lets_the_processor_run_does_not_wait_for_a_save_any_more(secure: bool) -> None:
    """A save that its caller has given up must not stop the processor when nobody expects it."""
    with rig_of(played(MmioLoad(REGISTER, 4))) as rig:
        end = rig.ultravisor if secure else rig.kvm
        end.host = lambda _number, _body: None
        rig.start(secure=secure)
        end.await_call(h.H_LOGICAL_CI_LOAD.number)
        saving = end.order(m.SVM_FREEZE if secure else m.VCPU_SAVE)

        assert end.ask(m.SVM_THAW if secure else m.VCPU_CONTINUE).code == HCode.H_SUCCESS

        assert saving.take(SOON_SECONDS) == m.SavedProcessor(HCode.H_BUSY)
        end.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])
        eventually(lambda: bool(rig.engine.outcomes))
        assert rig.is_in(RunState.RUNNING) and not rig.stands()


@pytest.mark.parametrize("steps", [False, True])
def test_a_paused_processor_behind_a_call_is_saved_and_stays_paused(steps: bool) -> None:
    between = [Pause.SLICE_END] if steps else []
    with rig_of(played(MmioLoad(REGISTER, 4), *between, MmioLoad(REGISTER, 8), steps=steps)) as rig:
        rig.kvm.host = lambda _number, _body: None
        rig.start()
        rig.kvm.await_call(h.H_LOGICAL_CI_LOAD.number)
        rig.kvm.ask(m.VCPU_STOP)
        rig.kvm.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])
        eventually(lambda: not rig.kvm.may_have_message())
        assert rig.is_in(RunState.STOPPED) and not rig.engine.outcomes

        rig.save()

        assert rig.is_in(RunState.STOPPED)
        assert rig.engine.outcomes == [[HCode.H_SUCCESS, 7]]
        # A slice of any length would never end by a clock that is held.
        assert rig.engine.slices[1:] == ([0] if steps else [])


@pytest.mark.parametrize("order", [m.VCPU_SAVE, m.SVM_FREEZE])
def test_a_processor_that_was_never_started_is_not_saved(order: m.Message[Any, Any]) -> None:
    with rig_of(played()) as rig:
        end = rig.kvm if order is m.VCPU_SAVE else rig.ultravisor

        assert end.ask(order) == m.SavedProcessor(HCode.H_STATE)


def test_the_ultravisor_freezes_no_normal_vm() -> None:
    with rig_of(played()) as rig:
        rig.start()

        assert rig.ultravisor.ask(m.SVM_FREEZE) == m.SavedProcessor(HCode.H_STATE)
        assert rig.ultravisor.ask(m.SVM_THAW) == m.Status(HCode.H_STATE)


def test_a_processor_whose_guest_crashed_is_not_saved() -> None:
    def fail(_slice_ns: int) -> Exit:
        raise OSError("no engine")

    with rig_of(played()) as rig:
        rig.engine.run = fail
        rig.start()
        eventually(lambda: rig.is_in(RunState.CRASHED))

        assert rig.kvm.ask(m.VCPU_SAVE) == m.SavedProcessor(HCode.H_STATE)
        assert rig.kvm.events == [m.GUEST_CRASHED.number]


def test_an_engine_that_cannot_be_saved_goes_on() -> None:
    def refuse() -> bytes:
        raise NotImplementedError

    with rig_of(played()) as rig:
        rig.engine.save = refuse
        rig.start()

        assert rig.kvm.ask(m.VCPU_SAVE) == m.SavedProcessor(HCode.H_FUNCTION)
        assert rig.is_in(RunState.RUNNING) and not rig.stands()


def test_a_state_that_no_message_carries_is_not_sent() -> None:
    with rig_of(played()) as rig:
        rig.engine.save = lambda: bytes(MAX_PROCESSOR_STATE_BYTES)
        rig.start()

        assert rig.kvm.ask(m.VCPU_SAVE) == m.SavedProcessor(HCode.H_FUNCTION)


# -- one runner -------------------------------------------------------------------------------------------------------


def test_s6_nothing_that_kvm_orders_moves_a_frozen_processor() -> None:
    with rig_of(played()) as rig:
        rig.start(secure=True)
        rig.save(secure=True)
        assert rig.is_in(RunState.FROZEN)

        for order in (m.VCPU_CONTINUE, m.VCPU_STOP, m.VCPU_CONTINUE):
            assert rig.kvm.ask(order).code == HCode.H_SUCCESS
            assert rig.is_in(RunState.FROZEN) and rig.stands()
        assert rig.kvm.ask(m.VCPU_START, m.StartBody(0, ENTRY, {})).code == HCode.H_PERMISSION
        assert rig.kvm.ask(m.VCPU_LINE, m.LineBody(0, True)).code == HCode.H_SUCCESS
        assert rig.is_in(RunState.FROZEN) and rig.stands()

        assert rig.ultravisor.ask(m.SVM_THAW).code == HCode.H_SUCCESS
        assert rig.is_in(RunState.RUNNING) and not rig.stands()


def test_s6_kvm_does_not_end_a_freeze_that_is_under_way() -> None:
    with rig_of(played(MmioLoad(REGISTER, 4))) as rig:
        rig.ultravisor.host = lambda _number, _body: None
        rig.start(secure=True)
        rig.ultravisor.await_call(h.H_LOGICAL_CI_LOAD.number)
        saving = rig.ultravisor.order(m.SVM_FREEZE)

        for order in (m.VCPU_STOP, m.VCPU_CONTINUE):
            assert rig.kvm.ask(order).code == HCode.H_SUCCESS
        rig.ultravisor.answer(h.H_LOGICAL_CI_LOAD.number, [HCode.H_SUCCESS, 7])

        assert saving.take().code == HCode.H_SUCCESS
        assert rig.is_in(RunState.FROZEN) and rig.stands()


@pytest.mark.parametrize("before", [False, True], ids=["stopped while frozen", "stopped before"])
def test_a_thaw_lets_no_processor_run_that_kvm_has_stopped(before: bool) -> None:
    with rig_of(played()) as rig:
        rig.start(secure=True)
        if before:
            rig.kvm.ask(m.VCPU_STOP)
        rig.save(secure=True)
        if not before:
            rig.kvm.ask(m.VCPU_STOP)
        rig.ultravisor.ask(m.SVM_THAW)

        assert rig.is_in(RunState.STOPPED) and rig.stands()
        rig.kvm.ask(m.VCPU_CONTINUE)
        assert rig.is_in(RunState.RUNNING) and not rig.stands()


def test_a_frozen_processor_serves_invalidations_and_can_be_asked_once_more() -> None:
    with rig_of(played()) as rig:
        rig.start(secure=True)
        first = rig.save(secure=True)
        n_flushes = rig.engine.n_flushes

        assert rig.ultravisor.ask(m.MAP_INVALIDATE, m.InvalidateBody([])).code == HCode.H_SUCCESS
        assert rig.engine.n_flushes == n_flushes + 1
        assert rig.save(secure=True) == first
        assert rig.is_in(RunState.FROZEN)


def test_the_end_of_the_secure_vm_and_a_start_end_a_freeze() -> None:
    with rig_of(played()) as rig:
        rig.start(secure=True)
        rig.save(secure=True)
        rig.ultravisor.ask(m.SVM_ENDED, m.Empty())
        assert rig.is_in(RunState.OFF)

        rig.give_map()
        rig.start()

        assert rig.is_in(RunState.RUNNING) and not rig.stands()


@pytest.mark.parametrize("secure", [False, True])
def test_kvm_neither_saves_nor_loads_a_secure_vm(secure: bool) -> None:
    with rig_of(played()) as rig:
        rig.start(secure=True)
        if secure:
            rig.save(secure=True)

        assert rig.kvm.ask(m.VCPU_SAVE) == m.SavedProcessor(HCode.H_PERMISSION)
        assert rig.load(state_of()) == HCode.H_PERMISSION
        assert rig.engine.n_saves == int(secure)


def test_s1_a_save_that_kvm_wanted_of_the_normal_vm_gives_nothing_of_the_secure_one() -> None:
    with rig_of(played(Ultracall(UV_ESM.number, (0, 0)))) as rig:
        rig.ultravisor.host = lambda _number, _body: None
        rig.start()
        rig.ultravisor.await_call(UV_ESM.number)
        saving = rig.kvm.order(m.VCPU_SAVE)
        time.sleep(NOT_YET_SECONDS)

        rig.start(secure=True)

        assert saving.take() == m.SavedProcessor(HCode.H_STATE)
        assert rig.is_in(RunState.RUNNING)
        assert rig.engine.n_saves == 0


def test_a_freeze_ends_with_the_secure_vm() -> None:
    with rig_of(played(MmioLoad(REGISTER, 4))) as rig:
        rig.ultravisor.host = lambda _number, _body: None
        rig.start(secure=True)
        rig.ultravisor.await_call(h.H_LOGICAL_CI_LOAD.number)
        saving = rig.ultravisor.order(m.SVM_FREEZE)

        rig.ultravisor.ask(m.SVM_ENDED, m.Empty())

        assert saving.take() == m.SavedProcessor(HCode.H_STATE)
        assert rig.is_in(RunState.OFF)


# -- load -------------------------------------------------------------------------------------------------------------


def test_a_loaded_processor_of_a_normal_vm_runs_once_kvm_continues_it() -> None:
    with rig_of(played()) as rig:
        assert rig.load(state_of()) == HCode.H_SUCCESS
        assert rig.is_in(RunState.STOPPED) and rig.stands()
        assert rig.clock.now_ns() == 5_000_000_000

        rig.kvm.ask(m.VCPU_CONTINUE)

        assert rig.is_in(RunState.RUNNING) and not rig.stands()
        assert rig.clock.now_ns() > 5_000_000_000


def test_a_loaded_processor_of_a_secure_vm_runs_once_the_ultravisor_thaws_it() -> None:
    with rig_of(played()) as rig:
        assert rig.load(SECURE_STATE, secure=True) == HCode.H_SUCCESS
        rig.kvm.ask(m.VCPU_CONTINUE)
        assert rig.is_in(RunState.FROZEN) and rig.stands()
        assert rig.processor.secure and rig.space.secure is not None

        rig.ultravisor.ask(m.SVM_THAW)

        assert rig.is_in(RunState.RUNNING) and not rig.stands()


def test_a_secure_vm_that_kvm_stopped_before_it_arrived_arrives_stopped() -> None:
    with rig_of(played()) as rig:
        rig.kvm.ask(m.VCPU_STOP)
        rig.load(SECURE_STATE, secure=True)

        rig.ultravisor.ask(m.SVM_THAW)

        assert rig.is_in(RunState.STOPPED) and rig.stands()


def test_a_secure_vm_arrives_without_kvms_map_and_a_normal_one_waits_for_it() -> None:
    with rig_of(played(), has_map=False) as rig:
        assert rig.load(state_of()) == HCode.H_BUSY
        assert rig.is_in(RunState.OFF)

        assert rig.load(SECURE_STATE, secure=True) == HCode.H_SUCCESS


@pytest.mark.parametrize("secure", [False, True])
def test_the_interrupt_line_is_what_kvm_said_last(secure: bool) -> None:
    with rig_of(played()) as rig:
        rig.kvm.ask(m.VCPU_LINE, m.LineBody(0, True))
        rig.load(SECURE_STATE if secure else state_of(), secure=secure)
        rig.kvm.ask(m.VCPU_LINE, m.LineBody(0, False))

        assert rig.engine.lines == [True, True, False]


def test_a_processor_that_was_started_is_not_loaded() -> None:
    with rig_of(played()) as rig:
        rig.start()
        assert rig.load(state_of()) == HCode.H_STATE
        assert rig.load(SECURE_STATE, secure=True) == HCode.H_STATE
        assert rig.is_in(RunState.RUNNING) and not rig.processor.secure

        # The memory that came with the order that was refused is not there for the next one.
        rig.ultravisor.ask(m.SVM_ENDED, m.Empty())
        assert rig.ultravisor.ask(m.SVM_START, m.StartBody(0, ENTRY, {})).code == HCode.H_NO_MEM


BAD_STATES = {
    "empty": b"",
    "not MessagePack": b"\xc1",
    "a map": msgspec.msgpack.encode({"version": VERSION}),
    "of another version": state_of(version=VERSION + 1),
    "of another kernel": state_of(kernel="machine"),
    "of the other MSR.S": SECURE_STATE,
    "of an engine with the other MSR.S": state_of(b"secure " + STATE),
    "of another engine": state_of(b"something else"),
    "of a negative time": msgspec.msgpack.encode([VERSION, "model", False, -1, STATE]),
    "of a time without end": msgspec.msgpack.encode([VERSION, "model", False, 1 << 63, STATE]),
    "longer": msgspec.msgpack.encode([VERSION, "model", False, 5, STATE, 0]),
    "cut": state_of()[:-1],
    "no text": state_of().replace(b"model", b"\xff\xfe\xff\xfe\xff"),
}


@pytest.mark.parametrize("state", BAD_STATES.values(), ids=BAD_STATES)
def test_s5_a_bad_state_of_a_normal_vm_is_refused_and_a_good_one_taken_after_it(state: bytes) -> None:
    with rig_of(played()) as rig:
        before_ns = rig.clock.now_ns()

        assert rig.load(state) == HCode.H_PARAMETER

        assert rig.is_in(RunState.OFF) and rig.processor.refused == 1
        assert before_ns <= rig.clock.now_ns() < before_ns + 2_000_000_000
        assert rig.load(state_of()) == HCode.H_SUCCESS


@pytest.mark.parametrize("state", [b"", state_of(), state_of(secure=True)], ids=["empty", "normal", "engine's MSR.S"])
def test_s5_a_bad_state_of_a_secure_vm_is_refused_and_its_memory_dropped(state: bytes) -> None:
    with rig_of(played()) as rig:
        assert rig.load(state, secure=True) == HCode.H_PARAMETER

        assert rig.is_in(RunState.OFF) and not rig.processor.secure
        assert rig.space.secure is None and rig.space.words is None
        assert rig.load(SECURE_STATE, secure=True) == HCode.H_SUCCESS


def test_secure_memory_that_did_not_come_is_missed() -> None:
    with rig_of(played()) as rig:
        body = m.LoadProcessorBody(0, SECURE_STATE)

        assert rig.ultravisor.ask(m.SVM_LOAD, body).code == HCode.H_NO_MEM
        assert rig.is_in(RunState.OFF)


@pytest.mark.parametrize(("make", "kernel"), [(model, "model"), (machine, "machine")], ids=["model", "machine"])
def test_s5_no_state_that_was_tampered_with_ends_the_processor(make: MakeEngine, kernel: str) -> None:
    chance = random.Random(SEED)
    with rig_of(make, InstructionClock(), kernel) as rig:
        if kernel == "model":
            good = kernel_state(rig, "help")
        else:
            put(rig, ENTRY, asm.b(0))
            rig.start()
            good = rig.save()
    with rig_of(make, InstructionClock(), kernel) as rig:
        outcomes = [rig.processor._load(altered(good, chance), secure=False) for _ in range(500)]

        assert False in outcomes
        assert rig.load(good) == HCode.H_SUCCESS


def altered(state: bytes, chance: random.Random) -> bytes:
    data = bytearray(state)
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])


# -- the model kernel -------------------------------------------------------------------------------------------------

N_CALLS = 400
CONSOLE_SOURCE = 0x1000


class Terminal:
    """kvm, as far as a kernel at its prompt needs it. `at` maps numbers of null calls to what is done meanwhile."""

    def __init__(self) -> None:
        self.text = ""
        self.n_calls = 0
        self.at: dict[int, Callable[[], object]] = {}

    def serve(self, number: int, body: Any) -> list[int] | None:  # noqa: ANN401
        if number == h.H_PUT_TERM_CHAR.number:
            self.text += b"".join(word.to_bytes(8, "big") for word in body[3:5])[: body[2]].decode()
        elif number == h.H_GET_TERM_CHAR.number:
            return [HCode.H_SUCCESS, 0, 0, 0]
        elif number == h.H_CEDE.number:
            return None
        elif number == h.H_CPPR.number:
            self.n_calls += 1
            self.at.get(self.n_calls, lambda: None)()
        return [HCode.H_SUCCESS, 0]

    @property
    def done(self) -> bool:
        return self.text.endswith("> ")


def kernel_state(rig: Rig, *lines: str) -> bytes:
    """A kernel that is up and obeys `lines`; its tables are in the RAM of `rig`."""
    state = KernelState(phase=Phase.RUN, up=True)
    state.machine.memory_bytes, state.machine.console_irq = RAM_BYTES, CONSOLE_SOURCE
    state.console.lines = list(lines)
    assert rig.memory.use_normal()
    Parts(rig.space, InstructionClock(), state).set_up_memory()
    return state_of(encode_state(state))


def obey(rig: Rig, terminal: Terminal) -> None:
    """Load the kernel that times N_CALLS null calls, and let it run."""
    rig.kvm.host = terminal.serve
    assert rig.load(kernel_state(rig, f"null {N_CALLS}")) == HCode.H_SUCCESS
    rig.kvm.ask(m.VCPU_CONTINUE)


def move(source: Rig, destination: Rig, state: bytes) -> None:
    """Take RAM and processor to another process, and let it run there."""
    destination.memory.normal[:] = source.memory.normal
    assert destination.load(state) == HCode.H_SUCCESS
    destination.kvm.ask(m.VCPU_CONTINUE)


def straight_run() -> str:
    terminal = Terminal()
    with rig_of(model, InstructionClock()) as rig:
        obey(rig, terminal)
        eventually(lambda: terminal.done)
    return terminal.text


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped within a step"])
def test_a_model_kernel_that_is_saved_between_its_calls_comes_to_the_same_end_elsewhere(stopped: bool) -> None:
    terminal = Terminal()
    replies: list[Reply] = []
    with rig_of(model, InstructionClock()) as source, rig_of(model, InstructionClock()) as destination:
        if stopped:
            terminal.at[130] = lambda: source.kvm.order(m.VCPU_STOP)
        else:
            terminal.at[130] = lambda: replies.append(source.kvm.order(m.VCPU_SAVE))
        obey(source, terminal)
        if stopped:
            eventually(lambda: source.is_in(RunState.STOPPED))
            replies.append(source.kvm.order(m.VCPU_SAVE))
        eventually(lambda: bool(replies))
        saved = replies[0].take()
        assert saved.code == HCode.H_SUCCESS and source.is_in(RunState.STOPPED)
        n_calls = terminal.n_calls
        assert 130 <= n_calls <= 150, "the step that made the call was finished, and no other one begun"

        destination.kvm.host = terminal.serve
        move(source, destination, saved.state)
        eventually(lambda: terminal.done)

        assert terminal.n_calls == N_CALLS
    assert terminal.text == straight_run()


def test_a_stopped_model_kernel_comes_to_its_safe_point_although_its_time_stands_still() -> None:
    terminal = Terminal()
    with rig_of(model, WallClock()) as rig:
        terminal.at[10] = lambda: rig.kvm.order(m.VCPU_STOP)
        obey(rig, terminal)
        eventually(lambda: rig.is_in(RunState.STOPPED))
        now_ns = rig.clock.now_ns()

        rig.save()

        assert rig.clock.now_ns() == now_ns


def test_a_model_kernel_that_waits_in_a_cede_is_woken_by_the_interrupt_elsewhere() -> None:
    terminal = Terminal()
    with rig_of(model) as source, rig_of(model) as destination:
        source.kvm.host = destination.kvm.host = terminal.serve
        source.load(kernel_state(source))
        source.kvm.ask(m.VCPU_CONTINUE)
        source.kvm.await_call(h.H_CEDE.number)
        saved = source.kvm.order(m.VCPU_SAVE).take(SOON_SECONDS)

        move(source, destination, saved.state)
        destination.kvm.await_call(h.H_CEDE.number)
        assert h.H_XIRR.number not in destination.kvm.calls
        destination.kvm.ask(m.VCPU_LINE, m.LineBody(0, True))
        # An early wake: the kernel that is not told of an interrupt waits again.
        source.kvm.ask(m.VCPU_CONTINUE)
        source.kvm.await_call(h.H_CEDE.number, 2)


def test_a_bench_kernel_that_calls_without_end_is_saved_and_its_job_stays_behind() -> None:
    terminal = Terminal()
    with rig_of(bench, WallClock(), "bench") as rig:
        rig.kvm.host = terminal.serve
        kernel = msgspec.msgpack.decode(kernel_state(rig), type=ProcessorState).engine
        assert rig.load(state_of(kernel, kernel="bench")) == HCode.H_SUCCESS
        outcome: list[Any] = []
        rig.engine.take(rig.engine.job("hypercalls", {"n": 20_000}, outcome.append))
        rig.kvm.ask(m.VCPU_CONTINUE)
        rig.kvm.await_call(h.H_IPOLL.number, 100)

        state = rig.save()

        assert not outcome
        rig.kvm.ask(m.VCPU_CONTINUE)
        eventually(lambda: bool(outcome))
    with rig_of(bench, WallClock(), "bench") as other:
        assert other.load(state) == HCode.H_SUCCESS
        other.kvm.host = terminal.serve
        other.kvm.ask(m.VCPU_CONTINUE)
        other.kvm.await_call(h.H_CEDE.number)
        assert h.H_IPOLL.number not in other.kvm.calls


# -- the machine engine -----------------------------------------------------------------------------------------------

DONE = asm.SC1
DECREMENTER_US = 200_000
COUNT = (
    *asm.load64(R4, Msr.SF | Msr.ME | Msr.EE),
    *asm.load64(R5, DECREMENTER_US * TICKS_PER_US),
    asm.mfspr(R8, Spr.TBL),
    asm.mtspr(Spr.DEC, R5),
    asm.mtmsrd(R4),
)


def put(rig: Rig, gpa: int, *words: int) -> None:
    code = asm.program(*words)
    rig.memory.normal[gpa : gpa + len(code)] = code


FIRED = 0x7FFC


def put_program(rig: Rig, *words: int) -> None:
    """Set the decrementer, then `words`; its handler reads the time base and makes a call of its own."""
    put(rig, ENTRY, *COUNT, *words)
    put(rig, Vector.DECREMENTER, asm.mfspr(R9, Spr.TBL), asm.li(R3, FIRED), DONE, asm.b(0))


def saves_at(end: PlayedEnd, call: int, order: m.Message[Any, Any]) -> list[Reply]:
    """The first `call` is met with an order to save; the reply to it will be here. A cede stays open."""
    replies: list[Reply] = []

    def serve(number: int, _body: object) -> list[int] | None:
        if number == call and not replies:
            replies.append(end.order(order))
        return None if number == h.H_CEDE.number else [HCode.H_SUCCESS]

    end.host = serve
    return replies


@pytest.mark.parametrize("clock", [WallClock, InstructionClock])
@pytest.mark.parametrize("secure", [False, True])
def test_time_goes_on_and_a_pending_decrementer_fires_on_the_machine_where_a_loop_arrives(
    clock: Callable[[], GuestClock], secure: bool
) -> None:
    with rig_of(machine, clock(), "machine") as source, rig_of(machine, clock(), "machine") as destination:
        end = destination.ultravisor if secure else destination.kvm
        order = m.SVM_FREEZE if secure else m.VCPU_SAVE
        replies = saves_at(source.ultravisor if secure else source.kvm, 0x7FF8, order)
        # The other host has been up for longer, or for less time.
        destination.clock.skip_to(77_000_000)
        put_program(source, asm.li(R3, 0x7FF8), asm.SC1, asm.addi(R3, R3, 1), asm.b(-1))
        if secure:
            os.pwrite(source.secure, bytes(source.memory.normal), 0)
        source.start(secure=secure)
        eventually(lambda: bool(replies))
        state = replies[0].take().state
        ticks = source.engine._time.ticks()
        if secure:
            os.pwrite(destination.secure, os.pread(source.secure, RAM_BYTES, 0), 0)
        else:
            destination.memory.normal[:] = source.memory.normal
        time.sleep(0.02)

        assert destination.load(state, secure=secure) == HCode.H_SUCCESS
        assert destination.engine._time.ticks() == ticks
        end.ask(m.SVM_THAW if secure else m.VCPU_CONTINUE)
        end.await_call(FIRED)

        gpr = destination.engine._registers.gpr
        assert gpr[R8] + DECREMENTER_US * TICKS_PER_US <= gpr[R9] < gpr[R8] + 40 * DECREMENTER_US * TICKS_PER_US
        assert destination.engine.secure is secure


def test_a_cede_that_a_save_ended_ends_by_the_decrementer_elsewhere() -> None:
    with rig_of(machine, WallClock(), "machine") as source, rig_of(machine, WallClock(), "machine") as destination:
        replies = saves_at(source.kvm, h.H_CEDE.number, m.VCPU_SAVE)
        destination.kvm.host = lambda number, _body: None if number == h.H_CEDE.number else [HCode.H_SUCCESS]
        put_program(source, asm.li(R3, h.H_CEDE.number), asm.SC1, asm.b(-2))
        source.start()
        eventually(lambda: bool(replies))
        saved = replies[0].take(SOON_SECONDS)
        saved_ticks = source.engine._time.ticks()

        move(source, destination, saved.state)
        destination.kvm.await_call(FIRED)

        gpr = destination.engine._registers.gpr
        assert gpr[R9] >= max(saved_ticks, gpr[R8] + DECREMENTER_US * TICKS_PER_US)
        assert source.is_in(RunState.STOPPED) and FIRED not in source.kvm.calls


def test_a_machine_that_calls_without_end_is_saved_behind_its_call() -> None:
    with rig_of(machine, WallClock(), "machine") as rig:
        put(rig, ENTRY, asm.addi(R9, R9, 1), asm.li(R3, 0x7FFC), asm.SC1, asm.b(-3))
        rig.start()
        rig.kvm.await_call(0x7FFC, 100)

        rig.save()

        assert not rig.kvm.open
        assert rig.engine._registers.gpr[R9] == len(rig.kvm.calls)


def test_counts_of_instructions_and_calls_go_on_where_a_machine_arrives() -> None:
    def run(*, moved: bool) -> tuple[int, int, list[int]]:
        rig = MachineRig()
        rig.begin(*[asm.li(R3, 0x7FFC), asm.SC1] * 3, asm.addi(R9, R9, 1), asm.SC1, asm.b(0))
        for _ in range(2):
            rig.until_exit()
            rig.engine.resume([0])
        if moved:
            other = MachineRig()
            other.ram[:] = rig.ram[:]
            saved = rig.engine.save()
            other.engine.load(saved)
            assert other.engine.save() == saved and other.engine.trail == rig.engine.trail
            other.clock.move_to(rig.clock.now_ns())
            rig = other
        rig.until_exit()
        trail = rig.engine.trail
        assert trail is not None
        return rig.n_instructions, int(trail.partition(":")[0]), rig.gpr

    assert run(moved=True) == run(moved=False)


def test_code_that_the_engine_ran_before_is_not_run_where_another_machine_arrives() -> None:
    """Translations, code pages and both TLBs are those of what is loaded."""
    source, used = MachineRig(), MachineRig()
    for rig, value in ((source, 1), (used, 2)):
        rig.begin(asm.addi(R9, R9, value), asm.b(-1), secure=True)
        rig.engine.run(SLICE_NS)
    used.ram[:] = source.ram[:]

    used.engine.load(source.engine.save())
    before = used.gpr[R9]
    used.engine.run(SLICE_NS)
    source.engine.run(SLICE_NS)

    assert used.gpr[R9] == source.gpr[R9] > before


def test_every_state_of_both_engines_fits() -> None:
    assert max(MAX_MODEL_BYTES, MAX_MACHINE_BYTES) + 256 <= MAX_PROCESSOR_STATE_BYTES
    rig = MachineRig()
    rig.begin(asm.b(0))
    registers = rig.engine._registers
    for number in range(len(registers.spr)):
        registers.spr[number] = (1 << 64) - 1
    for number in range(len(registers.gpr)):
        registers.gpr[number] = (1 << 64) - 1
    registers._vsrs.raw = b"\xff" * len(registers._vsrs.raw)

    assert len(rig.engine.save()) <= MAX_MACHINE_BYTES


# -- clocks, links, records -------------------------------------------------------------------------------------------


def test_a_wall_clock_goes_on_from_where_it_was_moved() -> None:
    clock = WallClock()
    clock.move_to(1_000_000_000_000)
    assert 0 <= clock.now_ns() - 1_000_000_000_000 < 1_000_000_000

    clock.hold()
    clock.move_to(7)
    assert clock.now_ns() == 7
    clock.go_on()
    assert 7 <= clock.now_ns() < 1_000_000_000


def test_an_instruction_clock_goes_on_from_where_it_was_moved() -> None:
    clock = InstructionClock()
    clock.charge(500)
    clock.move_to(7)
    clock.charge(3)

    assert clock.now_ns() == 10


def test_the_processor_serves_every_order_that_its_links_carry() -> None:
    assert KVM_GUEST.downward | ULTRAVISOR_GUEST.downward == _HANDLERS.keys() | _SAVES | HOST_HANDLERS.keys()


def test_an_ultracall_is_finished_before_a_secure_vm_is_frozen() -> None:
    with rig_of(played(Ultracall(UV_ESM.number, (0, 0)))) as rig:
        rig.ultravisor.host = lambda _number, _body: None
        rig.start(secure=True)
        rig.ultravisor.await_call(UV_ESM.number)
        saving = rig.ultravisor.order(m.SVM_FREEZE)
        time.sleep(NOT_YET_SECONDS)
        assert not saving.came

        rig.ultravisor.answer(UV_ESM.number, [UCode.U_PERMISSION])

        assert saving.take().code == HCode.H_SUCCESS
        assert rig.engine.outcomes == [[UCode.U_PERMISSION]]
