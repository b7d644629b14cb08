"""The beginning of a migration: guest and qemu where the VM arrives, linked with their host and with the VM's qemu.

The VM runs on meanwhile. What is started here has RAM, keys and directories of its own, and counts for nothing until
`deploy.migration_end` makes it the VM's home.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import trio

from deploy import plan
from deploy.child import Child
from deploy.cluster_run import ClusterRun, OpenFiles, VmRecord
from deploy.keepers import add_vm
from deploy.link_orders import tell_links
from deploy.memory_segments import reserve_as_used
from deploy.migration_record import DiskHold, Migration, Phase
from deploy.plan import LinkPlan, ProcessPlan
from deploy.start import (
    add_shared_files,
    configure,
    hand_over_keys,
    make_keys,
    open_process_files,
    replace_links,
    spawn_all,
    start_time_limit,
)
from deploy.status import ask
from protocol import control
from protocol.errors import HostFault, UserError
from protocol.roles import Role
from services.qemu.migration.status import MigrationStatus
from services.runtime.first_error import first_error_nursery

SOURCE_GIFT, DESTINATION_GIFT = "migration-source", "migration-destination"
_CHANNEL_BYTES = 4 << 20
_START_SECONDS = 5.0
_BUILT_SECONDS = 15.0
_POLL_SECONDS = 0.02
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # Linux asm-generic/socket.h; not in Python's socket


async def start(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    """Start the processes of `vm` on `move.host` and have the source's qemu begin. Raises PefboxError.

    What was made until then is for `migration_end.undo` to remove.
    """
    source = _source_qemu(run, vm)
    processes = _incoming(vm, move)
    links = _links(run, vm, move)
    children = await spawn_all(run, processes, links)
    with start_time_limit(children), OpenFiles() as files:
        _prepare_memory(run, vm, move, files)
        await open_process_files(run, processes, files)
        _hold_disks(vm, move, f"{vm.spec.name}/{Role.QEMU.value}", files)
        ring = make_keys(links)
        await add_vm(run, move.host, vm.spec.name, ring, files)
        async with first_error_nursery() as nursery:
            nursery.start_soon(_reserve_memory, vm, files)
            nursery.start_soon(_expect_pages, run, vm, move)
            await configure(run, children, ring, files)
        await hand_over_keys(run, children, ring)
    incoming = next(child for child in children if child.plan.role is Role.QEMU)
    await _until_built(move, incoming)
    tell_links(run)
    replace_links(run, source, ring)
    _give_channel(vm, source, incoming)
    if move.by_monitor and await _was_cancelled(source):
        move.cancel_asked = True
    if move.cancel_asked:
        return
    parameters = dict(move.parameters)
    arguments: dict[str, Any] = {"host": move.host, "parameters": parameters, "by_monitor": move.by_monitor}
    await source.query("migration.start", arguments, _START_SECONDS)
    move.phase = Phase.MOVING
    if move.parameters != parameters:
        # Just when it was begun.
        source.tell("migration.set", {"parameters": move.parameters})
    if move.cancel_asked:
        # Just when it was begun.
        await source.query("migration.cancel", {}, _START_SECONDS)


def _source_qemu(run: ClusterRun, vm: VmRecord) -> Child:
    qemu = run.child(vm.spec.name, Role.QEMU)
    if qemu is None or not qemu.is_running:
        raise UserError(f"{vm.spec.name}/{Role.QEMU.value} is gone")
    return qemu


def _incoming(vm: VmRecord, move: Migration) -> list[ProcessPlan]:
    return [ProcessPlan(role, move.host, vm.spec.name, move.incarnation) for role in (Role.QEMU, Role.GUEST)]


def _links(run: ClusterRun, vm: VmRecord, move: Migration) -> list[LinkPlan]:
    """Those with the keepers there, and the one between the two qemus; networks follow when the VM lives there."""
    qemu = ProcessPlan(Role.QEMU, move.host, vm.spec.name, move.incarnation)
    links = plan.vm_links(run.paths, move.host, vm.spec.name, move.incarnation)
    return [*links, plan.migration_link(run.paths, vm.spec.host, qemu)]


def _prepare_memory(run: ClusterRun, vm: VmRecord, move: Migration, files: OpenFiles) -> None:
    move.segment, fd = run.make_segment(vm)
    files.add(f"ram:{vm.spec.name}", fd)
    add_shared_files(vm.spec.name, files)


async def _reserve_memory(vm: VmRecord, files: OpenFiles) -> None:
    """While the processes start: what does not fit is found before anything is sent, and is made before it comes."""
    await trio.to_thread.run_sync(reserve_as_used, files[f"ram:{vm.spec.name}"], vm.segment)


async def _expect_pages(run: ClusterRun, vm: VmRecord, move: Migration) -> None:
    """The same for secure memory, as far as the two ultravisors say: it is made in the background."""
    if not move.secure:
        return
    touched = await ask(run.child(vm.spec.host, Role.ULTRAVISOR), "migration.pages", {"vm": vm.spec.name})
    if isinstance(touched, dict):
        arguments = {"vm": vm.spec.name, **touched}
        await ask(run.child(move.host, Role.ULTRAVISOR), "migration.expect", arguments)


def _hold_disks(vm: VmRecord, move: Migration, target: str, files: OpenFiles) -> None:
    for disk in vm.spec.disks:
        move.disks.append(DiskHold(disk.path, disk.readonly, os.dup(files[f"disk:{disk.name}@{target}"])))


async def _until_built(move: Migration, incoming: Child) -> None:
    """A qemu that is ready still makes its devices, and takes nothing of a migration before; raises PefboxError."""
    with trio.move_on_after(_BUILT_SECONDS):
        while move.arrival_end is None and incoming.is_running:
            if await ask(incoming, "migration.status", {}) is not None:
                return
            await trio.sleep(_POLL_SECONDS)
    end = move.arrival_end
    why = end.reason if end is not None else f"it made no devices within {_BUILT_SECONDS:g} s"
    raise UserError(f"{incoming.target} on {move.host}: {why}")


async def _was_cancelled(source: Child) -> bool:
    """Whether the user of the monitor who asked for it wants it no more."""
    answer = await ask(source, "migration.status", {})
    return isinstance(answer, dict) and answer.get("status") == MigrationStatus.CANCELLED


def _give_channel(vm: VmRecord, source: Child, incoming: Child) -> None:
    """The two ends of the way for the bulk, which the launcher keeps no end of. Raises HostFault, PeerGone."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise HostFault(f"no channel between the two qemus: {error.strerror}") from None
    with ours, theirs:
        for end in (ours, theirs):
            _enlarge(end)
        name = vm.spec.name
        incoming.channel.send(control.Gift(DESTINATION_GIFT, name, Role.LAUNCHER.value), [theirs.fileno()])
        source.channel.send(control.Gift(SOURCE_GIFT, name, Role.LAUNCHER.value), [ours.fileno()])


def _enlarge(end: socket.socket) -> None:
    """Large buffers, as large as this machine lets us have them."""
    for forced, option in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            end.setsockopt(socket.SOL_SOCKET, forced, _CHANNEL_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, option, _CHANNEL_BYTES)
