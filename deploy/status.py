"""What `pefbox status` shows: asked of the processes in parallel, bounded, with the last known answer otherwise."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from deploy import plan
from deploy.child import QUERY_SECONDS, Child, QueryRefused
from deploy.cluster_run import ClusterRun, HostRecord, VmRecord
from deploy.host_links import LinkRow
from deploy.migration_record import MigrationFacts
from deploy.supervise import take_vm_state
from protocol import control
from protocol.errors import PeerGone
from protocol.geometry import PAGE_BYTES
from protocol.roles import Role

_OWING_SECONDS = 0.05
PAGE_KINDS = ("normal", "secure", "shared", "paged_out")


class KvmVmStatus(msgspec.Struct, kw_only=True):
    """kvm's answer to `vm.status`; what it says is checked, not trusted."""

    state: str
    secure: bool
    pages: dict[str, int] = {}
    failure: str | None = None


class UltravisorVmStatus(msgspec.Struct, kw_only=True):
    """The ultravisor's answer to `vm.status`."""

    secure: bool
    last_esm: Any = None
    pages: dict[str, int] | None = None
    memory_mode: str | None = None


class Traffic(msgspec.Struct, kw_only=True):
    """Frames and bytes that came to the VM and went from it, and what was dropped, by reason."""

    received_frames: int
    received_bytes: int
    sent_frames: int
    sent_bytes: int
    dropped: dict[str, int]


class NetworkCard(Traffic, kw_only=True):
    """A virtio-net of a VM."""

    network: str
    mac: str


class NetworkPeer(Traffic, kw_only=True):
    """Another VM of a network, as a VM's qemu sees it: `up`, or what became of its qemu."""

    vm: str
    state: str


class NetworkEnd(msgspec.Struct, kw_only=True):
    """A VM's end of a network; `addresses` have been learnt."""

    network: str
    addresses: int
    peers: list[NetworkPeer]


class NetworkStatus(msgspec.Struct, kw_only=True):
    """A qemu's answer to `network.status`."""

    devices: list[NetworkCard] = []
    networks: list[NetworkEnd] = []


class BalloonStatus(msgspec.Struct, kw_only=True):
    """A qemu's answer to `balloon.status`: how much memory the guest has and is to have, and kvm's word on it.

    `discarded_bytes` is what the host really has back; `reason` says why the balloon does nothing, or refused its
    driver; `stats` are the guest's own, empty when it tells none.
    """

    memory_bytes: int
    actual_bytes: int
    target_bytes: int
    discarded_bytes: int = 0
    reason: str | None = None
    stats: dict[str, int] = {}


class ProcessRow(msgspec.Struct, kw_only=True):
    """A process; a dead one keeps its row. `since` is in seconds since the epoch."""

    role: str
    target: str
    pid: int
    state: str
    since: float
    detail: str
    protections: dict[str, str]


class VmRow(msgspec.Struct, kw_only=True):
    """A VM. `pages` counts are None until they were heard of, and when it is over; `reason` says why it failed;
    `balloon` is None where it has none; `migration` while it is on its way, and `arriving` are its processes there, as
    `vm1/qemu@beta`."""

    name: str
    lpid: int
    incarnation: int
    state: str
    secure: bool
    since: float
    reason: str
    debuggable: bool
    qmp: str | None
    last_esm: Any
    pages: dict[str, int | None]
    network: NetworkStatus
    balloon: BalloonStatus | None
    processes: list[ProcessRow]
    migration: MigrationFacts | None = None
    arriving: list[ProcessRow] = []


class HostRow(msgspec.Struct, kw_only=True):
    """A host; `account` is the ultravisor's last answer about its secure memory."""

    name: str
    incarnation: int
    account: dict[str, Any]
    processes: list[ProcessRow]
    vms: list[VmRow]


class ClusterStatus(msgspec.Struct, kw_only=True):
    """A whole cluster."""

    cluster: str
    healthy: bool
    recording: bool
    run_dir: str
    state_dir: str
    hosts: list[HostRow]
    links: list[LinkRow]


async def gather_status(run: ClusterRun) -> ClusterStatus:
    """Ask every process that answers, then say what is known."""
    await refresh(run)
    return status_now(run)


def status_now(run: ClusterRun) -> ClusterStatus:
    """What is known without asking anybody."""
    return ClusterStatus(
        cluster=run.cluster.name,
        healthy=run.healthy,
        recording=run.recorders.any,
        run_dir=str(run.paths.run_dir),
        state_dir=str(run.paths.state_dir),
        hosts=[_host_row(run, host) for host in run.hosts.values()],
        links=run.links.rows(),
    )


async def refresh(run: ClusterRun) -> None:
    """Bring what is known of VMs and accounts up to date, in parallel and bounded."""
    async with trio.open_nursery() as nursery:
        for host in run.hosts.values():
            nursery.start_soon(_refresh_account, run, host)
        for vm in run.vms.values():
            nursery.start_soon(refresh_vm, run, vm)


async def refresh_vm(run: ClusterRun, vm: VmRecord) -> None:
    """The same for one VM."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refresh_from_kvm, run, vm)
        nursery.start_soon(_refresh_from_ultravisor, run, vm)
        if any(device.network is not None for device in vm.spec.devices):
            nursery.start_soon(_refresh_network, run, vm)
        if _has_balloon(vm):
            nursery.start_soon(_refresh_balloon, run, vm)


async def _refresh_account(run: ClusterRun, host: HostRecord) -> None:
    answer = await ask(run.child(host.spec.name, Role.ULTRAVISOR), "account", {})
    if isinstance(answer, dict):
        host.last_account = answer


async def _refresh_from_kvm(run: ClusterRun, vm: VmRecord) -> None:
    answer = await ask(run.child(vm.spec.host, Role.KVM), "vm.status", {"vm": vm.spec.name})
    try:
        status = msgspec.convert(answer, KvmVmStatus)
    except msgspec.ValidationError:
        return
    vm.last_kvm = status.pages
    ultravisor = run.child(vm.spec.host, Role.ULTRAVISOR)
    if ultravisor is None or not ultravisor.state.answers:
        # Where the ultravisor can be asked, kvm's word on this does not count.
        vm.secure = status.secure and not vm.lost
    take_vm_state(vm, status.state, status.failure or "")


async def _refresh_from_ultravisor(run: ClusterRun, vm: VmRecord) -> None:
    answer = await ask(run.child(vm.spec.host, Role.ULTRAVISOR), "vm.status", {"vm": vm.spec.name})
    try:
        status = msgspec.convert(answer, UltravisorVmStatus)
    except msgspec.ValidationError:
        return
    move = vm.migration
    if move is not None and move.is_open and move.secure and not status.secure:
        # It has left its home, and whether it runs where it goes is known when the migration ends.
        return
    vm.last_ultravisor = status.pages or {}
    vm.last_esm = status.last_esm
    vm.secure = status.secure and not vm.lost
    vm.last_memory_mode = status.memory_mode


async def _refresh_network(run: ClusterRun, vm: VmRecord) -> None:
    answer = await ask(run.child(vm.spec.name, Role.QEMU), "network.status", {})
    try:
        vm.last_network = msgspec.convert(answer, NetworkStatus)
    except msgspec.ValidationError:
        return


async def _refresh_balloon(run: ClusterRun, vm: VmRecord) -> None:
    answer = await ask(run.child(vm.spec.name, Role.QEMU), "balloon.status", {})
    try:
        vm.last_balloon = msgspec.convert(answer, BalloonStatus)
    except msgspec.ValidationError:
        return


def _has_balloon(vm: VmRecord) -> bool:
    return any(device.kind == "virtio-balloon" for device in vm.spec.devices)


async def ask(child: Child | None, what: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
    """What a process answers; None when it does not, or cannot be asked."""
    if child is None:
        return None
    try:
        # Who owes the answer to a ping will hardly give this one: `status` must not be late with what it knows.
        owes = child.silent_seconds() > control.HEARTBEAT_SECONDS
        return await child.query(what, arguments, _OWING_SECONDS if owes else QUERY_SECONDS)
    except (PeerGone, QueryRefused):
        return None


def process_row(child: Child) -> ProcessRow:
    """What is known of one process."""
    return ProcessRow(
        role=child.plan.role.value,
        target=child.target,
        pid=child.pid,
        state=child.state.value,
        since=child.since_s,
        detail=child.detail,
        protections=child.protections,
    )


def _host_row(run: ClusterRun, host: HostRecord) -> HostRow:
    name = host.spec.name
    children = [run.child(name, role) for role in (Role.ULTRAVISOR, Role.KVM)]
    return HostRow(
        name=name,
        incarnation=host.incarnation,
        account=host.last_account,
        processes=[process_row(child) for child in children if child is not None],
        vms=[_vm_row(run, vm) for vm in run.vms.values() if vm.spec.host == name],
    )


def _vm_row(run: ClusterRun, vm: VmRecord) -> VmRow:
    qemu = plan.ProcessPlan(Role.QEMU, vm.spec.host, vm.spec.name, vm.move)
    known = {} if vm.lost else {**vm.last_kvm, **vm.last_ultravisor}
    return VmRow(
        name=vm.spec.name,
        lpid=vm.spec.lpid,
        incarnation=vm.incarnation,
        state=vm.state.value,
        secure=vm.secure,
        since=vm.since_s,
        reason=vm.reason,
        debuggable=vm.spec.debuggable,
        qmp=plan.monitor_sockets(run.paths, qemu)[0],
        last_esm=vm.last_esm,
        pages={kind: known.get(kind) for kind in PAGE_KINDS},
        network=vm.last_network or NetworkStatus(),
        balloon=_balloon(vm),
        processes=[process_row(child) for child in reversed(run.vm_children(vm.spec.name))],
        migration=None if vm.migration is None else vm.migration.facts(),
        arriving=[_arriving_row(child) for child in reversed(run.incoming_children(vm.spec.name))],
    )


def arriving_name(child: Child) -> str:
    """What a process where a VM arrives is called: there is another of its target."""
    return f"{child.target}@{child.plan.host}"


def _arriving_row(child: Child) -> ProcessRow:
    return msgspec.structs.replace(process_row(child), target=arriving_name(child))


def _balloon(vm: VmRecord) -> BalloonStatus | None:
    """As last heard; empty at first."""
    if not _has_balloon(vm):
        return None
    n_bytes = vm.spec.memory_bytes
    known = vm.last_balloon or BalloonStatus(memory_bytes=n_bytes, actual_bytes=n_bytes, target_bytes=n_bytes)
    return msgspec.structs.replace(known, discarded_bytes=vm.last_kvm.get("discarded", 0) * PAGE_BYTES)
