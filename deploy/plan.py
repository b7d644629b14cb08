"""Which processes and links a cluster has, and what each process is told: pure computation.

Nothing here touches the machine. Keys are made by the caller and only placed here. A VM's links carry its incarnation
in name and path, so the ends of an earlier incarnation can never meet those of the next. While a VM moves, two
processes of one target live, on two hosts: what tells them apart is the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from pathlib import Path
from zlib import crc32

from deploy.cluster_file import Cluster, VmSpec
from deploy.run_dirs import Paths
from protocol.links import (
    KVM_GUEST,
    KVM_QEMU,
    QEMU_MIGRATION,
    QEMU_QEMU,
    ULTRAVISOR_GUEST,
    ULTRAVISOR_KVM,
    LinkKind,
)
from protocol.roles import Role
from protocol.startup import GuestEntry, Keys, LinkEntry, LinkKey, ProcessConfig, VmEntry

START_ORDER = (Role.ULTRAVISOR, Role.KVM, Role.GUEST, Role.QEMU)
"""Keys are handed over in this order: who binds comes before who connects, and qemu, which starts its VM, last."""

_USER_MONITOR, _OWN_MONITOR = "qmp.sock", "pefbox.sock"

KeyPair = tuple[str, str]
"""Public and secret CURVE key, Z85."""


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process. `vm` is set for qemu and guest.

    `move` is the incarnation in which the VM came from another host; 0: it has never moved.
    """

    role: Role
    host: str
    vm: str | None = None
    move: int = 0

    @property
    def target(self) -> str:
        """Its name for people: `alpha/kvm`, `vm1/guest`."""
        return f"{self.vm or self.host}/{self.role.value}"

    @property
    def place(self) -> str:
        """What its directories are named by: unlike the target, of one process at any time."""
        return f"{self.target}.{self.move}" if self.move else self.target


class End(Enum):
    """The two ends of a link; targets do not tell them apart, since a VM on its way has two qemus of one name."""

    UPPER = "upper"
    LOWER = "lower"

    @property
    def other(self) -> End:
        """The peer's."""
        return End.LOWER if self is End.UPPER else End.UPPER


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """One link; `upper` binds below `directory`. `hosts` are those of upper and lower end.

    A link of a `network` is of the VM at each end.
    """

    id: str
    kind: LinkKind
    upper: str
    lower: str
    hosts: tuple[str, str]
    vm: str | None
    directory: Path
    network: str | None = None

    @property
    def endpoint(self) -> str:
        """Where ZeroMQ binds and connects."""
        return f"ipc://{self.socket_path}"

    @property
    def socket_path(self) -> Path:
        """The Unix socket of the link."""
        return self.directory / "s"

    @property
    def ends(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Target and host of the upper and of the lower end."""
        return (self.upper, self.hosts[0]), (self.lower, self.hosts[1])

    def end_of(self, process: ProcessPlan) -> End | None:
        """Which end is `process`; None when neither is."""
        for end, place in zip(End, self.ends, strict=True):
            if place == (process.target, process.host):
                return end
        return None

    def target_of(self, end: End) -> str:
        """The process at that end."""
        return self.upper if end is End.UPPER else self.lower

    def vm_of(self, target: str) -> str | None:
        """Which VM the end of `target` belongs to; None for a link between host processes."""
        return self.vm if self.network is None else target.partition("/")[0]


def host_processes(host: str) -> list[ProcessPlan]:
    """The processes that a host has once."""
    return [ProcessPlan(Role.ULTRAVISOR, host), ProcessPlan(Role.KVM, host)]


def vm_processes(vm: VmSpec, move: int = 0) -> list[ProcessPlan]:
    """The processes of one VM."""
    return [ProcessPlan(role, vm.host, vm.name, move) for role in (Role.QEMU, Role.GUEST)]


def cluster_processes(cluster: Cluster) -> list[ProcessPlan]:
    """All processes of a cluster."""
    of_hosts = [process for host in cluster.hosts for process in host_processes(host.name)]
    return of_hosts + [process for vm in cluster.vms for process in vm_processes(vm)]


def host_link(paths: Paths, host: str, incarnation: int) -> LinkPlan:
    """The link between a host's ultravisor and its kvm."""
    upper, lower = f"{host}/ultravisor", f"{host}/kvm"
    directory = paths.process_dir(upper) / f"kvm.{incarnation}"
    link_id = f"{host}:{ULTRAVISOR_KVM.name}.{incarnation}"
    return LinkPlan(link_id, ULTRAVISOR_KVM, upper, lower, (host, host), None, directory)


def vm_links(paths: Paths, host: str, vm: str, incarnation: int) -> list[LinkPlan]:
    """The three links of one incarnation of a VM."""
    links = []
    for kind in (KVM_GUEST, ULTRAVISOR_GUEST, KVM_QEMU):
        upper, lower = f"{host}/{kind.upper.value}", f"{vm}/{kind.lower.value}"
        directory = paths.process_dir(upper) / f"{vm}.{kind.lower.value}.{incarnation}"
        links.append(LinkPlan(f"{vm}:{kind.name}.{incarnation}", kind, upper, lower, (host, host), vm, directory))
    return links


def migration_link(paths: Paths, source: str, incoming: ProcessPlan) -> LinkPlan:
    """Between the two qemus of a VM that moves away from host `source`: the incoming one binds."""
    directory = paths.process_dir(incoming.place) / "m"
    link_id = f"{incoming.vm}:{QEMU_MIGRATION.name}.{incoming.move}"
    target = incoming.target
    return LinkPlan(link_id, QEMU_MIGRATION, target, target, (incoming.host, source), incoming.vm, directory)


def network_links(
    paths: Paths, cluster: Cluster, incarnations: Mapping[str, int], moves: Mapping[str, int] | None = None
) -> list[LinkPlan]:
    """The links between the VMs named in `incarnations`, one a pair and network that they share.

    `moves` has `ProcessPlan.move` of those that have moved.
    """
    links = []
    for number, network in enumerate(cluster.networks):
        members = [vm for vm in cluster.vms_on(network.name) if vm.name in incarnations]
        for upper, lower in combinations(members, 2):
            n_upper, n_lower = incarnations[upper.name], incarnations[lower.name]
            binding = ProcessPlan(Role.QEMU, upper.host, upper.name, (moves or {}).get(upper.name, 0))
            # Numbers, not names: the path of a Unix socket is short.
            directory = paths.process_dir(binding.place) / f"n{number}.{lower.lpid}.{n_upper}.{n_lower}"
            link = LinkPlan(
                id=f"network.{network.name}:{upper.name}+{lower.name}.{n_upper}.{n_lower}",
                kind=QEMU_QEMU,
                upper=binding.target,
                lower=f"{lower.name}/{Role.QEMU.value}",
                hosts=(upper.host, lower.host),
                vm=None,
                directory=directory,
                network=network.name,
            )
            links.append(link)
    return links


def cluster_links(cluster: Cluster, paths: Paths) -> list[LinkPlan]:
    """All links of a cluster's first incarnation."""
    links = [host_link(paths, host.name, 1) for host in cluster.hosts]
    for vm in cluster.vms:
        links += vm_links(paths, vm.host, vm.name, 1)
    return links + network_links(paths, cluster, {vm.name: 1 for vm in cluster.vms})


class KeyRing:
    """The CURVE key pairs of some links: one pair an end. Dropped as soon as the ends have theirs."""

    def __init__(self, links: Iterable[LinkPlan], pairs: Mapping[tuple[str, End], KeyPair]) -> None:
        """`pairs` maps (link id, end) to the pair of that end."""
        self._links = list(links)
        self._pairs = pairs

    def entries(self, process: ProcessPlan) -> list[LinkEntry]:
        """What `process` is told of its links: public keys only."""
        return [self._entry(link, end) for link, end in self._ends_of(process)]

    def keys(self, process: ProcessPlan) -> Keys:
        """The secret keys of the ends of `process`."""
        keys = []
        for link, end in self._ends_of(process):
            public, secret = self._pairs[link.id, end]
            keys.append(LinkKey(link=link.id, public_key=public, secret_key=secret))
        return Keys(links=keys)

    def _ends_of(self, process: ProcessPlan) -> list[tuple[LinkPlan, End]]:
        ends = ((link, link.end_of(process)) for link in self._links)
        return [(link, end) for link, end in ends if end is not None]

    def _entry(self, link: LinkPlan, end: End) -> LinkEntry:
        public, _ = self._pairs[link.id, end.other]
        return LinkEntry(
            id=link.id,
            kind=link.kind.name,
            endpoint=link.endpoint,
            vm=link.vm_of(link.target_of(end)),
            peer=link.target_of(end.other),
            peer_public_key=public,
            binds=end is End.UPPER,
            network=link.network,
        )


def vm_entry(
    vm: VmSpec, incarnation: int, ram_segment: str, *, incoming: bool = False, restoring: bool = False
) -> VmEntry:
    """What every process of a VM is told about it."""
    return VmEntry(
        name=vm.name,
        lpid=vm.lpid,
        incarnation=incarnation,
        memory_bytes=vm.memory_bytes,
        ram_segment=ram_segment,
        time=vm.time,
        secure_allowed=vm.secure_allowed,
        debuggable=vm.debuggable,
        guest=vm.guest,
        disks=vm.disks,
        devices=vm.devices,
        dma=vm.dma,
        incoming=incoming,
        restoring=restoring,
    )


GUEST_FILES = ("image", "initrd", "esm_blob", "firmware")


def guest_files(guest: GuestEntry) -> dict[str, str]:
    """The files that qemu loads before the VM starts, by descriptor name."""
    paths = {name: getattr(guest, name) for name in GUEST_FILES}
    return {name: path for name, path in paths.items() if path is not None}


def vm_descriptors(role: Role, vm: VmSpec) -> list[str]:
    """The descriptors that a process of `role` gets for one VM."""
    names = [f"ram:{vm.name}"]
    if role is not Role.GUEST:
        names.append(f"stream:{vm.name}")
    if role in (Role.ULTRAVISOR, Role.GUEST):
        names.append(f"secure:{vm.name}")
    if role is Role.QEMU:
        names += [f"disk:{disk.name}" for disk in vm.disks] + list(guest_files(vm.guest))
    return names


def descriptors(process: ProcessPlan, cluster: Cluster) -> list[str]:
    """The descriptors that come with `Start`, in order."""
    names = ["log", "trace"]
    if process.role is Role.ULTRAVISOR:
        names += ["audit", "ledger"]
    for vm in vms_known_to(process, cluster):
        names += vm_descriptors(process.role, vm)
    return names


def vms_known_to(process: ProcessPlan, cluster: Cluster) -> list[VmSpec]:
    """The VMs that a process serves: its own, wherever the cluster says that it is now, or all of its host."""
    if process.vm is None:
        return cluster.vms_of(process.host)
    return [vm for vm in cluster.vms if vm.name == process.vm]


def monitor_sockets(paths: Paths, process: ProcessPlan) -> tuple[str | None, str | None]:
    """The QMP socket for users and the one for pefbox; qemu alone has them."""
    if process.role is not Role.QEMU:
        return None, None
    directory = paths.process_dir(process.place)
    return str(directory / _USER_MONITOR), str(directory / _OWN_MONITOR)


def own_monitor(user_monitor: str) -> str:
    """The QMP socket for pefbox beside the one for users, which `status` shows."""
    return str(Path(user_monitor).with_name(_OWN_MONITOR))


@dataclass(frozen=True, slots=True)
class ConfigFrame:
    """What the configurations of all processes of a cluster have in common."""

    cluster: Cluster
    paths: Paths
    record: bool
    debug: bool
    debuggable: frozenset[str] = frozenset()


def is_debuggable(process: ProcessPlan, frame: ConfigFrame) -> bool:
    """Whether a debugger may enter: every host process with `up --debug`, a guest only where its VM says so."""
    if process.role is Role.GUEST:
        vm = frame.cluster.vm(process.vm) if process.vm is not None else None
        return vm is not None and vm.debuggable
    return frame.debug or process.target in frame.debuggable


def process_config(
    frame: ConfigFrame, process: ProcessPlan, vms: list[VmEntry], links: list[LinkEntry]
) -> ProcessConfig:
    """The start configuration of one process."""
    cluster, paths = frame.cluster, frame.paths
    host = cluster.host(process.host)
    is_ultravisor = process.role is Role.ULTRAVISOR
    monitor, control_monitor = monitor_sockets(paths, process)
    return ProcessConfig(
        cluster=cluster.name,
        host=process.host,
        role=process.role.value,
        target=process.target,
        run_dir=str(paths.process_dir(process.place)),
        state_dir=str(paths.state_dir),
        log_file=str(paths.log_file(process.target)),
        trace_file=str(paths.trace_file(process.place)),
        record=frame.record,
        debuggable=is_debuggable(process, frame),
        secure_memory_bytes=host.secure_memory_bytes if host is not None and is_ultravisor else 0,
        seed=cluster.seed ^ crc32(process.target.encode()),
        vms=vms,
        links=links,
        descriptors=descriptors(process, cluster),
        monitor_socket=monitor,
        control_monitor_socket=control_monitor,
    )
