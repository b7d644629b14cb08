"""Which processes and links a cluster has, and what each process is told: pure computation.

Nothing here touches the machine. Keys are made by the caller and only placed here. A VM's links carry its incarnation
in name and path, so the ends of an earlier incarnation can never meet those of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from zlib import crc32

from deploy.cluster_file import Cluster, VmSpec
from deploy.run_dirs import Paths
from protocol.links import KVM_GUEST, KVM_QEMU, QEMU_QEMU, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, LinkKind
from protocol.roles import Role
from protocol.startup import GuestEntry, Keys, LinkEntry, LinkKey, ProcessConfig, VmEntry

START_ORDER = (Role.ULTRAVISOR, Role.KVM, Role.GUEST, Role.QEMU)
"""Keys are handed over in this order: who binds comes before who connects, and qemu, which starts its VM, last."""

KeyPair = tuple[str, str]
"""Public and secret CURVE key, Z85."""


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process. `vm` is set for qemu and guest."""

    role: Role
    host: str
    vm: str | None = None

    @property
    def target(self) -> str:
        """Its name for people: `alpha/kvm`, `vm1/guest`."""
        return f"{self.vm or self.host}/{self.role.value}"


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """One link; `upper` binds below `directory`. A link of a `network` is of the VM at each end."""

    id: str
    kind: LinkKind
    upper: str
    lower: str
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

    def peer_of(self, target: str) -> str:
        """The other end."""
        return self.lower if target == self.upper else self.upper

    def vm_of(self, target: str) -> str | None:
        """Which VM the end of `target` belongs to; None for a link between host processes."""
        return self.vm if self.network is None else target.partition("/")[0]


def host_processes(host: str) -> list[ProcessPlan]:
    """The processes that a host has once."""
    return [ProcessPlan(Role.ULTRAVISOR, host), ProcessPlan(Role.KVM, host)]


def vm_processes(vm: VmSpec) -> list[ProcessPlan]:
    """The processes of one VM."""
    return [ProcessPlan(Role.QEMU, vm.host, vm.name), ProcessPlan(Role.GUEST, vm.host, vm.name)]


def cluster_processes(cluster: Cluster) -> list[ProcessPlan]:
    """All processes of a cluster."""
    of_hosts = [process for host in cluster.hosts for process in host_processes(host.name)]
    return of_hosts + [process for vm in cluster.vms for process in vm_processes(vm)]


def host_link(paths: Paths, host: str, incarnation: int) -> LinkPlan:
    """The link between a host's ultravisor and its kvm."""
    upper, lower = f"{host}/ultravisor", f"{host}/kvm"
    directory = paths.process_dir(upper) / f"kvm.{incarnation}"
    return LinkPlan(f"{host}:{ULTRAVISOR_KVM.name}.{incarnation}", ULTRAVISOR_KVM, upper, lower, None, directory)


def vm_links(paths: Paths, host: str, vm: str, incarnation: int) -> list[LinkPlan]:
    """The three links of one incarnation of a VM."""
    links = []
    for kind in (KVM_GUEST, ULTRAVISOR_GUEST, KVM_QEMU):
        upper, lower = f"{host}/{kind.upper.value}", f"{vm}/{kind.lower.value}"
        directory = paths.process_dir(upper) / f"{vm}.{kind.lower.value}.{incarnation}"
        links.append(LinkPlan(f"{vm}:{kind.name}.{incarnation}", kind, upper, lower, vm, directory))
    return links


def network_links(paths: Paths, cluster: Cluster, incarnations: Mapping[str, int]) -> list[LinkPlan]:
    """The links between the VMs named in `incarnations`, one a pair and network that they share."""
    links = []
    for number, network in enumerate(cluster.networks):
        members = [vm for vm in cluster.vms_on(network.name) if vm.name in incarnations]
        for upper, lower in combinations(members, 2):
            n_upper, n_lower = incarnations[upper.name], incarnations[lower.name]
            binding, connecting = (f"{vm.name}/{Role.QEMU.value}" for vm in (upper, lower))
            # Numbers, not names: the path of a Unix socket is short.
            directory = paths.process_dir(binding) / f"n{number}.{lower.lpid}.{n_upper}.{n_lower}"
            link_id = f"network.{network.name}:{upper.name}+{lower.name}.{n_upper}.{n_lower}"
            links.append(LinkPlan(link_id, QEMU_QEMU, binding, connecting, None, directory, network.name))
    return links


def cluster_links(cluster: Cluster, paths: Paths) -> list[LinkPlan]:
    """All links of a cluster's first incarnation."""
    links = [host_link(paths, host.name, 1) for host in cluster.hosts]
    for vm in cluster.vms:
        links += vm_links(paths, vm.host, vm.name, 1)
    return links + network_links(paths, cluster, {vm.name: 1 for vm in cluster.vms})


class KeyRing:
    """The CURVE key pairs of some links: one pair an end. Dropped as soon as the ends have theirs."""

    def __init__(self, links: Iterable[LinkPlan], pairs: Mapping[tuple[str, str], KeyPair]) -> None:
        """`pairs` maps (link id, target) to the pair of that end."""
        self._links = list(links)
        self._pairs = pairs

    def entries(self, target: str) -> list[LinkEntry]:
        """What `target` is told of its links: public keys only."""
        return [self._entry(link, target) for link in self._links_of(target)]

    def keys(self, target: str) -> Keys:
        """The secret keys of `target`'s ends."""
        keys = []
        for link in self._links_of(target):
            public, secret = self._pairs[link.id, target]
            keys.append(LinkKey(link=link.id, public_key=public, secret_key=secret))
        return Keys(links=keys)

    def _links_of(self, target: str) -> list[LinkPlan]:
        return [link for link in self._links if target in (link.upper, link.lower)]

    def _entry(self, link: LinkPlan, target: str) -> LinkEntry:
        peer = link.peer_of(target)
        public, _ = self._pairs[link.id, peer]
        return LinkEntry(
            id=link.id,
            kind=link.kind.name,
            endpoint=link.endpoint,
            vm=link.vm_of(target),
            peer=peer,
            peer_public_key=public,
            binds=target == link.upper,
            network=link.network,
        )


def vm_entry(vm: VmSpec, incarnation: int, ram_segment: str) -> VmEntry:
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
    )


GUEST_FILES = ("image", "initrd", "esm_blob", "firmware")


def guest_files(guest: GuestEntry) -> dict[str, str]:
    """The files that qemu loads before the VM starts, by descriptor name."""
    paths = {name: getattr(guest, name) for name in GUEST_FILES}
    return {name: path for name, path in paths.items() if path is not None}


def vm_descriptors(role: Role, vm: VmSpec) -> list[str]:
    """The descriptors that a process of `role` gets for one VM."""
    names = [f"ram:{vm.name}"]
    if role in (Role.ULTRAVISOR, Role.GUEST):
        names.append(f"secure:{vm.name}")
    if role is Role.QEMU:
        names += [f"disk:{disk.name}" for disk in vm.disks] + list(guest_files(vm.guest))
    return names


def descriptors(process: ProcessPlan, cluster: Cluster) -> list[str]:
    """The descriptors that come with `Start`, in order."""
    names = ["log", "record"]
    if process.role is Role.ULTRAVISOR:
        names.append("audit")
    for vm in vms_known_to(process, cluster):
        names += vm_descriptors(process.role, vm)
    return names


def vms_known_to(process: ProcessPlan, cluster: Cluster) -> list[VmSpec]:
    """The VMs that a process serves: its own, or all of its host."""
    return [vm for vm in cluster.vms_of(process.host) if process.vm in (None, vm.name)]


def monitor_sockets(paths: Paths, process: ProcessPlan) -> tuple[str | None, str | None]:
    """The QMP socket for users and the one for pefbox; qemu alone has them."""
    if process.role is not Role.QEMU:
        return None, None
    directory = paths.process_dir(process.target)
    return str(directory / "qmp.sock"), str(directory / "pefbox.sock")


def is_debuggable(process: ProcessPlan, cluster: Cluster, debug: bool) -> bool:
    """Whether a debugger may enter: every host process with `up --debug`, a guest only where its VM says so."""
    vm = cluster.vm(process.vm) if process.vm is not None else None
    if process.role is Role.GUEST:
        return vm is not None and vm.debuggable
    return debug


@dataclass(frozen=True, slots=True)
class ConfigFrame:
    """What the configurations of all processes of a cluster have in common."""

    cluster: Cluster
    paths: Paths
    record: bool
    debug: bool


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
        run_dir=str(paths.process_dir(process.target)),
        state_dir=str(paths.state_dir),
        log_file=str(paths.log_file(process.target)),
        record_file=str(paths.record_file(process.target)),
        record=frame.record,
        debuggable=is_debuggable(process, cluster, frame.debug),
        secure_memory_bytes=host.secure_memory_bytes if host is not None and is_ultravisor else 0,
        seed=cluster.seed ^ crc32(process.target.encode()),
        vms=vms,
        links=links,
        descriptors=descriptors(process, cluster),
        monitor_socket=monitor,
        control_monitor_socket=control_monitor,
    )
