"""Who waits for a process that a debugger holds, directly or through others, and what stands still meanwhile.

Processes are asked for their open calls a few times a second, only while somebody is held. Who has one open to a held
process, or to one that waits for it, is `waiting`, and its own peers are as patient with it. So is a guest
whose time is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import trio

from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.states import ProcessState
from deploy.supervise import set_state
from protocol import control
from protocol.errors import PeerGone
from protocol.roles import Role

_POLL_SECONDS = 0.2
_ASK_SECONDS = 0.2


def holders(run: ClusterRun) -> list[Child]:
    """The processes that stand still for a debugger, or keep a message that a break has stopped."""
    return [child for child in run.living() if child.holds]


def hold_time(run: ClusterRun) -> None:
    """Have the processors of every VM stand still that depends on a held process, and the others run."""
    held = [child for child in run.living() if child.debugger is not None and child.debugger.held]
    for vm in run.vms.values():
        guest = run.child(vm.spec.name, Role.GUEST)
        if guest is None or not guest.is_running or not guest.has_keys:
            continue
        wanted = any(_concerns(child, vm) for child in held if child is not guest)
        if wanted is not guest.time_held:
            guest.time_held = wanted
            _tell(run, guest, wanted)


def _tell(run: ClusterRun, guest: Child, wanted: bool) -> None:
    try:
        guest.channel.send(control.HoldTime(wanted))
    except PeerGone as gone:
        run.log.warning("time is not held", process=guest.target, reason=str(gone))


def _concerns(child: Child, vm: VmRecord) -> bool:
    return child.plan.vm == vm.spec.name or (child.plan.vm is None and child.plan.host == vm.spec.host)


def follow_waits(run: ClusterRun) -> None:
    """Keep the states of those who wait up to date, for as long as somebody is held."""
    if not run.following_waits:
        run.following_waits = True
        run.nursery.start_soon(_follow, run)


async def _follow(run: ClusterRun) -> None:
    try:
        while held := holders(run):
            calls = await _open_calls(run)
            waits = {**_stand_still(run, held), **who_waits([child.target for child in held], calls)}
            for child in run.living():
                _set(run, child, waits.get(child.target))
            await trio.sleep(_POLL_SECONDS)
    finally:
        run.following_waits = False
        for child in run.living():
            _set(run, child, None)


def _stand_still(run: ClusterRun, held: list[Child]) -> dict[str, str]:
    """The guests whose time is held, each with the process that holds it."""
    found = {}
    for vm in run.vms.values():
        guest = run.child(vm.spec.name, Role.GUEST)
        holder = next((child for child in held if _concerns(child, vm) and child is not guest), None)
        if guest is not None and guest.time_held and holder is not None:
            found[guest.target] = holder.target
    return found


def _set(run: ClusterRun, child: Child, root: str | None) -> None:
    if root is not None and child.state is ProcessState.RUNNING and not child.holds:
        set_state(run, child, ProcessState.WAITING, f"waiting for {root}")
    elif root is None and child.state is ProcessState.WAITING:
        set_state(run, child, child.settled_state, child.settled_detail)
    elif root is not None and child.state is ProcessState.WAITING:
        child.detail = f"waiting for {root}"


def who_waits(held: Iterable[str], open_calls: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """For each process that waits, the held one that it waits for in the end.

    `open_calls` are the peers to which each process has calls open.
    """
    roots = {target: target for target in held}
    found = True
    while found:
        found = False
        for target, peers in open_calls.items():
            root = next((roots[peer] for peer in peers if peer in roots), None)
            if target not in roots and root is not None:
                roots[target] = root
                found = True
    return {target: root for target, root in roots.items() if target not in set(held)}


async def _open_calls(run: ClusterRun) -> dict[str, list[str]]:
    answers: dict[str, list[str]] = {}

    async def ask(child: Child) -> None:
        try:
            answers[child.target] = _peers_called(await child.query("statistics", {}, _ASK_SECONDS))
        except (PeerGone, QueryRefused):
            return

    async with trio.open_nursery() as nursery:
        for child in run.living():
            if child.state.answers:
                nursery.start_soon(ask, child)
    return answers


def _peers_called(links: Any) -> list[str]:  # noqa: ANN401
    """The peers to which calls are open, of what a process says of its links: checked, not trusted."""
    if not isinstance(links, dict):
        return []
    rows = [row for row in links.values() if isinstance(row, dict)]
    return [str(row.get("peer")) for row in rows if row.get("open_calls")]
