"""The processor's loop against played links: what it does with the answers of kvm."""

from __future__ import annotations

import os
from collections import deque
from typing import Any, cast

import msgspec
import pytest
import structlog

from protocol import messages as m
from protocol.codes import HCode
from protocol.hcalls import H_CEDE, H_XIRR
from protocol.wire import Envelope, MessageKind
from services.guest.clock import InstructionClock
from services.guest.engine import Engine
from services.guest.exits import Exit, Hypercall, MmioLoad, MmioStore, Pause
from services.guest.link_end import LinkEnd
from services.guest.processor import Processor
from services.guest.run_state import RunState
from services.guest.vm_memory import GuestVmMemory

REGISTER = 1 << 45
BUSY_TIMES = 3


class PlayedEnd:
    """A link whose peer gives `answers` in turn, and has a number of replies taken from it."""

    peer = "alpha/kvm"
    peer_state = "up"
    watch = None

    def __init__(self, answers: list[list[int]]) -> None:
        self.fd = os.eventfd(0)
        self.calls: list[tuple[int, list[int]]] = []
        self.inbox: deque[Envelope] = deque()
        self.replies: list[Any] = []
        self._answers = deque(answers)

    def may_have_message(self) -> bool:
        return bool(self.inbox)

    def receive(self) -> Envelope | None:
        return self.inbox.popleft() if self.inbox else None

    def send_call(self, number: int, body: list[int], _cause: int) -> int:
        self.calls.append((number, body))
        answer = msgspec.Raw(msgspec.msgpack.encode(self._answers.popleft()))
        self.inbox.append(Envelope(1, MessageKind.REPLY, number, len(self.calls), 0, answer))
        return len(self.calls)

    def reply(self, _envelope: Envelope, body: Any) -> None:  # noqa: ANN401
        self.replies.append(body)


class PlayedEngine:
    """Leaves once with `exit_`; `outcomes` are what it is resumed with, and the first one ends the processor."""

    ticks = False

    def __init__(self, exit_: Exit) -> None:
        self.processor: Processor | None = None
        self.outcomes: list[list[int]] = []
        self.n_flushes = 0
        self._exits = deque([exit_])

    def run(self, _slice_ns: int) -> Exit:
        return self._exits.popleft() if self._exits else Pause.SLICE_END

    def resume(self, result: list[int]) -> None:
        assert self.processor is not None
        self.outcomes.append(result)
        self.processor._leave()

    def flush_translations(self) -> None:
        self.n_flushes += 1


def played(exit_: Exit, kvm: PlayedEnd) -> tuple[Processor, PlayedEngine]:
    """A running processor of a normal VM."""
    engine = PlayedEngine(exit_)
    ends = (cast(LinkEnd, kvm), cast(LinkEnd, PlayedEnd([])))
    memory = cast(GuestVmMemory, type("Memory", (), {"lpid": 1}))
    processor = Processor(cast(Engine, engine), memory, *ends, InstructionClock(), structlog.get_logger(), "model")
    engine.processor = processor
    processor._become(RunState.RUNNING)
    return processor, engine


@pytest.mark.parametrize(
    ("exit_", "answer"),
    [(MmioLoad(REGISTER, 4), [HCode.H_SUCCESS, 7]), (MmioStore(REGISTER, 2, 1), [HCode.H_SUCCESS])],
)
def test_l1_a_device_access_waits_for_a_qemu_that_only_stands_still(exit_: Exit, answer: list[int]) -> None:
    """An instruction has no error that says "again": a load would give all ones, a kick of a queue would be lost."""
    kvm = PlayedEnd([[HCode.H_BUSY, 0]] * BUSY_TIMES + [answer])
    processor, engine = played(exit_, kvm)

    processor._loop()

    assert engine.outcomes == [answer]
    assert len(kvm.calls) == BUSY_TIMES + 1 and len({number for number, _ in kvm.calls}) == 1


def test_a_hypercall_that_is_busy_is_the_guests_to_repeat() -> None:
    kvm = PlayedEnd([[HCode.H_BUSY]])
    processor, engine = played(Hypercall(0x54, (0,)), kvm)

    processor._loop()

    assert engine.outcomes == [[HCode.H_BUSY]]


class HeldUpEnd(PlayedEnd):
    """A link whose peer stands still, and goes on or dies when the processor looks for something to do."""

    peer_state = "stopped"

    def __init__(self, answers: list[list[int]], becomes: str) -> None:
        super().__init__(answers)
        self.processor: Processor | None = None
        self._late: deque[Envelope] = deque()
        self._becomes = becomes

    def send_call(self, number: int, body: list[int], _cause: int) -> int:
        correlation = super().send_call(number, body, _cause)
        self._late.append(self.inbox.pop())
        assert self.processor is not None
        self.processor.post(self._changes)
        return correlation

    def _changes(self) -> None:
        assert self.processor is not None
        self.processor.peer_is(cast(LinkEnd, self), self._becomes)
        if self._becomes == "running":
            self.inbox.extend(self._late)


def held_up(exit_: Exit, answers: list[list[int]], becomes: str) -> tuple[HeldUpEnd, PlayedEngine]:
    """What came of an exit while kvm stands still, and then is `becomes`."""
    kvm = HeldUpEnd(answers, becomes)
    kvm.processor, engine = played(exit_, kvm)
    kvm.processor._loop()
    return kvm, engine


def test_the_result_of_a_hypercall_is_not_lost_while_its_peer_is_held_up() -> None:
    """kvm has taken the interrupt for it: a second H_XIRR would find none."""
    kvm, engine = held_up(Hypercall(H_XIRR.number, (0,)), [[HCode.H_SUCCESS, 0x1000]], "running")

    assert engine.outcomes == [[HCode.H_SUCCESS, 0x1000]]
    assert len(kvm.calls) == 1


def test_l1_a_call_to_a_peer_that_is_held_up_ends_with_its_death() -> None:
    _, engine = held_up(Hypercall(H_XIRR.number, (0,)), [[HCode.H_SUCCESS, 0x1000]], "failed")

    assert engine.outcomes == [[HCode.H_HARDWARE]]


def test_a_wait_of_the_guest_is_not_begun_with_a_peer_that_is_held_up() -> None:
    kvm, engine = held_up(Hypercall(H_CEDE.number), [], "running")

    assert engine.outcomes == [[HCode.H_BUSY]]
    assert not kvm.calls


def test_what_kvm_orders_is_served_while_a_device_access_waits() -> None:
    order = msgspec.Raw(msgspec.msgpack.encode(m.InvalidateBody([])))
    kvm = PlayedEnd([[HCode.H_BUSY, 0], [HCode.H_SUCCESS, 7]])
    kvm.inbox.append(Envelope(1, MessageKind.CALL, m.MAP_INVALIDATE.number, 1, 0, order))
    processor, engine = played(MmioLoad(REGISTER, 4), kvm)

    processor._loop()

    assert engine.n_flushes == 1 and kvm.replies == [m.Status(HCode.H_SUCCESS)]
