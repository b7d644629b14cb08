"""The host's debugger on a normal VM, as kvm orders it: QEMU's under KVM. Of a secure VM it has nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from protocol import messages as m
from protocol.codes import HCode
from services.guest.run_state import Hold, RunState
from services.runtime.gdb.target import Refused
from shared.gdb_registers import POWER, unpack
from tests.unit.machine_rig import ENTRY
from tests.unit.owner_rig import Owner, put
from tests.unit.power_asm import addi, b, li
from tests.unit.test_processor_migration import Rig, eventually, machine, model, rig_of

LOOP = (li(4, 1), addi(4, 4, 1), b(-1))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rig_of(machine, kernel="machine") as rig:
        put(rig, *LOOP)
        yield rig


def debug(rig: Rig, *points: m.DebugPoint, step: bool = False) -> int:
    status: m.Status = rig.kvm.ask(m.VCPU_DEBUG, m.DebugBody(0, list(points), step))
    return status.code


def test_the_host_has_registers_and_memory_of_a_normal_vm(rig: Rig) -> None:
    rig.start()
    rig.kvm.ask(m.VCPU_STOP)
    reply: m.DebugRegisters = rig.kvm.ask(m.VCPU_REGISTERS)
    values = unpack(POWER, reply.little_endian, reply.values, reply.missing)
    pc = values.values[POWER.number["pc"]]
    assert pc is not None

    assert ENTRY <= pc <= ENTRY + 8
    assert rig.kvm.ask(m.VCPU_TRANSLATE, m.DebugAddressBody(0, 0xC << 60 | ENTRY)) == m.DebugAddressReply(0, ENTRY)
    body = m.DebugRegisterBody(0, POWER.number["r9"], (99).to_bytes(8, "big"))
    assert rig.kvm.ask(m.VCPU_SET_REGISTER, body) == m.Status()
    assert Owner(rig).register("r9") == 99
    assert "PVR" in rig.kvm.ask(m.VCPU_DEBUG_COMMAND, m.DebugCommandBody(0, ["spr"])).text


@pytest.mark.parametrize(
    "body",
    [
        m.DebugRegisterBody(0, 1000, bytes(8)),
        m.DebugRegisterBody(0, POWER.number["r9"], bytes(4)),
    ],
)
def test_s5_a_register_that_does_not_exist_is_refused(rig: Rig, body: m.DebugRegisterBody) -> None:
    rig.start()

    assert rig.kvm.ask(m.VCPU_SET_REGISTER, body) == m.Status(HCode.H_PARAMETER)


def test_the_hosts_breakpoint_stops_the_processor_as_kvm_does_and_tells_it(rig: Rig) -> None:
    rig.start()
    rig.kvm.ask(m.VCPU_STOP)
    assert debug(rig, m.DebugPoint(0, ENTRY + 8, 4)) == HCode.H_SUCCESS
    rig.kvm.ask(m.VCPU_CONTINUE)

    eventually(lambda: m.VCPU_DEBUG_STOP.number in rig.kvm.events)

    assert rig.is_in(RunState.STOPPED)
    assert Owner(rig).register("pc") == ENTRY + 8
    assert debug(rig, step=True) == HCode.H_SUCCESS
    rig.kvm.ask(m.VCPU_CONTINUE)
    eventually(lambda: rig.kvm.events.count(m.VCPU_DEBUG_STOP.number) == 2)
    assert Owner(rig).register("pc") == ENTRY + 4


def test_owner_and_host_do_not_debug_at_once(rig: Rig) -> None:
    rig.start()
    owner = Owner(rig)
    owner.attach()
    assert debug(rig, m.DebugPoint(0, ENTRY, 4)) == HCode.H_BUSY
    assert debug(rig) == HCode.H_SUCCESS, "who has no points may say so"
    owner.step()
    owner.release()

    assert debug(rig, m.DebugPoint(0, ENTRY + (1 << 20), 4)) == HCode.H_SUCCESS
    with pytest.raises(Refused, match="debugger already"):
        owner.attach()
    assert debug(rig) == HCode.H_SUCCESS
    owner.attach()


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (m.VCPU_REGISTERS, m.RunBody(0)),
        (m.VCPU_SET_REGISTER, m.DebugRegisterBody(0, 0, bytes(8))),
        (m.VCPU_TRANSLATE, m.DebugAddressBody(0, 0)),
        (m.VCPU_DEBUG, m.DebugBody(0, [m.DebugPoint(0, 0, 4)])),
        (m.VCPU_DEBUG_COMMAND, m.DebugCommandBody(0, ["spr"])),
    ],
)
def test_s1_the_host_debugs_nothing_of_a_secure_vm(rig: Rig, message: Any, body: m.Body) -> None:  # noqa: ANN401
    rig.start(secure=True)

    assert rig.kvm.ask(message, body) == message.reply.refused(HCode.H_PERMISSION)
    assert rig.processor.refused == 1


def test_s1_the_registers_of_a_secure_vm_that_has_ended_are_not_the_hosts(rig: Rig) -> None:
    rig.start(secure=True)
    rig.ultravisor.ask(m.SVM_ENDED, m.Empty())
    assert rig.is_in(RunState.OFF)

    assert rig.kvm.ask(m.VCPU_REGISTERS).code == HCode.H_PERMISSION
    rig.give_map()
    rig.start()

    reply: m.DebugRegisters = rig.kvm.ask(m.VCPU_REGISTERS)
    assert reply.code == HCode.H_SUCCESS


def test_s1_the_hosts_points_end_where_a_secure_vm_begins(rig: Rig) -> None:
    rig.start()
    rig.kvm.ask(m.VCPU_STOP)
    debug(rig, m.DebugPoint(0, ENTRY + 4, 4), step=True)

    rig.start(secure=True)

    assert rig.is_in(RunState.RUNNING)
    assert not rig.processor.debugger.steps
    assert not rig.engine.debug.passes
    assert m.VCPU_DEBUG_STOP.number not in rig.kvm.events
    owner = Owner(rig)
    owner.attach()


def test_what_kvm_stops_while_a_point_is_passed_stays_stopped(rig: Rig) -> None:
    rig.start()
    rig.kvm.ask(m.VCPU_STOP)
    debug(rig, m.DebugPoint(0, ENTRY + 8, 4))
    rig.kvm.ask(m.VCPU_CONTINUE)
    eventually(lambda: m.VCPU_DEBUG_STOP.number in rig.kvm.events)
    debug(rig, m.DebugPoint(0, ENTRY + 8, 4))
    debugger = rig.processor.debugger

    def pass_while_stopped() -> None:
        assert debugger.steps
        rig.processor.let_go(Hold.HYPERVISOR)
        rig.engine.debug.step()
        rig.processor.hold(Hold.HYPERVISOR)
        debugger.trapped()

    Owner(rig).do(pass_while_stopped)

    assert rig.is_in(RunState.STOPPED)


def test_host_points_on_the_model_kernel_are_refused() -> None:
    with rig_of(model) as rig:
        rig.start()

        assert debug(rig, m.DebugPoint(0, 0, 4)) == HCode.H_PARAMETER
        assert debug(rig, m.DebugPoint(2, 0, 4)) == HCode.H_NOT_AVAILABLE
        Owner(rig).attach()
