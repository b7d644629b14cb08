"""Every declared call is handled by exactly the process that should, or answers that there is no such function."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import messages as m
from protocol.codes import HCode, RtasStatus, UCode
from protocol.declare import Call, Caller, Space
from protocol.geometry import PAGE_BYTES
from protocol.hcalls import HCALLS
from protocol.links import KVM_GUEST, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, LinkKind
from protocol.refusals import Refusal, refusal, why_not_served
from protocol.roles import Role
from protocol.rtas import RTAS, SERVED_BY, status_word
from protocol.ucalls import UCALLS
from protocol.unhandled import HANDLED_HCALLS, HANDLED_RTAS, HANDLED_UCALLS, UNHANDLED, undeclared
from services.kvm import rtas_irq
from services.qemu.board import Board
from services.qemu.testing import TestPort, TestRam
from services.runtime.channel import ZmqChannel
from services.runtime.link import Link
from tests.unit.kvm_rig import KvmRig, kvm_rig
from tests.unit.ultravisor_rig import LOG, UltravisorRig, ultravisor_rig, vm_entry


@pytest.fixture
def ultravisor(nursery: trio.Nursery, key: RSAPrivateKey) -> Iterator[UltravisorRig]:
    with ultravisor_rig(nursery, key) as rig:
        yield rig


@pytest.fixture
def kvm() -> Iterator[KvmRig]:
    with kvm_rig() as rig:
        yield rig


def numbers(*callers: Caller, space: Space = Space.UCALL) -> set[int]:
    table = UCALLS if space is Space.UCALL else HCALLS
    return {call.number for call in table if call.callers & set(callers)}


# -- ultravisor -------------------------------------------------------------------------------------------------------


async def test_the_ultravisor_serves_kvm_every_handled_ultracall_of_the_hypervisor(ultravisor: UltravisorRig) -> None:
    assert ultravisor.kvm.served == numbers(Caller.HYPERVISOR) & HANDLED_UCALLS


async def test_the_ultravisor_serves_a_guest_its_ultracalls_and_every_hypercall_of_a_secure_vm(
    ultravisor: UltravisorRig,
) -> None:
    messages = {m.MAP_FAULT.number, m.GUEST_CRASHED.number}
    ucalls = numbers(Caller.VM, Caller.SVM) & HANDLED_UCALLS

    assert ultravisor.guest.served == ucalls | numbers(Caller.SVM, space=Space.HCALL) | messages


async def test_together_they_are_the_handled_ultracalls(ultravisor: UltravisorRig) -> None:
    assert (ultravisor.kvm.served | ultravisor.guest.served) & UCALLS.by_number.keys() == HANDLED_UCALLS


def test_no_secure_vm_may_issue_the_calls_of_the_ultravisor() -> None:
    own = numbers(Caller.ULTRAVISOR, space=Space.HCALL)

    assert {HCALLS.by_number[number].name for number in own} == {
        "H_SVM_PAGE_IN",
        "H_SVM_PAGE_OUT",
        "H_SVM_INIT_START",
        "H_SVM_INIT_DONE",
        "H_SVM_INIT_ABORT",
        "H_SVM_TPM_COMM",
    }
    assert not own & (ULTRAVISOR_GUEST.upward | KVM_GUEST.upward)


# -- kvm and qemu -----------------------------------------------------------------------------------------------------


def test_kvm_handles_exactly_the_handled_hypercalls(kvm: KvmRig) -> None:
    at_once, waiting = set(kvm.vm.hcalls.at_once), set(kvm.vm.hcalls.waiting)

    assert at_once | waiting == HANDLED_HCALLS
    assert not at_once & waiting


def test_kvm_serves_a_normal_vm_every_handled_hypercall_that_it_may_issue(kvm: KvmRig) -> None:
    hcalls = numbers(Caller.VM, space=Space.HCALL) & HANDLED_HCALLS

    assert kvm.guest.served == hcalls | {m.MAP_FAULT.number, m.GUEST_CRASHED.number, m.VCPU_DEBUG_STOP.number}


def test_every_declared_hypercall_of_a_secure_vm_may_reach_kvm() -> None:
    assert ULTRAVISOR_KVM.downward == set(HCALLS.by_number)


def test_the_rtas_services_of_kvm_and_qemu_are_the_handled_ones() -> None:
    board = Board(vm_entry(), TestRam(PAGE_BYTES).accessor, {}, TestPort())
    of_qemu = {RTAS.by_name[name].number for name in board.rtas_services.names}

    assert set(rtas_irq.HANDLERS) == {number for number, role in SERVED_BY.items() if role is Role.KVM}
    assert of_qemu == {number for number, role in SERVED_BY.items() if role is Role.QEMU}
    assert set(rtas_irq.HANDLERS) | of_qemu == HANDLED_RTAS


async def test_an_unhandled_rtas_service_is_a_parameter_error() -> None:
    board = Board(vm_entry(), TestRam(PAGE_BYTES).accessor, {}, TestPort())

    for call in RTAS:
        if call.number not in HANDLED_RTAS:
            rets = await board.rtas_token(call.number, [0] * call.n_args, 1)
            assert rets == [status_word(RtasStatus.PARAMETER_ERROR)], call.name


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_every_declared_call_is_handled_or_listed_with_a_reason() -> None:
    handled = HANDLED_HCALLS | HANDLED_UCALLS | HANDLED_RTAS
    declared = {call.number: call for table in (HCALLS, UCALLS) for call in table}
    open_ones = [c.name for c in declared.values() if (c.number in handled) == (c.name in UNHANDLED)]

    assert not open_ones
    assert {call.name for call in RTAS if (call.number in HANDLED_RTAS) == (call.name in UNHANDLED)} == set()
    assert not undeclared()


@pytest.mark.parametrize("call", [call for call in (*HCALLS, *UCALLS) if call.name in UNHANDLED], ids=lambda c: c.name)
def test_an_unhandled_call_is_answered_with_no_such_function(call: Call) -> None:
    expected = HCode.H_FUNCTION if call.space is Space.HCALL else UCode.U_FUNCTION

    assert refusal(call.number, why_not_served(call.number)) == [int(expected)]


@pytest.mark.parametrize("name", ["UV_PAGE_IN", "UV_RETURN", "UV_SVM_TERMINATE", "UV_SHARE_PAGE", "UV_ESM"])
def test_an_ultracall_of_somebody_else_is_a_permission_error(name: str) -> None:
    number = UCALLS.by_name[name].number

    assert why_not_served(number) is Refusal.PERMISSION
    assert refusal(number, Refusal.PERMISSION) == [int(UCode.U_PERMISSION)]


@pytest.mark.parametrize("kind", [KVM_GUEST, ULTRAVISOR_GUEST, ULTRAVISOR_KVM], ids=lambda kind: kind.name)
def test_no_handler_can_be_registered_for_a_call_that_its_link_does_not_carry(kind: LinkKind) -> None:
    link = Link(cast(ZmqChannel, SimpleNamespace(bundles=False)), kind, kind.upper, "l", "peer", LOG)

    for call in (*HCALLS, *UCALLS):
        if call.number in kind.upward:
            link.on(call, lambda _envelope, _registers: [0])
        else:
            with pytest.raises(ValueError, match="does not carry"):
                link.on(call, lambda _envelope, _registers: [0])
