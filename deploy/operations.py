"""What an operator may do to a VM, and when: one table, for the commands and for whoever asks before he tries.

A condition looks at what is known of the VM and gives the reason why not, in one line, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from deploy.states import ProcessState
from protocol.errors import UserError
from protocol.roles import Role
from protocol.vm_state import VmState


@dataclass(frozen=True, slots=True)
class VmFacts:
    """What the conditions look at. `processes` are those that exist where the VM lives.

    `on_its_way` is one line on the migration that is under way, `other_hosts` whether there is one to go to.
    """

    name: str
    host: str
    state: VmState
    secure: bool
    processes: dict[Role, ProcessState]
    device_kinds: frozenset[str]
    monitor_commands: frozenset[str] | None
    """None when its qemu never told."""
    on_its_way: str | None = None
    other_hosts: bool = True


Condition = Callable[[VmFacts], str | None]


@dataclass(frozen=True, slots=True)
class Operation:
    """`how` is the command that does it; `on_secure` says what a secure VM makes different, where it is possible."""

    name: str
    how: str
    conditions: tuple[Condition, ...] = ()
    monitor_command: str | None = None
    on_secure: str = ""

    def why_not(self, facts: VmFacts) -> str | None:
        """The first reason against it, None when it can be done now."""
        reasons = (condition(facts) for condition in self.conditions)
        return next((reason for reason in reasons if reason is not None), None)


class OperationRow(msgspec.Struct, kw_only=True):
    """One operation on one VM, now. `reason` is empty when it is possible, `note` when there is nothing to know."""

    possible: bool
    reason: str
    how: str
    note: str


# -- conditions -----------------------------------------------------------------------------------------------


def _answers(*roles: Role) -> Condition:
    def condition(facts: VmFacts) -> str | None:
        for role in roles:
            state = facts.processes.get(role, ProcessState.GONE)
            if not state.answers:
                owner = facts.name if role in (Role.QEMU, Role.GUEST) else facts.host
                advice = f": pefbox restart {owner}" if state.is_over else ""
                return f"{owner}/{role.value} is {state.value}{advice}"
        return None

    return condition


def _is_started(facts: VmFacts) -> str | None:
    if facts.state in (VmState.RUNNING, VmState.PAUSED):
        return None
    return f"{facts.name} is {facts.state.value}"


def _is_off(facts: VmFacts) -> str | None:
    if facts.state in (VmState.OFF, VmState.FAILED):
        return None
    return f"{facts.name} is {facts.state.value}: pefbox qmp {facts.name} quit"


def _is_built(monitor_command: str) -> Condition:
    def condition(facts: VmFacts) -> str | None:
        if facts.monitor_commands is None or monitor_command in facts.monitor_commands:
            return None
        return f"not built: the monitor has no command {monitor_command}"

    return condition


def _has_device(kind: str) -> Condition:
    def condition(facts: VmFacts) -> str | None:
        return None if kind in facts.device_kinds else f"{facts.name} has no {kind}"

    return condition


def _is_normal(what: str) -> Condition:
    def condition(facts: VmFacts) -> str | None:
        return f"{facts.name} is secure: {what}" if facts.secure else None

    return condition


def _stays(facts: VmFacts) -> str | None:
    return facts.on_its_way


def _has_another_host(facts: VmFacts) -> str | None:
    return None if facts.other_hosts else f"{facts.host} is the only host of the cluster"


def _has_nothing_assigned(facts: VmFacts) -> str | None:
    """A device that is no part of qemu's own state stays with its host, as one that is passed through."""
    assigned = sorted(facts.device_kinds & ASSIGNED_KINDS)
    return f"device {assigned[0]} is assigned to the VM: unplug it" if assigned else None


def _monitor(name: str, command: str, *conditions: Condition, on_secure: str = "") -> Operation:
    """An operation that is a command of the VM's monitor."""
    needs = (_is_built(command), _answers(Role.QEMU), *conditions)
    return Operation(name, f"pefbox qmp VM {command}", needs, command, on_secure)


# -- the table ------------------------------------------------------------------------------------------------

RESTART = "restart"
CONSOLE = "console"
VIRTIO_CONSOLE = "virtio console"
BALLOON = "balloon"
MIGRATE = "migrate"
SNAPSHOT = "snapshot"
RESTORE = "restore"
ASSIGNED_KINDS = frozenset({"edu"})
_STARTS_AGAIN = "its secure memory is gone; it boots as a normal VM and may turn itself secure again"

_TABLE = (
    _monitor("pause", "stop", _answers(Role.KVM), _is_started),
    _monitor("resume", "cont", _answers(Role.KVM), _is_started),
    _monitor("reset", "system_reset", _answers(Role.KVM), on_secure=_STARTS_AGAIN),
    _monitor("power off", "quit", on_secure="its secure memory is gone"),
    _monitor("shutdown", "system_powerdown", _is_started),
    Operation(RESTART, "pefbox restart VM", (_stays, _answers(Role.ULTRAVISOR, Role.KVM)), on_secure=_STARTS_AGAIN),
    Operation(CONSOLE, "pefbox console VM", (_answers(Role.KVM),)),
    Operation(
        VIRTIO_CONSOLE,
        "pefbox console VM --port NAME",
        (_has_device("virtio-console"), _answers(Role.QEMU)),
        on_secure="only where the guest drives it through memory that it shares",
    ),
    Operation("page", "pefbox page VM GPA", on_secure="the host's bytes of a page that is not shared are ciphertext"),
    Operation(
        "gdb",
        "pefbox gdb VM",
        (_answers(Role.QEMU),),
        on_secure="the host's view has ciphertext and no registers; the owner's needs a debuggable VM",
    ),
    Operation(
        BALLOON,
        "pefbox balloon VM SIZE",
        (
            _is_built("balloon"),
            _answers(Role.QEMU),
            _has_device("virtio-balloon"),
            _is_normal("the balloon would hand private pages to the host, which gains nothing by them"),
        ),
        "balloon",
    ),
    _monitor("memory dump", "dump-guest-memory", _is_normal("all but its shared pages would be ciphertext")),
    Operation(
        SNAPSHOT,
        "pefbox snapshot VM FILE",
        (
            _stays,
            _is_started,
            _answers(Role.ULTRAVISOR, Role.KVM, Role.QEMU, Role.GUEST),
            _has_nothing_assigned,
        ),
        on_secure="it is sealed for this host's ultravisor, which restores it once",
    ),
    Operation(RESTORE, "pefbox restore VM FILE", (_stays, _is_off, _answers(Role.ULTRAVISOR, Role.KVM))),
    Operation(
        MIGRATE,
        "pefbox migrate VM HOST",
        (
            _stays,
            _has_another_host,
            _is_started,
            _answers(Role.ULTRAVISOR, Role.KVM, Role.QEMU, Role.GUEST),
            _has_nothing_assigned,
        ),
        "migrate",
        on_secure="only to a host that both ultravisors and the VM's own policy accept: pefbox can-migrate",
    ),
    Operation("cancel migration", "pefbox migrate VM --cancel", (_answers(Role.QEMU),), "migrate_cancel"),
    Operation(
        "migration parameters", "pefbox migrate VM --bandwidth SIZE", (_answers(Role.QEMU),), "migrate-set-parameters"
    ),
)
OPERATIONS = {operation.name: operation for operation in _TABLE}


def operation_of(monitor_command: str) -> Operation | None:
    """The operation that a command of the monitor is; None for one that only asks, or that nobody knows."""
    return next((operation for operation in _TABLE if operation.monitor_command == monitor_command), None)


def operation_rows(facts: VmFacts) -> dict[str, OperationRow]:
    """Every operation, and whether it can be done now."""
    rows = {}
    for operation in _TABLE:
        reason = operation.why_not(facts)
        note = operation.on_secure if facts.secure and reason is None else ""
        rows[operation.name] = OperationRow(
            possible=reason is None, reason=reason or "", how=operation.how.replace("VM", facts.name, 1), note=note
        )
    return rows


def refuse_impossible(facts: VmFacts, operation: str) -> None:
    """Raise UserError with the reason when the operation cannot be done now."""
    reason = OPERATIONS[operation].why_not(facts)
    if reason is not None:
        raise UserError(_refusal(operation, reason))


def refuse_by(rows: dict[str, dict[str, Any]], operation: str) -> None:
    """The same out of the answer that holds `operation_rows`."""
    row = rows[operation]
    if not row["possible"]:
        raise UserError(_refusal(operation, str(row["reason"])))


def _refusal(operation: str, reason: str) -> str:
    return f"{operation} is not possible: {reason}"
