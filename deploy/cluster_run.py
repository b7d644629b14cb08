"""The state of a running cluster: its processes, VMs, hosts, segments and what is known of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from deploy.child import SERVICE_MODULE, Child
from deploy.cluster_file import Cluster, HostSpec, VmSpec
from deploy.manifest import Manifest
from deploy.memory_segments import create_segment, segment_name, unlink_segment
from deploy.plan import ConfigFrame, cluster_processes
from deploy.run_dirs import Paths
from deploy.states import printable
from protocol.roles import Role
from protocol.vm_state import VmState
from services.runtime.log import Log


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How a cluster is started. `service_module` names what `python -m` runs for a role."""

    record: bool = False
    debug: bool = False
    service_module: str = SERVICE_MODULE


@dataclass(slots=True)
class VmRecord:
    """What the launcher knows of a VM. `last_kvm` and `last_ultravisor` are the page counts they last answered."""

    spec: VmSpec
    incarnation: int = 0
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

    def change(self, state: VmState, reason: str = "") -> bool:
        """Note a new state; a lost VM keeps its last one until it is restarted."""
        reason = printable(reason)
        if self.lost or (self.state is state and self.reason == reason):
            return False
        self.state, self.reason, self.since_s = state, reason, time.time()
        return True

    def begin(self, segment: str) -> None:
        """The next incarnation starts."""
        self.incarnation += 1
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
        self.log = log
        self.frame = ConfigFrame(cluster, paths, options.record, options.debug)
        self.hosts = {host.name: HostRecord(host) for host in cluster.hosts}
        self.vms = {vm.name: VmRecord(vm) for vm in cluster.vms}
        self.children: dict[str, Child] = {}
        self.dead: list[Child] = []
        self.order = [process.target for process in cluster_processes(cluster)]
        self.stop_requested = trio.Event()
        self.healthy = False
        self.stopping = False
        self.restarting = trio.Lock()
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

    def child(self, owner: str, role: Role) -> Child | None:
        """The process of that role of a host or VM, alive or dead."""
        return self.children.get(f"{owner}/{role.value}")

    def vm_children(self, vm: str) -> list[Child]:
        """Guest and qemu of a VM."""
        found = (self.child(vm, role) for role in (Role.GUEST, Role.QEMU))
        return [child for child in found if child is not None]

    def host_children(self, host: str) -> list[Child]:
        """All processes on a host."""
        return [child for child in self.children.values() if child.plan.host == host]

    def living(self) -> list[Child]:
        """Every process that still exists, replaced ones too."""
        return [child for child in (*self.children.values(), *self.dead) if child.is_running]

    def adopt(self, child: Child) -> None:
        """`child` takes the place of an earlier process of its target."""
        earlier = self.children.get(child.target)
        if earlier is not None and earlier.is_running:
            self.dead.append(earlier)
        self.children[child.target] = child

    def new_segment(self, vm: VmRecord) -> int:
        """A zeroed RAM segment for the next incarnation of `vm`, its old one unlinked; returns the descriptor."""
        old, name = vm.segment, segment_name(self.cluster.name, vm.spec.name)
        self.manifest.add_segment(name)
        fd = create_segment(name, vm.spec.memory_bytes)
        vm.begin(name)
        if old:
            self.drop_segment(old)
        return fd

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
