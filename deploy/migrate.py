"""Moving a VM to another host of its cluster: checked, begun, watched, and then ended one way or the other.

The two qemus and ultravisors do the work and decide who runs the VM; the launcher follows what the source's qemu says.
When that one is gone, what the qemu where the VM arrives says counts. Meanwhile the end of a process of the VM is not
acted on at once: what it means depends on where the VM lives (`Migration.home_end`, `arrival_end`).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import trio

from deploy.can_migrate import why_not
from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.keepers import end_all
from deploy.migration_end import commit, undo
from deploy.migration_record import Migration, MigrationFacts, Phase
from deploy.migration_start import start
from deploy.states import printable
from deploy.status import ask
from protocol.errors import PeerGone, PefboxError, UserError
from protocol.roles import Role
from protocol.vm_state import VmState
from services.qemu.migration.parameters import MigrationParameters
from services.qemu.migration.status import IN_DOUBT, MigrationStatus

_POLL_SECONDS = 0.05
_LAST_WORD_SECONDS = 5.0
"""For the qemu where a VM arrives, to say what became of it after its source was gone."""
_ORDER_SECONDS = 2.0
_LAST_WORDS = frozenset({MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED})


class Verdict(Enum):
    """How a migration ended."""

    MOVED = "moved"
    STAYED = "stayed"
    IN_DOUBT = "in doubt"
    STOPPING = "stopping"
    """With the cluster."""


async def migrate(
    run: ClusterRun, name: str, host: str, parameters: dict[str, Any] | None = None, *, by_monitor: bool = False
) -> Migration:
    """Begin to move VM `name` to `host`, with `parameters` by QEMU's names; returns when that is accepted.

    Raises UserError, with nothing started, when it is not possible now.
    """
    checked = _checked(parameters or {})
    async with run.restarting:
        reasons = await why_not(run, name, host)
        if reasons:
            more = f" (and {len(reasons) - 1} more: pefbox can-migrate {name} {host})" if len(reasons) > 1 else ""
            raise UserError(f"{name} cannot move to {host}: {reasons[0]}{more}")
        vm = run.vms[name]
        move = vm.migration = Migration(
            name,
            vm.spec.host,
            host,
            vm.next_incarnation(),
            secure=vm.secure,
            by_monitor=by_monitor,
            parameters=checked,
        )
    run.log.info("migration", vm=name, source=move.source, host=host)
    run.nursery.start_soon(_carry_out, run, vm, move)
    return move


def asked_by_monitor(run: ClusterRun, vm: VmRecord, host: str) -> None:
    """A user of the VM's monitor wants it on `host`. Its qemu asks once: who asks more often is not heard."""
    if vm.asked_to_move:
        return
    vm.asked_to_move = True
    run.nursery.start_soon(_migrate_for_monitor, run, vm, host)


async def _migrate_for_monitor(run: ClusterRun, vm: VmRecord, host: str) -> None:
    try:
        await migrate(run, vm.spec.name, host, by_monitor=True)
    except UserError as error:
        await _tell_refusal(run, vm, str(error))
    finally:
        vm.asked_to_move = False


async def _tell_refusal(run: ClusterRun, vm: VmRecord, reason: str) -> None:
    await tell(run, run.child(vm.spec.name, Role.QEMU), "migration.refused", {"reason": reason})


def _checked(parameters: dict[str, Any]) -> dict[str, Any]:
    MigrationParameters().updated(parameters)
    return parameters


# -- carrying out ---------------------------------------------------------------------------------------------


async def _carry_out(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    try:
        async with run.restarting:
            if run.stopping:
                return
            await start(run, vm, move)
    except (PefboxError, OSError) as error:
        if not run.stopping:
            await _end(run, vm, move, Verdict.STAYED, str(error))
        return
    verdict = Verdict.STAYED if move.phase is Phase.STARTING else await _watch(run, vm, move)
    await _end(run, vm, move, verdict, move.reason)


async def _watch(run: ClusterRun, vm: VmRecord, move: Migration) -> Verdict:
    """Follow the source's qemu until it says how it ended, or is gone."""
    source = run.child(vm.spec.name, Role.QEMU)
    assert source is not None
    while not run.stopping:
        if move.home_end is not None or not source.is_running:
            return await _without_home(run, vm, move, source)
        if move.arrival_end is not None:
            # The source's qemu hears the end of its channel and gives up, if it still can.
            await end_all(run.incoming_children(vm.spec.name))
        verdict = _verdict_of(await _ask_source(source, move))
        if verdict is not None:
            return verdict
        await trio.sleep(_POLL_SECONDS)
    return Verdict.STOPPING


async def _without_home(run: ClusterRun, vm: VmRecord, move: Migration, source: Child) -> Verdict:
    """The VM is over where it lived, unless it has moved: what arrived there has all that ever comes."""
    verdict = _verdict_of(await _ask_source(source, move))
    if verdict in (Verdict.MOVED, Verdict.IN_DOUBT):
        return verdict
    await end_all(run.vm_children(vm.spec.name))
    if await arrival_word(run, vm) == MigrationStatus.COMPLETED:
        return Verdict.MOVED
    return Verdict.STOPPING if run.stopping else Verdict.STAYED


async def arrival_word(run: ClusterRun, vm: VmRecord) -> str:
    """The last word of the qemu where a VM arrives; waits for it, bounded. Empty when there is none."""
    incoming = run.incoming_child(vm.spec.name, Role.QEMU)
    with trio.move_on_after(_LAST_WORD_SECONDS):
        while incoming is not None and incoming.is_running and not run.stopping:
            word = _word(await ask(incoming, "migration.status", {}))
            if word in _LAST_WORDS:
                return word
            await trio.sleep(_POLL_SECONDS)
    return ""


async def _ask_source(source: Child, move: Migration) -> str:
    answer = await ask(source, "migration.status", {})
    if isinstance(answer, dict):
        move.note(answer)
    return _word(answer)


def _word(answer: object) -> str:
    word = answer.get("status") if isinstance(answer, dict) else None
    return word if isinstance(word, str) else ""


def _verdict_of(word: str) -> Verdict | None:
    if word == IN_DOUBT:
        return Verdict.IN_DOUBT
    if word not in _LAST_WORDS:
        return None
    return Verdict.MOVED if word == MigrationStatus.COMPLETED else Verdict.STAYED


async def _end(run: ClusterRun, vm: VmRecord, move: Migration, verdict: Verdict, reason: str) -> None:
    if run.stopping or verdict is Verdict.STOPPING:
        return
    async with run.restarting:
        if verdict is Verdict.MOVED:
            await commit(run, vm, move)
        elif verdict is Verdict.IN_DOUBT:
            _doubt(run, vm, move)
        else:
            await _stay(run, vm, move, reason)


async def _stay(run: ClusterRun, vm: VmRecord, move: Migration, reason: str) -> None:
    if move.by_monitor and move.phase is Phase.STARTING:
        await _tell_refusal(run, vm, reason or "cancelled")
    if (move.cancel_asked and move.home_end is None) or move.status == MigrationStatus.CANCELLED:
        await undo(run, vm, move, Phase.CANCELLED, "cancelled")
        return
    end = move.home_end or move.arrival_end
    if end is not None:
        # What the source's qemu says is what followed from it.
        reason = end.reason
    parts = [reason or "no reason was given", *await _refusals(run, vm, move)]
    await undo(run, vm, move, Phase.FAILED, "; ".join(parts))


async def _refusals(run: ClusterRun, vm: VmRecord, move: Migration) -> list[str]:
    """What the ultravisors have against it: qemu does not hear their reasons."""
    refusals = []
    for host in (move.source, move.host) if move.secure else ():
        answer = await ask(run.child(host, Role.ULTRAVISOR), "migration.status", {"vm": vm.spec.name})
        refusal = answer.get("refusal") if isinstance(answer, dict) else None
        if isinstance(refusal, str) and refusal:
            refusals.append(f"{host}/ultravisor: {printable(refusal)}")
    return refusals


def _doubt(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    name = vm.spec.name
    vm.change(VmState.PAUSED, f"nobody knows where it runs: pefbox recover {name}")
    move.phase, move.status = Phase.IN_DOUBT, IN_DOUBT
    run.report(f"{name}: nobody knows where it runs: pefbox recover {name}", vm=name)


# -- orders meanwhile -----------------------------------------------------------------------------------------


def _open_migration(vm: VmRecord) -> Migration:
    if vm.migration is None:
        raise UserError(f"{vm.spec.name} is not on its way anywhere")
    if vm.in_doubt:
        raise UserError(f"nobody knows where {vm.spec.name} runs: pefbox recover {vm.spec.name}")
    return vm.migration


async def cancel(run: ClusterRun, name: str) -> None:
    """Have a VM stay where it is; raises UserError when it does not move, or too late."""
    vm = run.vm_named(name)
    move = _open_migration(vm)
    if move.phase is Phase.STARTING:
        move.cancel_asked = True
        return
    if _word(await _order(run, vm, "migration.cancel", {})) == MigrationStatus.COMPLETED:
        raise UserError(f"too late: {name} runs on {move.host}")


async def set_parameters(run: ClusterRun, name: str, parameters: dict[str, Any]) -> None:
    """Change the limits of a migration that is under way; raises UserError."""
    vm = run.vm_named(name)
    move = _open_migration(vm)
    move.parameters |= _checked(parameters)
    if move.phase is not Phase.STARTING:
        await _order(run, vm, "migration.set", {"parameters": parameters})


def job_info(run: ClusterRun, name: str) -> MigrationFacts:
    """Of the migration that is under way, or of the last one; raises UserError when there was none."""
    vm = run.vm_named(name)
    facts = vm.last_migration if vm.migration is None else vm.migration.facts()
    if facts is None:
        raise UserError(f"{name} has not moved since the cluster was started")
    return facts


async def _order(run: ClusterRun, vm: VmRecord, what: str, arguments: dict[str, Any]) -> object:
    qemu = run.child(vm.spec.name, Role.QEMU)
    assert qemu is not None
    return await qemu.order(what, arguments)


async def tell(run: ClusterRun, child: Child | None, what: str, arguments: dict[str, Any]) -> None:
    """As an order, and a process that does not take it is only noted."""
    if child is None:
        return
    try:
        await child.query(what, arguments, _ORDER_SECONDS)
    except (PeerGone, QueryRefused) as error:
        run.log.error("not told", process=child.target, what=what, reason=str(error))
