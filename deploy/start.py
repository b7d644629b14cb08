"""Starting processes: the sequence of protocol.control, for a whole cluster, a host, or one VM.

Each process is forked from a template that has loaded its modules, or loads them itself (deploy.spawn). Each gets its
configuration and open files, confines itself, and only when every one of them is confined are secret keys handed out,
who binds before who connects.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import trio
import zmq

from deploy import plan
from deploy.child import Child
from deploy.cluster_file import VmSpec
from deploy.cluster_run import ClusterRun, OpenFiles
from deploy.files import open_to_append, told_by_line
from deploy.gifts import release_held
from deploy.identity_files import identity_of, open_ledger
from deploy.link_orders import tell_links
from deploy.plan import KeyRing, LinkPlan, ProcessPlan
from deploy.recorders import tell_recording
from deploy.states import ProcessState
from deploy.supervise import serve_child
from deploy.trace.appending import open_appending
from protocol import control
from protocol.errors import PeerGone, UserError
from protocol.roles import Role
from protocol.startup import Keys, VmEntry
from services.runtime.first_error import first_error_nursery
from services.ultravisor.audit import open_audit_file
from shared.stream_buffer import make_stream_buffer

START_SECONDS = 30.0
_STDERR_TAIL_BYTES = 4096


class StartFailed(UserError):
    """A process of the cluster did not come up."""


async def start_cluster(run: ClusterRun) -> None:
    """Start everything; returns when all processes are ready. Raises StartFailed."""
    links = plan.cluster_links(run.cluster, run.paths)
    await start_group(run, plan.cluster_processes(run.cluster), list(run.vms), links)


async def start_group(run: ClusterRun, processes: list[ProcessPlan], vms: list[str], links: list[LinkPlan]) -> None:
    """Start `processes`, which are all ends of `links`, with new RAM for `vms`."""
    children = await spawn_all(run, processes, links)
    with start_time_limit(children), OpenFiles() as files:
        prepare_vms(run, vms, files)
        await open_process_files(run, processes, files)
        ring = make_keys(links)
        await configure(run, children, ring, files)
        replace_network_links(run, children, links, ring)
        await hand_over_keys(run, children, ring)


@contextmanager
def start_time_limit(children: list[Child]) -> Iterator[None]:
    """Bound a start to START_SECONDS; raises StartFailed that names who is not ready, UserError for what the machine
    refuses."""
    with told_by_line(), trio.move_on_after(START_SECONDS) as scope:
        yield
    if scope.cancelled_caught:
        late = ", ".join(f"{child.target} ({child.state.value})" for child in children if not child.ready.is_set())
        raise StartFailed(f"not ready after {START_SECONDS:g} s: {late}")


async def spawn_all(run: ClusterRun, processes: Iterable[ProcessPlan], links: Iterable[LinkPlan]) -> list[Child]:
    """Start the processes and serve their control sockets; each is in the manifest before it hears anything.

    Raises UserError; those that were started until then are known.
    """
    with told_by_line():
        children = [await _spawn_one(run, process) for process in processes]
        prepare_links(run, links)
    return children


async def _spawn_one(run: ClusterRun, process: ProcessPlan) -> Child:
    make_dir(run.paths.process_dir(process.place))
    if run.stopping:
        raise StartFailed(f"{process.target} was not started: the cluster stops")
    # A process that exists is known: nothing breaks this off in between.
    with trio.CancelScope(shield=True):
        child = await run.spawner.spawn(process, run.paths)
        child.exit_expected = run.stopping
        if is_incoming(run, process):
            run.incoming[child.target] = child
        else:
            run.adopt(child)
        run.manifest.add_process(process.target, child.pid)
        run.nursery.start_soon(serve_child, run, child)
    return child


def is_incoming(run: ClusterRun, process: ProcessPlan) -> bool:
    """Whether `process` is of a VM that lives on another host yet."""
    return process.vm is not None and run.vms[process.vm].spec.host != process.host


def prepare_links(run: ClusterRun, links: Iterable[LinkPlan]) -> None:
    """Directories to bind in; and both ends have a peer of whose state they are told."""
    for link in links:
        make_dir(link.directory)
        upper, lower = link.ends
        for (target, host), (peer, _) in ((upper, lower), (lower, upper)):
            child = run.at(target, host)
            if child is not None:
                child.peers.add(peer)


def prepare_vms(run: ClusterRun, vms: Iterable[str], files: OpenFiles) -> None:
    """Zeroed RAM and a new private socketpair between ultravisor and guest, for the next incarnation of each VM."""
    for name in vms:
        files.add(f"ram:{name}", run.new_segment(run.vms[name]))
        add_shared_files(name, files)


def add_shared_files(vm: str, files: OpenFiles) -> None:
    """What processes of one incarnation of a VM have in common beside its RAM."""
    stream = make_stream_buffer(vm)
    files.add(f"stream:{vm}", os.dup(stream.fd))
    stream.close()
    upper, lower = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files.add(f"secure:{vm}/{Role.ULTRAVISOR.value}", upper.detach())
    files.add(f"secure:{vm}/{Role.GUEST.value}", lower.detach())


async def open_process_files(run: ClusterRun, processes: Iterable[ProcessPlan], files: OpenFiles) -> None:
    """Logs, traces, audit logs, disks and images, by name and target."""
    for process in processes:
        target = process.target
        files.add(f"log@{target}", open_to_append(run.paths.log_file(target)))
        # In a thread: the file of an earlier incarnation is looked through.
        files.add(f"trace@{target}", await trio.to_thread.run_sync(open_appending, run.paths.trace_file(process.place)))
        if process.role is Role.ULTRAVISOR:
            files.add(f"audit@{target}", open_audit_file(run.paths.state_dir, process.host))
            files.add(f"ledger@{target}", open_ledger(run.paths.ledger(process.host)))
        if process.role is Role.QEMU and process.vm is not None:
            _open_disks(run.vms[process.vm].spec, target, files, lock=not is_incoming(run, process))


def _open_disks(vm: VmSpec, target: str, files: OpenFiles, *, lock: bool) -> None:
    """Disks and images of a qemu. Those of one where the VM arrives are locked by the qemu that it leaves."""
    for disk in vm.disks:
        fd = _open_user_file(disk.path, os.O_RDONLY if disk.readonly else os.O_RDWR)
        files.add(f"disk:{disk.name}@{target}", fd)
        if lock and not lock_disk(fd, readonly=disk.readonly):
            raise UserError(f"{disk.path}: is in use by another VM or cluster")
    for name, path in plan.guest_files(vm.guest).items():
        files.add(f"{name}@{target}", _open_user_file(path, os.O_RDONLY))


def lock_disk(fd: int, *, readonly: bool) -> bool:
    """Lock a disk for the open file of `fd`, which qemu holds as long as it lives; False when others have it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_keys(links: Iterable[LinkPlan]) -> KeyRing:
    """A new CURVE key pair for each end of each link."""
    links = list(links)
    pairs = {}
    for link in links:
        for end in plan.End:
            public, secret = zmq.curve_keypair()
            pairs[link.id, end] = (public.decode(), secret.decode())
    return KeyRing(links, pairs)


def entry_of(run: ClusterRun, vm: str, host: str) -> VmEntry:
    """What the processes of a VM on `host` are told of its incarnation there."""
    record = run.vms[vm]
    move = record.migration
    if move is not None and host != record.spec.host:
        return plan.vm_entry(record.spec, move.incarnation, move.segment, incoming=True)
    restoring = record.snapshot is not None and record.snapshot.restores
    return plan.vm_entry(record.spec, record.incarnation, record.segment, restoring=restoring)


async def configure(run: ClusterRun, children: list[Child], ring: KeyRing, files: OpenFiles) -> None:
    """Give each process its configuration and files; returns when all are confined."""
    async with first_error_nursery() as nursery:
        for child in children:
            nursery.start_soon(_configure_one, run, child, ring, files)


async def _configure_one(run: ClusterRun, child: Child, ring: KeyRing, files: OpenFiles) -> None:
    await _wait(run, child, child.hello)
    entries = [entry_of(run, vm.name, child.plan.host) for vm in plan.vms_known_to(child.plan, run.cluster)]
    frame = replace(run.frame, record=run.recorders.wants(child.target))
    config = plan.process_config(frame, child.plan, entries, ring.entries(child.plan))
    descriptors = [files[key] for key in file_keys(child.plan, config.descriptors)]
    child.channel.send(control.Start(config), descriptors)
    await _wait(run, child, child.confined)


def file_keys(process: ProcessPlan, names: Iterable[str]) -> list[str]:
    """Under which key each descriptor of a process lies in `OpenFiles`."""
    keys = []
    for name in names:
        if name.startswith(("ram:", "stream:")):
            keys.append(name)
        elif name.startswith("secure:"):
            keys.append(f"{name}/{process.role.value}")
        else:
            keys.append(f"{name}@{process.target}")
    return keys


def replace_network_links(run: ClusterRun, started: list[Child], links: Iterable[LinkPlan], ring: KeyRing) -> None:
    """Tell VMs that go on of their links to those that are being started."""
    new = {child.target for child in started}
    ends = {end for link in links if link.network is not None for end in link.ends}
    for target, host in sorted(end for end in ends if end[0] not in new):
        child = run.at(target, host)
        if child is not None:
            replace_links(run, child, ring)


def replace_links(run: ClusterRun, child: Child, ring: KeyRing) -> None:
    """Tell `child` of its ends of the links of `ring`."""
    try:
        child.channel.send(control.ReplaceLinks(ring.entries(child.plan), ring.keys(child.plan)))
    except PeerGone as gone:
        # It is on its way out, or has not read its socket for long: its own restart links it again.
        run.log.warning("link not replaced", process=child.target, reason=str(gone))


async def hand_over_keys(run: ClusterRun, children: list[Child], ring: KeyRing) -> None:
    """Give each process its secret keys, in `START_ORDER`; returns when all are ready."""
    for role in plan.START_ORDER:
        group = [child for child in children if child.plan.role is role]
        for child in group:
            keys = ring.keys(child.plan)
            if role is Role.ULTRAVISOR:
                keys = Keys(links=keys.links, identity=identity_of(run.cluster, run.paths.state_dir, child.plan.host))
            child.channel.send(control.TakeKeys(keys))
            child.has_keys = True
            release_held(child)
            tell_recording(run, child)
        tell_links(run)
        async with first_error_nursery() as nursery:
            for child in group:
                nursery.start_soon(_wait, run, child, child.ready)


async def _wait(run: ClusterRun, child: Child, event: trio.Event) -> None:
    """Wait for `event` of a starting process; raises StartFailed when it ends first."""
    async with trio.open_nursery() as nursery:

        async def end_of_process() -> None:
            await child.exited.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(end_of_process)
        await event.wait()
        nursery.cancel_scope.cancel()
    if not event.is_set():
        raise StartFailed(_why_not_started(run, child))


def _why_not_started(run: ClusterRun, child: Child) -> str:
    """A process that was ended because another failed may be looked at before that one: the other is named."""
    near = [other for other in run.host_children(child.plan.host) if other.plan.vm in (None, child.plan.vm)]
    failed = [other for other in near if other.state is ProcessState.FAILED]
    if not child.exit_expected or not failed:
        return f"{child.target} did not start: {child.detail}{_stderr_tail(run, child)}"
    first = min(failed, key=lambda other: other.since_s)
    reason = f"{first.detail}{_stderr_tail(run, first)}"
    if first.ready.is_set():
        return f"{child.target} did not start: {first.target} failed: {reason}"
    return f"{first.target} did not start: {reason}"


def _stderr_tail(run: ClusterRun, child: Child) -> str:
    """The last line that the process wrote to standard error."""
    try:
        data = run.paths.stderr_file(child.plan.place).read_bytes()[-_STDERR_TAIL_BYTES:]
    except OSError:
        return ""
    lines = data.decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""


def make_dir(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _open_user_file(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
