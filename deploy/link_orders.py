"""Orders about the links between hosts, and what qemus are told of their shapes.

A qemu is told only what differs from what it heard last, and a new one starts without any shape: a cluster whose links
are all plain hears nothing of this.
"""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun
from deploy.host_links import LinkRow
from protocol.errors import PeerGone, UserError
from protocol.roles import Role
from shared.link_shape import PLAIN, LinkChanges, LinkShapes, fault_of

TELL = "link.shape"
_TELL_SECONDS = 2.0


async def link(run: ClusterRun, between: list[str], changes: dict[str, Any]) -> LinkRow:
    """The link between two hosts, changed first if there is something to change; raises UserError."""
    one, other = _ends(run, between)
    wanted = _changes(changes)
    shape = wanted.applied_to(run.links.between(one, other))
    fault = fault_of(shape)
    if fault is not None:
        raise UserError(f"{fault[0]}: {fault[1]}")
    if wanted != LinkChanges():
        run.links.change(one, other, shape)
        run.log.info("link changed", between=[one, other], shape=msgspec.structs.asdict(shape))
        await _tell_and_wait(run)
    return run.links.row(one, other)


def _ends(run: ClusterRun, between: list[str]) -> tuple[str, str]:
    for name in between:
        run.host_named(name)
    if len(between) != 2 or between[0] == between[1]:
        raise UserError("a link is between two different hosts")
    return between[0], between[1]


def _changes(changes: dict[str, Any]) -> LinkChanges:
    try:
        return msgspec.convert(changes, LinkChanges)
    except msgspec.ValidationError as error:
        raise UserError(f"link: {error}") from None


# -- what qemus are told --------------------------------------------------------------------------------------


def tell_links(run: ClusterRun) -> None:
    """Tell every qemu for which something is different now; what it hears later comes after this."""
    for child, shapes in _news(run):
        try:
            child.tell(TELL, _arguments(child, shapes))
        except PeerGone as gone:
            # It is on its way out: the next one is told when it starts.
            run.log.warning("shape of links not told", process=child.target, reason=str(gone))


async def _tell_and_wait(run: ClusterRun) -> None:
    """The same, and returns when those that answer have taken it."""
    async with trio.open_nursery() as nursery:
        for child, shapes in _news(run):
            nursery.start_soon(_tell_one, run, child, shapes)


async def _tell_one(run: ClusterRun, child: Child, shapes: LinkShapes) -> None:
    arguments = _arguments(child, shapes)
    try:
        if child.state.answers:
            await child.query(TELL, arguments, _TELL_SECONDS)
        else:
            child.tell(TELL, arguments)
    except (PeerGone, QueryRefused) as error:
        run.log.warning("shape of links not told", process=child.target, reason=str(error))


def _news(run: ClusterRun) -> list[tuple[Child, LinkShapes]]:
    """What is new to whom; a process that has no keys yet is told when it gets them."""
    news = []
    for child in (*run.children.values(), *run.incoming.values()):
        if child.plan.role is not Role.QEMU or not child.is_running or not child.has_keys:
            continue
        shapes = shapes_for(run, child)
        if (shapes.peers, shapes.migration) != (child.link_shapes.peers, child.link_shapes.migration):
            news.append((child, msgspec.structs.replace(shapes, number=run.links.next_number())))
    return news


def _arguments(child: Child, shapes: LinkShapes) -> dict[str, Any]:
    child.link_shapes = shapes
    arguments: dict[str, Any] = msgspec.to_builtins(shapes)
    return arguments


def shapes_for(run: ClusterRun, child: Child) -> LinkShapes:
    """The shapes of the ways from a qemu to those of the other VMs of its networks, and to where its VM moves."""
    assert child.plan.vm is not None
    vm = run.vms[child.plan.vm]
    networks = {device.network for device in vm.spec.devices if device.network is not None}
    peers = {}
    for other in run.vms.values():
        shape = run.links.between(child.plan.host, other.spec.host)
        if other is vm or shape.is_plain or networks.isdisjoint(device.network for device in other.spec.devices):
            continue
        peers[f"{other.spec.name}/{Role.QEMU.value}"] = shape
    move = vm.migration
    way = PLAIN if move is None else run.links.between(move.source, move.host)
    return LinkShapes(peers=peers, migration=None if way.is_plain else way)
