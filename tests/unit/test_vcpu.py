"""Virtual processors: what answers a waiting hypercall at once, what leaves it open, what ends it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.codes import HCode
from protocol.errors import MalformedMessage
from services.kvm.vcpu import CONFER_ALL, RunState, Vcpus, VcpusState, VcpuState, Wait

N_VCPUS = 3


def started(n_vcpus: int = N_VCPUS) -> Vcpus:
    vcpus = Vcpus(n_vcpus)
    for vcpu in range(n_vcpus):
        vcpus.start(vcpu)
    return vcpus


def test_a_processor_is_off_until_it_is_started() -> None:
    vcpus = Vcpus(1)

    assert vcpus.state(0) is RunState.OFF
    assert vcpus.start(0)
    assert not vcpus.start(0)
    assert vcpus.state(0) is RunState.RUNNING


def test_a_cede_stays_open_until_the_line_rises() -> None:
    vcpus = started()

    assert vcpus.h_cede(0) is None
    assert vcpus.state(0) is RunState.CEDED
    assert vcpus.take_ended() == []
    vcpus.set_line(0, True)

    assert vcpus.take_ended() == [0]
    assert vcpus.take_ended() == []
    assert vcpus.state(0) is RunState.RUNNING


def test_a_cede_with_the_line_high_is_answered_at_once() -> None:
    vcpus = started()
    vcpus.set_line(0, True)

    assert vcpus.h_cede(0) is HCode.H_SUCCESS
    vcpus.set_line(0, False)
    assert vcpus.h_cede(0) is None


def test_a_prod_ends_a_cede_and_is_used_up() -> None:
    vcpus = started()
    vcpus.h_cede(1)

    assert vcpus.h_prod(1) is HCode.H_SUCCESS
    assert vcpus.take_ended() == [1]
    assert vcpus.h_cede(1) is None


def test_a_prod_before_the_cede_is_not_lost_and_counts_once() -> None:
    vcpus = started()
    vcpus.h_prod(1)
    vcpus.h_prod(1)

    assert vcpus.h_cede(1) is HCode.H_SUCCESS
    assert vcpus.h_cede(1) is None


def test_the_processors_own_timer_ends_a_cede() -> None:
    vcpus = started()
    vcpus.h_cede(0)

    vcpus.wake(0)

    assert vcpus.take_ended() == [0]


def test_waking_a_running_processor_changes_nothing() -> None:
    vcpus = started()

    vcpus.wake(0)

    assert vcpus.take_ended() == []
    assert vcpus.h_cede(0) is None


def test_conferring_to_itself_waits_for_a_prod_alone() -> None:
    vcpus = started()

    assert vcpus.h_confer(0, 0, 1) is None
    vcpus.set_line(0, True)
    vcpus.wake(0)
    assert vcpus.take_ended() == []
    vcpus.h_prod(0)

    assert vcpus.take_ended() == [0]


@pytest.mark.parametrize("target", [1, CONFER_ALL])
def test_conferring_to_others_is_answered_at_once(target: int) -> None:
    assert started().h_confer(0, target, 1) is HCode.H_SUCCESS


def test_an_unknown_target_is_a_parameter_error() -> None:
    vcpus = started()

    assert vcpus.h_confer(0, N_VCPUS, 1) is HCode.H_PARAMETER
    assert vcpus.h_prod(N_VCPUS) is HCode.H_PARAMETER
    assert vcpus.h_prod(CONFER_ALL) is HCode.H_PARAMETER


def test_the_last_processor_to_join_goes_on() -> None:
    vcpus = started()

    assert vcpus.h_join(0) is None
    assert vcpus.h_join(1) is None
    assert vcpus.h_join(2) is HCode.H_CONTINUE
    vcpus.h_prod(1)

    assert vcpus.take_ended() == [1]
    assert vcpus.waits_in(0) is Wait.JOIN


def test_processors_that_are_off_do_not_count_as_joiners() -> None:
    vcpus = Vcpus(N_VCPUS)
    vcpus.start(0)

    assert vcpus.h_join(0) is HCode.H_CONTINUE


def test_a_ceded_processor_has_not_joined() -> None:
    vcpus = started(2)
    vcpus.h_cede(0)

    assert vcpus.h_join(1) is None


def test_a_prodded_processor_does_not_join() -> None:
    vcpus = started(2)
    vcpus.h_prod(0)

    assert vcpus.h_join(0) is HCode.H_SUCCESS


@pytest.mark.parametrize("vcpu", [-1, N_VCPUS])
def test_a_caller_that_does_not_exist_is_refused(vcpu: int) -> None:
    vcpus = started()

    assert vcpus.h_cede(vcpu) is HCode.H_PARAMETER
    assert vcpus.h_confer(vcpu, 0, 0) is HCode.H_PARAMETER
    assert vcpus.h_join(vcpu) is HCode.H_PARAMETER


def test_a_second_call_while_one_is_open_is_refused() -> None:
    vcpus = started()
    vcpus.h_cede(0)

    assert vcpus.h_cede(0) is HCode.H_PARAMETER
    vcpus.h_prod(0)
    assert vcpus.take_ended() == [0]


def test_a_stopped_processor_still_waits_when_it_continues() -> None:
    vcpus = started()
    vcpus.h_cede(0)

    assert vcpus.stop(0)
    assert not vcpus.stop(0)
    assert vcpus.state(0) is RunState.STOPPED
    assert vcpus.go(0)
    assert not vcpus.go(0)

    assert vcpus.state(0) is RunState.CEDED


def test_a_wait_may_end_while_its_processor_is_stopped() -> None:
    vcpus = started()
    vcpus.h_cede(0)
    vcpus.stop(0)

    vcpus.set_line(0, True)

    assert vcpus.take_ended() == [0]
    assert vcpus.state(0) is RunState.STOPPED


def test_a_processor_that_goes_off_drops_its_open_call() -> None:
    vcpus = started()
    vcpus.h_cede(0)
    vcpus.h_cede(1)
    vcpus.h_prod(1)

    assert vcpus.off(0)
    assert not vcpus.off(1)
    assert not vcpus.off(2)

    assert vcpus.take_ended() == []
    vcpus.start(1)
    assert vcpus.h_cede(1) is None


def test_a_reset_drops_open_calls_and_prods() -> None:
    vcpus = started()
    vcpus.h_cede(0)
    vcpus.h_join(2)
    vcpus.h_prod(1)
    vcpus.stop(1)

    assert vcpus.reset() == [0, 2]

    assert [vcpus.state(vcpu) for vcpu in range(N_VCPUS)] == [RunState.OFF] * N_VCPUS
    vcpus.start(1)
    assert vcpus.h_cede(1) is None


def test_a_loaded_machine_still_waits() -> None:
    vcpus = started()
    vcpus.h_cede(0)
    vcpus.h_prod(1)

    fresh = Vcpus(N_VCPUS)
    fresh.load(vcpus.save())
    fresh.set_line(0, True)

    assert fresh.take_ended() == [0]
    assert fresh.h_cede(1) is HCode.H_SUCCESS


@pytest.mark.parametrize(
    "states",
    [
        [VcpuState()],
        [VcpuState(wait=Wait.CEDE), VcpuState()],
        [VcpuState(started=True, wait=Wait.CEDE, line=True), VcpuState()],
        [VcpuState(started=True, wait=Wait.JOIN, prodded=True), VcpuState()],
    ],
)
def test_a_state_that_does_not_hold_is_refused(states: list[VcpuState]) -> None:
    with pytest.raises(MalformedMessage):
        Vcpus(2).load(VcpusState(states))


VCPU = st.integers(0, N_VCPUS - 1)


class NoWakeIsLost(RuleBasedStateMachine):
    """Every open call ends exactly once, and never stays open after what ends it has come."""

    def __init__(self) -> None:
        super().__init__()
        self.vcpus = started()
        self.open: dict[int, Wait] = {}
        self.prods = dict.fromkeys(range(N_VCPUS), False)
        self.lines = dict.fromkeys(range(N_VCPUS), False)

    def ended(self) -> list[int]:
        ended = self.vcpus.take_ended()
        for vcpu in ended:
            del self.open[vcpu]
        return ended

    @rule(vcpu=VCPU)
    def cede(self, vcpu: int) -> None:
        if vcpu in self.open:
            return
        expected = self.prods[vcpu] or self.lines[vcpu]
        self.prods[vcpu] = False
        assert self.vcpus.h_cede(vcpu) is (HCode.H_SUCCESS if expected else None)
        if not expected:
            self.open[vcpu] = Wait.CEDE

    @rule(vcpu=VCPU)
    def confer_to_self(self, vcpu: int) -> None:
        if vcpu in self.open:
            return
        expected, self.prods[vcpu] = self.prods[vcpu], False
        assert self.vcpus.h_confer(vcpu, vcpu, 0) is (HCode.H_SUCCESS if expected else None)
        if not expected:
            self.open[vcpu] = Wait.CONFER

    @rule(vcpu=VCPU)
    def prod(self, vcpu: int) -> None:
        waited = vcpu in self.open
        self.vcpus.h_prod(vcpu)
        assert self.ended() == ([vcpu] if waited else [])
        if not waited:
            self.prods[vcpu] = True

    @rule(vcpu=VCPU, level=st.booleans())
    def line(self, vcpu: int, level: bool) -> None:
        ends = level and self.open.get(vcpu) is Wait.CEDE
        self.lines[vcpu] = level
        self.vcpus.set_line(vcpu, level)
        assert self.ended() == ([vcpu] if ends else [])

    @rule(vcpu=VCPU, stop=st.booleans())
    def stop_or_go(self, vcpu: int, stop: bool) -> None:
        if stop:
            self.vcpus.stop(vcpu)
        else:
            self.vcpus.go(vcpu)

    @rule()
    def move(self) -> None:
        fresh = Vcpus(N_VCPUS)
        fresh.load(self.vcpus.save())
        self.vcpus = fresh

    @invariant()
    def waits_agree(self) -> None:
        waits = {v: self.vcpus.waits_in(v) for v in range(N_VCPUS) if self.vcpus.waits_in(v) is not Wait.NONE}
        assert waits == self.open


TestNoWakeIsLost = NoWakeIsLost.TestCase
TestNoWakeIsLost.settings = settings(deadline=None)
