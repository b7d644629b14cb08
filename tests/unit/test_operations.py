"""What can be done to a VM and what not: the one table of operations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from deploy.cli import COMMANDS
from deploy.operations import OPERATIONS, RESTORE, VmFacts, operation_of, operation_rows, refuse_by, refuse_impossible
from deploy.states import ProcessState
from protocol.errors import UserError
from protocol.roles import Role
from protocol.vm_state import VmState
from services.qemu.qmp import COMMANDS as MONITOR_COMMANDS

EVERYTHING = frozenset(operation.monitor_command or "" for operation in OPERATIONS.values())
FACTS = VmFacts(
    name="vm1",
    host="alpha",
    state=VmState.RUNNING,
    secure=False,
    processes=dict.fromkeys(Role, ProcessState.RUNNING),
    device_kinds=frozenset({"virtio-balloon", "virtio-console"}),
    monitor_commands=EVERYTHING,
)


def facts(**changes: Any) -> VmFacts:  # noqa: ANN401
    return dataclasses.replace(FACTS, **changes)


def without(role: Role, state: ProcessState) -> VmFacts:
    return facts(processes={**FACTS.processes, role: state})


def impossible(of: VmFacts) -> dict[str, str]:
    """But for a restore, which needs a VM that is off."""
    rows = operation_rows(of)
    return {name: row.reason for name, row in rows.items() if not row.possible and name != RESTORE}


def test_everything_is_possible_with_a_normal_vm_whose_monitor_can_do_it() -> None:
    assert impossible(FACTS) == {}


def test_a_secure_vm_refuses_what_would_need_its_memory_and_nothing_else() -> None:
    reasons = impossible(facts(secure=True))

    assert set(reasons) == {"balloon", "memory dump"}
    assert all(reason.startswith("vm1 is secure: ") for reason in reasons.values())


def test_a_secure_vm_says_what_is_different_where_something_is_possible() -> None:
    normal, secure = operation_rows(FACTS), operation_rows(facts(secure=True))

    assert {row.note for row in normal.values()} == {""}
    assert "boots as a normal VM" in secure["reset"].note
    assert "ciphertext" in secure["page"].note
    assert secure["pause"].note == ""


def test_what_the_monitor_does_not_know_is_not_built() -> None:
    reasons = impossible(facts(monitor_commands=EVERYTHING - {"dump-guest-memory"}, secure=True))

    assert reasons["memory dump"] == "not built: the monitor has no command dump-guest-memory"


@pytest.mark.parametrize(("operation", "kind"), [("balloon", "virtio-balloon"), ("virtio console", "virtio-console")])
def test_an_operation_on_a_device_needs_the_device(operation: str, kind: str) -> None:
    assert impossible(facts(device_kinds=frozenset())).pop(operation) == f"vm1 has no {kind}"


def test_a_vm_moves_when_it_runs_has_somewhere_to_go_and_nothing_that_belongs_to_its_host() -> None:
    assert impossible(facts(other_hosts=False)) == {"migrate": "alpha is the only host of the cluster"}
    assigned = "device edu is assigned to the VM: unplug it"
    assert impossible(facts(device_kinds=FACTS.device_kinds | {"edu"})) == {"migrate": assigned, "snapshot": assigned}
    assert impossible(facts(state=VmState.PAUSED)) == {}
    assert impossible(facts(state=VmState.OFF))["migrate"] == "vm1 is off"


def test_a_vm_on_its_way_is_neither_restarted_nor_sent_elsewhere() -> None:
    on_its_way = "vm1 is on its way to beta"

    assert impossible(facts(on_its_way=on_its_way)) == dict.fromkeys(("restart", "migrate", "snapshot"), on_its_way)


def test_an_operation_needs_the_processes_that_do_it() -> None:
    assert impossible(without(Role.QEMU, ProcessState.FAILED))["pause"] == "vm1/qemu is failed: pefbox restart vm1"
    assert impossible(without(Role.KVM, ProcessState.STOPPED))["pause"] == "alpha/kvm is stopped"
    assert impossible(without(Role.KVM, ProcessState.GONE))["console"] == "alpha/kvm is gone: pefbox restart alpha"
    assert set(impossible(without(Role.ULTRAVISOR, ProcessState.UNRESPONSIVE))) == {"restart", "migrate", "snapshot"}
    assert set(impossible(without(Role.GUEST, ProcessState.FAILED))) == {"migrate", "snapshot"}


@pytest.mark.parametrize("secure", [False, True])
def test_a_vm_that_is_off_is_restored_and_one_that_runs_is_saved(secure: bool) -> None:
    on, off = operation_rows(facts(secure=secure)), operation_rows(facts(state=VmState.OFF))

    assert on["snapshot"].possible and off["restore"].possible
    assert on["snapshot"].note == ("it is sealed for this host's ultravisor, which restores it once" if secure else "")
    assert on["restore"].reason == "vm1 is running: pefbox qmp vm1 quit"
    assert off["snapshot"].reason == "vm1 is off"


@pytest.mark.parametrize("state", [VmState.OFF, VmState.FAILED, VmState.STARTING])
def test_a_vm_that_does_not_run_is_not_paused_but_reset(state: VmState) -> None:
    reasons = impossible(facts(state=state))

    assert reasons["pause"] == reasons["resume"] == f"vm1 is {state.value}"
    assert "reset" not in reasons


def test_a_refusal_is_one_line_with_the_reason() -> None:
    line = "restart is not possible: alpha/kvm is failed: pefbox restart alpha"
    dead = without(Role.KVM, ProcessState.FAILED)
    rows = {name: {"possible": row.possible, "reason": row.reason} for name, row in operation_rows(dead).items()}

    with pytest.raises(UserError, match=line):
        refuse_impossible(dead, "restart")
    with pytest.raises(UserError, match=line):
        refuse_by(rows, "restart")
    refuse_impossible(FACTS, "restart")
    refuse_by(rows, "page")


def test_every_operation_names_a_command_that_exists() -> None:
    for row in operation_rows(FACTS).values():
        program, command, vm, *_ = row.how.split()
        assert (program, vm) == ("pefbox", "vm1")
        assert command in COMMANDS


def test_every_command_of_the_monitor_that_changes_something_is_an_operation() -> None:
    asking = {"qmp_capabilities"}
    changing = {c.name for c in MONITOR_COMMANDS if not c.name.startswith("query-")} - asking

    assert {name for name in changing if operation_of(name) is None} == set()
    assert operation_of("query-status") is None
