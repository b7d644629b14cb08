"""A VM of which nobody knows where it runs: the operator's `recover` carries each side's word to the other.

Of a secure VM the ultravisors know, and their words are signed: who carries them is trusted with nothing. Of a normal
one its qemus are asked.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from deploy.answers import answer_of
from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.migrate import arrival_word
from deploy.migration_end import commit, end_arrival, undo
from deploy.migration_record import Migration, Phase
from deploy.states import printable
from deploy.status import refresh_vm
from protocol.errors import PeerGone, UserError
from protocol.roles import Role
from services.qemu.migration.status import MigrationStatus

_WORD_SECONDS = 10.0
_RESUME_SECONDS = 5.0


class WordAnswer(msgspec.Struct, kw_only=True):
    """A signed word of an ultravisor, in hex; None: it has given none.

    The source also names the migration, in hex, and says why it cannot give a token that it may have given before.
    """

    word: str | None
    session: str = ""
    withheld: str = ""


class MovedAnswer(msgspec.Struct, kw_only=True):
    """What the source makes of the destination's word."""

    moved: bool


async def recover(run: ClusterRun, vm: VmRecord) -> str:
    """Find out where `vm` runs and leave it there alone; returns its host. Raises UserError while nobody can tell."""
    async with run.restarting:
        move = vm.migration
        if run.stopping or move is None or not vm.in_doubt:
            raise UserError(f"{vm.spec.name} is not in doubt: it is on {vm.spec.host}")
        if await _has_moved(run, vm, move):
            # It may have heard nothing: the right to run went to its ultravisor.
            _tell_late(run.incoming_child(vm.spec.name, Role.QEMU), "migration.has-started")
            await commit(run, vm, move)
        else:
            # What arrived is ended first: never do two run. A VM that does not go on stays in doubt.
            await end_arrival(run, vm, move)
            if move.home_end is None:
                await _resume(run, vm)
            await undo(run, vm, move, Phase.FAILED, "it was in doubt, and did not arrive")
            await refresh_vm(run, vm)
    return vm.spec.host


async def _resume(run: ClusterRun, vm: VmRecord) -> None:
    """Have the VM go on where it was; raises UserError when it does not."""
    qemu = run.child(vm.spec.name, Role.QEMU)
    if qemu is None or not qemu.is_running:
        return
    if not qemu.state.answers:
        _tell_late(qemu, "migration.resume")
        return
    try:
        await qemu.query("migration.resume", {}, _RESUME_SECONDS)
    except (QueryRefused, PeerGone) as error:
        vm.reason = printable(f"it does not go on: {error}: pefbox recover {vm.spec.name}")
        raise UserError(f"{vm.spec.name} stands still on {vm.spec.host}: {error}") from None


def _tell_late(child: Child | None, what: str) -> None:
    """Tell a process something that it finds even when it stands still now."""
    if child is not None:
        with contextlib.suppress(PeerGone):
            child.tell(what, {})


async def _has_moved(run: ClusterRun, vm: VmRecord, move: Migration) -> bool:
    source = run.child(move.source, Role.ULTRAVISOR)
    if move.secure and source is not None and not source.state.is_over:
        return await _carry_words(run, vm, move)
    word = await arrival_word(run, vm)
    incoming = run.incoming_child(vm.spec.name, Role.QEMU)
    if not word and incoming is not None and incoming.is_running:
        raise UserError(f"{incoming.target} on {move.host} is {incoming.state.value} and does not say what it has")
    return word == MigrationStatus.COMPLETED


async def _carry_words(run: ClusterRun, vm: VmRecord, move: Migration) -> bool:
    source, destination = (run.child(host, Role.ULTRAVISOR) for host in (move.source, move.host))
    name = vm.spec.name
    given = await answer_of(source, "migration.word", {"vm": name, "as": "source"}, WordAnswer, _WORD_SECONDS)
    if given.withheld and move.home_end is not None:
        # Only the destination has the VM, which must not give it up: the token may be had later.
        raise UserError(f"{move.source}/ultravisor cannot give {name} its start token: {printable(given.withheld)}")
    if given.word is not None:
        order: tuple[str, dict[str, Any]] = (
            "migration.take",
            {"vm": name, "as": "destination", "word": given.word},
        )
    else:
        order = ("migration.abandon", {"vm": name, "session": given.session})
    back = await answer_of(destination, *order, WordAnswer, _WORD_SECONDS)
    if back.word is None:
        # No token was given, and nothing is there that it could start.
        return False
    arguments = {"vm": name, "as": "source", "word": back.word}
    return (await answer_of(source, "migration.take", arguments, MovedAnswer, _WORD_SECONDS)).moved
