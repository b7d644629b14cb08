"""Steps of the model kernel that end in Busy are run again from their beginning, and come to the same end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from protocol.codes import HCode, RtasStatus
from protocol.hcalls import H_EOI, H_PUT_TCE, H_RTAS, H_XIRR
from services.guest.exits import Hypercall, MmioLoad, MmioStore, Ultracall
from services.guest.model.cpu import IMMEDIATE_TRIES, RTAS_ARGS_OFFSET, Busy, NoDevice
from services.guest.model.kernel import Kernel
from services.guest.model.parts import Parts
from services.guest.model.state import KernelState, Mapping, Phase
from services.guest.model.virtio_pci import MAX_RESET_ROUNDS, RESET_POLLS
from services.guest.model.wide_window import WideWindows
from shared.virtio_pci import CommonCfg
from tests.unit.model_cpu import RAM_BYTES, StillClock, make_cpu

BLK_COMMON, RNG_COMMON = 1 << 40, 2 << 40
RUNNING = 15
DDW = {"ibm,query-pe-dma-window": 1, "ibm,create-pe-dma-window": 2, "ibm,remove-pe-dma-window": 3,
       "ibm,reset-pe-dma-window": 4, "ibm,write-pci-config": 5}  # fmt: skip


class Machine:
    """A kernel's parts, and a host for their exits. `busy` hypercalls or RTAS services are busy so many more times."""

    def __init__(self) -> None:
        self.state = KernelState(phase=Phase.RUN, up=True)
        self.memory = make_cpu().memory
        self.parts = Parts(self.memory, StillClock(), self.state)
        self.state.blk.pci.common, self.state.rng.pci.common = BLK_COMMON, RNG_COMMON
        self.state.machine.memory_bytes = RAM_BYTES
        self.state.machine.rtas_tokens = DDW
        self.resets: dict[int, int] = {}
        """Polls after which the device with this common configuration has finished its reset."""
        self.busy: dict[int | str, int] = {}
        self.hcalls: list[int] = []
        self.services: list[str] = []
        self.created = [RtasStatus.SUCCESS, 0x80000000, 0, 0]
        self.query = [RtasStatus.SUCCESS, 1, 1 << 24, 1 << 1, 0]

    def run(self, step: Generator[Any, list[int], Any]) -> None:
        """Run a step to its end."""
        result = None
        try:
            while True:
                exit_ = next(step) if result is None else step.send(result)
                result = self.answer(exit_)
        except StopIteration:
            return

    def run_again(self, make_step: Callable[[], Generator[Any, list[int], Any]]) -> int:
        """Run a step until it ends without Busy; how often it was busy."""
        for n_busy in range(2 * MAX_RESET_ROUNDS):
            try:
                self.run(make_step())
            except Busy:
                continue
            return n_busy
        raise AssertionError("the step never ends")

    def answer(self, exit_: object) -> list[int]:
        match exit_:
            case Hypercall() if exit_.number == H_RTAS.number:
                return self.rtas()
            case Hypercall() | Ultracall():
                if self.is_busy(exit_.number):
                    return [HCode.H_BUSY]
                self.hcalls.append(exit_.number)
                return [HCode.H_SUCCESS, 5]
            case MmioLoad():
                return [HCode.H_SUCCESS, self.status(exit_.gpa - CommonCfg.DEVICE_STATUS.offset)]
            case MmioStore():
                return [HCode.H_SUCCESS]
        return []

    def status(self, common: int) -> int:
        left = self.resets.get(common, 0)
        self.resets[common] = max(0, left - 1)
        return RUNNING if left else 0

    def is_busy(self, what: int | str) -> bool:
        left = self.busy.get(what, 0)
        self.busy[what] = max(0, left - 1)
        return left > 0

    def rtas(self) -> list[int]:
        block = self.state.machine.rtas_base + RTAS_ARGS_OFFSET
        token, n_args, n_rets = (int.from_bytes(self.memory.load(block + at, 4), "big") for at in (0, 4, 8))
        name = next(name for name, number in DDW.items() if number == token)
        rets = {"ibm,query-pe-dma-window": self.query, "ibm,create-pe-dma-window": self.created}.get(name, [0])
        if self.is_busy(name):
            rets = [RtasStatus.BUSY, *[0] * (n_rets - 1)]
        else:
            self.services.append(name)
        data = b"".join(int(word & 0xFFFFFFFF).to_bytes(4, "big") for word in rets)
        self.memory.store(block + 12 + 4 * n_args, data)
        return [HCode.H_SUCCESS]


# -- quiet devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [True, False], ids=["ready", "given up"])
@pytest.mark.parametrize("common", [BLK_COMMON, RNG_COMMON])
def test_devices_are_quiet_only_once_their_resets_are_complete(common: int, ready: bool) -> None:
    machine = Machine()
    state = machine.state
    state.blk.present = state.rng.present = True
    state.blk.ready = state.rng.ready = ready
    machine.resets[common] = 3 * RESET_POLLS

    assert machine.run_again(machine.parts.quiesce) == 3

    assert machine.resets[common] == 0
    assert not state.blk.ready
    assert not state.rng.ready


def test_an_edu_is_quiet_only_once_it_has_no_mastery_of_the_bus() -> None:
    machine = Machine()
    edu = machine.parts.edus[0]
    edu.state.present = edu.state.ready = True
    machine.busy["ibm,write-pci-config"] = IMMEDIATE_TRIES + 1

    assert machine.run_again(machine.parts.quiesce) == 1

    assert machine.services == ["ibm,write-pci-config"]
    assert not edu.state.ready


def test_a_device_that_never_finishes_its_reset_is_given_up_by_name() -> None:
    machine = Machine()
    state = machine.state
    state.blk.present = state.blk.ready = state.rng.present = state.rng.ready = True
    machine.resets[RNG_COMMON] = 1 << 20

    machine.run_again(machine.parts.quiesce)

    assert not state.blk.ready
    assert not state.rng.ready
    said = b"pefbox: rng: the device does not finish its reset"
    assert state.console.out.count(said) == 1
    machine.run_again(machine.parts.quiesce)
    assert state.console.out.count(said) == 1


# -- the wide window -------------------------------------------------------------------------------------------------


def make_window(machine: Machine, wide: WideWindows, *, at_zero: bool) -> None:
    """Every step until there is a window or none can be had."""

    def next_step() -> Generator[Any, list[int], Any]:
        step = wide.work(1 << 11, at_zero=at_zero)
        return iter_nothing() if step is None else step

    while wide.work(1 << 11, at_zero=at_zero) is not None:
        machine.run_again(next_step)


def iter_nothing() -> Generator[Any, list[int], None]:
    return
    yield


@pytest.mark.parametrize("service", [*list(DDW)[:3], H_PUT_TCE.number])
def test_the_wide_window_is_made_although_a_call_is_busy_at_first(service: int | str) -> None:
    machine = Machine()
    machine.busy[service] = IMMEDIATE_TRIES + 1

    make_window(machine, machine.parts.wide, at_zero=True)

    assert machine.parts.wide.leads_to_itself
    assert machine.services.count("ibm,create-pe-dma-window") == 1


@pytest.mark.parametrize("base", [(1 << 64) - 0x10000, (1 << 64) - RAM_BYTES + 0x10000, 0x8000])
def test_a_window_at_an_address_that_none_can_have_is_not_used(base: int) -> None:
    machine = Machine()
    machine.created = [RtasStatus.SUCCESS, 0x80000001, base >> 32, base & 0xFFFFFFFF]

    make_window(machine, machine.parts.wide, at_zero=False)

    assert not machine.state.wide.liobn
    assert H_PUT_TCE.number not in machine.hcalls


@pytest.mark.parametrize("wrong", ["create", "base"])
def test_the_32_bit_window_comes_back_when_none_takes_its_place(wrong: str) -> None:
    machine = Machine()
    base = 1 << 59 if wrong == "base" else 0
    status = RtasStatus.HARDWARE_ERROR if wrong == "create" else RtasStatus.SUCCESS
    machine.created = [status, 0x80000000, base >> 32, 0]

    make_window(machine, machine.parts.wide, at_zero=True)

    assert not machine.parts.wide.leads_to_itself
    assert machine.services[-1] == "ibm,reset-pe-dma-window"


# -- interrupts ------------------------------------------------------------------------------------------------------


def test_an_interrupt_is_ended_although_the_work_that_it_brings_is_busy() -> None:
    machine = Machine()
    kernel = Kernel(machine.memory, StillClock(), machine.state)
    machine.state.rng.pci.irq, machine.state.rng.ready = 5, True
    machine.state.line = machine.state.interrupts_on = True

    def busy() -> Generator[Any, list[int], None]:
        raise Busy("a call")
        yield

    kernel._parts.rng.interrupted = busy  # type: ignore[method-assign]
    step = kernel.next_step()
    assert isinstance(step, Generator)

    with pytest.raises(Busy):
        machine.run(step)

    assert machine.hcalls == [H_XIRR.number, H_EOI.number]


def test_a_device_that_called_in_a_busy_moment_is_looked_at_afterwards() -> None:
    machine = Machine()
    kernel = Kernel(machine.memory, StillClock(), machine.state)
    machine.state.rng.pci.irq, machine.state.rng.ready = 5, True
    machine.state.line = machine.state.interrupts_on = True
    looks = iter([Busy("a call"), Busy("a call"), None])
    seen: list[object] = []

    def look() -> Generator[Any, list[int], None]:
        seen.append(next(looks))
        if isinstance(seen[-1], Busy):
            raise seen[-1]
        return
        yield

    kernel._parts.rng.interrupted = look  # type: ignore[method-assign]

    def next_step() -> Generator[Any, list[int], Any]:
        step = kernel.next_step()
        assert isinstance(step, Generator)
        return step

    n_busy = 0
    while len(seen) < 3:
        n_busy += machine.run_again(next_step)

    assert n_busy == 2
    assert seen[-1] is None
    assert not machine.state.rng.calls


# -- a device that was given up --------------------------------------------------------------------------------------


def test_an_entropy_device_that_was_given_up_may_be_asked_again_once_it_is_started_anew() -> None:
    machine = Machine()
    rng = machine.parts.rng
    rng.state.ready, rng.state.mapping = True, Mapping(addr=1, orig=1, n_bytes=1, direction=0)
    rng.give_up("no answer within 2 s")
    # As a switch leaves it that was refused while a request was open.
    rng.state.submitted_ns, rng.state.calls = 1, True

    with pytest.raises(NoDevice, match="VERSION_1"):
        machine.run(rng.start())

    assert rng.state.mapping is None
    assert (rng.state.submitted_ns, rng.state.calls) == (0, False)
