"""The state of a running cluster: its processes, VMs, hosts, segments and what is known of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from deploy.child import Child
from deploy.cluster_file import Cluster, VmSpec
from deploy.cluster_hosts import HostSpec
from deploy.host_links import HostLinks
from deploy.manifest import Manifest
from deploy.memory_segments import create_segment, segment_name, unlink_segment
from deploy.migration_record import Migration, MigrationFacts, Phase
from deploy.plan import ConfigFrame, ProcessPlan, cluster_processes, is_debuggable
from deploy.recorders import Recorders
from deploy.run_dirs import Paths
from deploy.snapshot_job import SnapshotFacts, SnapshotJob
from deploy.spawn import SERVICE_MODULE, Spawner
from deploy.states import printable
from deploy.template import Templates
from protocol.errors import UserError
from protocol.roles import Role
from protocol.vm_state import VmState
from services.runtime.log import Log

if TYPE_CHECKING:
    from deploy.breaks import Breaks


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How a cluster is started. `debug` lets debuggers into every host process and qemu, `debuggable` into those named;
    `service_module` names what `python -m` runs for a role."""

    record: bool = False
    debug: bool = False
    debuggable: frozenset[str] = frozenset()
    service_module: str = SERVICE_MODULE


@dataclass(slots=True)
class VmRecord:
    """What the launcher knows of a VM. `last_kvm` and `last_ultravisor` are the page counts they last answered.

    `move` is as in `ProcessPlan`; `newest` is the highest incarnation that was ever given out.
    """

    spec: VmSpec
    incarnation: int = 0
    newest: int = 0
    move: int = 0
    migration: Migration | None = None
    asked_to_move: bool = False
    """Its monitor's user waits to hear whether it can."""
    last_migration: MigrationFacts | None = None
    snapshot: SnapshotJob | None = None
    """The one that is being taken of it, or that it is restored from."""
    last_snapshot: SnapshotFacts | None = None
    state: VmState = VmState.STARTING
    since_s: float = field(default_factory=time.time)
    reason: str = ""
    lost: bool = False
    """Its processes are gone or told to go: only a restart helps."""
    secure: bool = False
    segment: str = ""
    being_removed: bool = False
    """While an incarnation is removed, its last descriptors and notices must not reach the next."""
    last_kvm: dict[str, int] = field(default_factory=dict)
    last_ultravisor: dict[str, int] = field(default_factory=dict)
    last_esm: Any = None
    last_network: Any = None
    last_balloon: Any = None
    last_memory_mode: str | None = None
    """Of the secure memory that it has now."""
    last_machine: Any = None

    @property
    def in_doubt(self) -> bool:
        """Whether nobody knows on which of two hosts it runs."""
        return self.migration is not None and self.migration.phase is Phase.IN_DOUBT

    def change(self, state: VmState, reason: str = "") -> bool:
        """Note a new state; a lost VM keeps its last one until it is restarted, one in doubt until that is over."""
        reason = printable(reason)
        if self.lost or self.in_doubt or (self.state is state and self.reason == reason):
            return False
        self.state, self.reason, self.since_s = state, reason, time.time()
        return True

    def next_incarnation(self) -> int:
        """A number that no incarnation has had, not even one that came to nothing."""
        self.newest += 1
        return self.newest

    def arrive(self, migration: Migration) -> None:
        """It lives where `migration` led from now on."""
        self.spec = msgspec.structs.replace(self.spec, host=migration.host)
        self.incarnation = self.move = migration.incarnation
        self.segment = migration.segment
        self.lost = False
        self.last_kvm, self.last_ultravisor = {}, {}
        self.last_esm = self.last_network = self.last_balloon = None

    def begin(self, segment: str) -> None:
        """The next incarnation starts."""
        self.incarnation = self.next_incarnation()
        self.state, self.reason, self.since_s = VmState.STARTING, "", time.time()
        self.lost, self.secure, self.segment = False, False, segment
        self.last_kvm, self.last_ultravisor = {}, {}
        self.last_esm = self.last_network = self.last_balloon = None
        self.last_memory_mode, self.last_machine = None, None


@dataclass(slots=True)
class HostRecord:
    """What the launcher knows of a host. `last_account` is the ultravisor's last answer to `account`."""

    spec: HostSpec
    incarnation: int = 1
    last_account: dict[str, Any] = field(default_factory=dict)


class ClusterRun:
    """A cluster that is being started, runs, or is being stopped."""

    def __init__(self, cluster: Cluster, paths: Paths, options: LaunchOptions, manifest: Manifest, log: Log) -> None:
        self.cluster, self.paths, self.options = cluster, paths, options
        self.manifest = manifest
        self.on_event: Callable[[str], None] = lambda text: None
        self.on_migrate: Callable[[VmRecord, str], None] = lambda vm, host: None
        """A VM's monitor was told to move it to a host."""
        self.log = log
        self.spawner = Spawner(options.service_module, log)
        self.recorders = Recorders(always=options.record)
        self.frame = ConfigFrame(cluster, paths, options.record, options.debug, options.debuggable)
        self.hosts = {host.name: HostRecord(host) for host in cluster.hosts}
        self.links = HostLinks(cluster.links)
        self.vms = {vm.name: VmRecord(vm) for vm in cluster.vms}
        self.children: dict[str, Child] = {}
        self.incoming: dict[str, Child] = {}
        """Guest and qemu where a VM arrives, by target, until they take over from those in `children`."""
        self.dead: list[Child] = []
        self.order = [process.target for process in cluster_processes(cluster)]
        self.stop_requested = trio.Event()
        self.told_early = False
        """Whether it was told to stop before the loop could hear of it."""
        self.healthy = False
        self.stopping = False
        self.restarting = trio.Lock()
        self.breaks: Breaks | None = None
        self.following_waits = False
        """Whether somebody looks who waits for a held process."""
        self._nursery: trio.Nursery | None = None

    @property
    def nursery(self) -> trio.Nursery:
        """Tasks that live as long as the launcher."""
        assert self._nursery is not None
        return self._nursery

    @nursery.setter
    def nursery(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def report(self, text: str, **facts: object) -> None:
        """Tell the operator something and log it."""
        self.log.warning(text, **facts)
        self.on_event(printable(text))

    def use_templates(self, templates: Templates) -> None:
        """Have processes forked from these, which end with the cluster."""
        for template in templates.living:
            self.manifest.add_process(template.name, template.pid)
        self.spawner.templates = templates

    @property
    def unready(self) -> str | None:
        """None, or why nothing can be begun with the cluster now."""
        return "the cluster is starting or stopping" if self.stopping or not self.healthy else None

    def refuse_unready(self) -> None:
        """Raise UserError while the cluster is `unready`."""
        if self.unready is not None:
            raise UserError(self.unready)

    def vm_named(self, name: str) -> VmRecord:
        """The VM; raises UserError for an unknown one."""
        vm = self.vms.get(name)
        if vm is None:
            raise UserError(f'no VM "{name}"; there are: {", ".join(self.vms)}')
        return vm

    def host_named(self, name: str) -> HostRecord:
        """The host; raises UserError for an unknown one."""
        host = self.hosts.get(name)
        if host is None:
            raise UserError(f'no host "{name}"; there are: {", ".join(self.hosts)}')
        return host

    def is_debuggable(self, process: ProcessPlan) -> bool:
        """Whether a debugger may enter the process."""
        return is_debuggable(process, self.frame)

    def child(self, owner: str, role: Role) -> Child | None:
        """The process of that role of a host or VM, alive or dead."""
        return self.children.get(f"{owner}/{role.value}")

    def at(self, target: str, host: str) -> Child | None:
        """The process of that target on that host, alive or dead: of a VM on its way there are two."""
        for child in (self.children.get(target), self.incoming.get(target)):
            if child is not None and child.plan.host == host:
                return child
        return None

    def is_current(self, child: Child) -> bool:
        """Whether nothing has taken the place of `child`."""
        return self.at(child.target, child.plan.host) is child

    def peers_of(self, child: Child) -> list[Child]:
        """The processes at the other ends of its links, as far as they are current."""
        found = (self._peer_of(child, target) for target in child.peers)
        return [peer for peer in found if peer is not None]

    def _peer_of(self, child: Child, target: str) -> Child | None:
        if target == child.target:
            # The two qemus of a VM on its way.
            both = (self.children.get(target), self.incoming.get(target))
            return next((other for other in both if other is not None and other is not child), None)
        if child.plan.vm is not None and target.partition("/")[0] in self.vms:
            # Another VM of a network: where a VM arrives it is on none yet.
            return self.children.get(target)
        return self.at(target, child.plan.host)

    def vm_children(self, vm: str) -> list[Child]:
        """Guest and qemu of a VM."""
        found = (self.child(vm, role) for role in (Role.GUEST, Role.QEMU))
        return [child for child in found if child is not None]

    def incoming_child(self, vm: str, role: Role) -> Child | None:
        """The process of that role where a VM arrives."""
        return self.incoming.get(f"{vm}/{role.value}")

    def incoming_children(self, vm: str) -> list[Child]:
        """Guest and qemu where a VM arrives."""
        found = (self.incoming_child(vm, role) for role in (Role.GUEST, Role.QEMU))
        return [child for child in found if child is not None]

    def host_children(self, host: str) -> list[Child]:
        """All processes on a host."""
        every = (*self.children.values(), *self.incoming.values())
        return [child for child in every if child.plan.host == host]

    def living(self) -> list[Child]:
        """Every process that still exists, replaced ones and those of VMs that arrive too."""
        every = (*self.children.values(), *self.incoming.values(), *self.dead)
        return [child for child in every if child.is_running]

    def adopt(self, child: Child) -> None:
        """`child` takes the place of an earlier process of its target."""
        earlier = self.children.get(child.target)
        if earlier is not None and earlier.is_running:
            self.dead.append(earlier)
        self.children[child.target] = child

    def settle(self, vm: VmRecord, migration: Migration) -> list[Child]:
        """`vm` lives where it arrived: its processes there take over. Returns those that it had before."""
        earlier = self.vm_children(vm.spec.name)
        vm.arrive(migration)
        vms = [vm.spec if spec.name == vm.spec.name else spec for spec in self.cluster.vms]
        self.cluster = msgspec.structs.replace(self.cluster, vms=vms)
        self.frame = replace(self.frame, cluster=self.cluster)
        for child in self.incoming_children(vm.spec.name):
            del self.incoming[child.target]
            self.adopt(child)
        return earlier

    def moving(self, host: str) -> list[VmRecord]:
        """The VMs that leave a host or come to it now."""
        moves = ((vm, vm.migration) for vm in self.vms.values())
        return [vm for vm, move in moves if move is not None and host in (move.source, move.host)]

    def new_segment(self, vm: VmRecord) -> int:
        """A zeroed RAM segment for the next incarnation of `vm`, its old one unlinked; returns the descriptor."""
        old = vm.segment
        name, fd = self.make_segment(vm)
        vm.begin(name)
        if old:
            self.drop_segment(old)
        return fd

    def make_segment(self, vm: VmRecord) -> tuple[str, int]:
        """A zeroed RAM segment beside the one that `vm` has; its name and descriptor."""
        name = segment_name(self.cluster.name, vm.spec.name)
        self.manifest.add_segment(name)
        return name, create_segment(name, vm.spec.memory_bytes)

    def drop_segment(self, name: str) -> None:
        """Unlink a RAM segment."""
        unlink_segment(name)
        self.manifest.drop_segment(name)


class OpenFiles:
    """Descriptors by name, for one or several processes; all are closed at the end of the `with`."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def add(self, name: str, fd: int) -> None:
        """Own `fd` under `name`."""
        self._open[name] = fd

    def __getitem__(self, name: str) -> int:
        return self._open[name]

    def close(self, name: str) -> None:
        """Close one early."""
        os.close(self._open.pop(name))
