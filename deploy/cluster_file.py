"""The cluster file: hosts, virtual machines, disks and links, as TOML (documented in docs/cluster-file.md).

Reading is strict: an unknown key, a wrong type or a value that is not possible raises ClusterFileError with file,
line, key and what is allowed. What depends on this machine (files, memory) is checked in `deploy.preflight`.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.cluster_devices import DeviceReader
from deploy.cluster_hosts import HOST_KEYS, HostSpec, read_hosts
from deploy.cluster_section import Document, Section, did_you_mean, quoted
from deploy.firmware import PACKAGE, find_firmware
from protocol.errors import ClusterFileError, UserError
from protocol.ethernet import DEFAULT_MTU, MAX_MTU, MIN_MTU
from protocol.geometry import MAX_VM_BYTES, PAGE_BYTES
from protocol.startup import BENCH_KERNEL, MACHINE_KERNEL, DeviceEntry, DiskEntry, DmaMachine, GuestEntry
from services.guest.model.image import OPTIONS
from shared.boot_partition import command_line_fault
from shared.dma_designs import DESIGNS, DmaDesign
from shared.link_shape import PLAIN, LinkShape, fault_of
from shared.migration_policy import PolicyFile
from shared.real_address import MAX_LPID

TOP_KEYS = ("name", "seed", "make", "hosts", "networks", "vms", "links")
NETWORK_KEYS = ("mtu",)
VM_KEYS = (
    "host",
    "lpid",
    "memory",
    "time",
    "secure",
    "debuggable",
    "tell_secure",
    "ddw",
    "guest",
    "disks",
    "devices",
    "migration",
)
MIGRATION_KEYS = ("allowed", "hosts", "to_debuggable")
GUEST_KEYS = (
    "kernel",
    "boot",
    "image",
    "initrd",
    "esm_blob",
    "firmware",
    "pci_nodes",
    "command_line",
    "workload",
    "dma",
    "old_firmware",
    "options",
)
PCI_NODES = ("qemu", "firmware")
DISK_KEYS = ("path", "readonly", "format")
LINK_KEYS = ("between", "latency", "jitter", "bandwidth", "loss", "down")

TIMES = ("wall", "instructions")
KERNELS = ("model", BENCH_KERNEL, MACHINE_KERNEL)
BOOTS = ("disk", "kernel", "program")
FIRMWARE_BOOTS = ("disk", "kernel")
"""Ways in which a machine starts in its firmware."""
DISK_FORMATS = ("raw",)
MAKES = ("demo", "linux")

MAX_NETWORK_VMS = 16
"""All VMs of a network are linked in pairs."""
MAX_VM_LINKS = 128
"""To other VMs, over all networks: so many fit a start message, and cost a process some 400 open files."""
MIN_VM_BYTES = 16 << 20
MAX_OPTION = (1 << 63) - 1
STATE_PREFIX = "@state/"
_CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}", re.ASCII)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what a cluster file describes."""


class NetworkSpec(Spec, frozen=True):
    """A network that VMs of any host are on."""

    name: str
    mtu: int


class VmSpec(Spec, frozen=True):
    """A virtual machine on `host`."""

    name: str
    host: str
    lpid: int
    memory_bytes: int
    time: str
    secure_allowed: bool
    debuggable: bool
    guest: GuestEntry
    disks: list[DiskEntry]
    devices: list[DeviceEntry]
    dma: DmaMachine = DmaMachine()
    migration: PolicyFile = PolicyFile(may_migrate=True)
    """What an ESM blob made here says about where it may go as a secure VM."""


class HostLinkSpec(Spec, frozen=True):
    """A link between two hosts, for migration and networks, as it is at first."""

    between: tuple[str, str]
    shape: LinkShape = PLAIN


class Cluster(Spec, frozen=True):
    """A checked cluster file. Paths are absolute, or begin with `@state/` until `resolve_state` is applied."""

    name: str
    path: str
    seed: int
    make: str | None
    hosts: list[HostSpec]
    networks: list[NetworkSpec]
    vms: list[VmSpec]
    links: list[HostLinkSpec]

    def vms_of(self, host: str) -> list[VmSpec]:
        """The VMs of one host, in file order."""
        return [vm for vm in self.vms if vm.host == host]

    def vms_on(self, network: str) -> list[VmSpec]:
        """The VMs on one network, in file order."""
        return [vm for vm in self.vms if any(device.network == network for device in vm.devices)]

    def vm(self, name: str) -> VmSpec | None:
        """The VM of that name."""
        return next((vm for vm in self.vms if vm.name == name), None)

    def may_move(self, source: str, destination: str) -> bool:
        """Whether VMs may move between two hosts: a file that links some allows it for those alone."""
        return not self.links or any({source, destination} == set(link.between) for link in self.links)

    def homes_of(self, vm: VmSpec) -> list[str]:
        """The hosts that `vm` may run on: its own, then those that it may move to."""
        others = [host.name for host in self.hosts if host.name != vm.host]
        return [vm.host, *(other for other in others if self.may_move(vm.host, other))]

    def host(self, name: str) -> HostSpec | None:
        """The host of that name."""
        return next((host for host in self.hosts if host.name == name), None)


def read_cluster_file(path: Path) -> Cluster:
    """Read and check `path`; raises ClusterFileError, or UserError when it cannot be read at all."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no UTF-8 text") from None
    return parse_cluster(text, str(path), path.resolve().parent, default_name=path.stem)


def parse_cluster(text: str, path: str, base: Path, default_name: str) -> Cluster:
    """The cluster that `text` describes; file names in it are relative to `base`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ClusterFileError(path, "", str(error), int(line[1]) if line else None) from None
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or lists in lists without end.
        raise ClusterFileError(path, "", str(error)) from None
    top = Section(Document(path, text), (), values, TOP_KEYS)
    hosts = read_hosts(top.named_tables("hosts", HOST_KEYS, required=True))
    if not hosts:
        top.fail("hosts", "needs at least one [hosts.NAME]")
    seed = top.integer("seed", 0, 0, (1 << 63) - 1)
    names = [host.name for host in hosts]
    networks = [_network(name, section) for name, section in top.named_tables("networks", NETWORK_KEYS).items()]
    cluster = Cluster(
        name=_cluster_name(top, default_name),
        path=path,
        seed=seed,
        make=top.choice("make", MAKES) if "make" in top else None,
        hosts=hosts,
        networks=networks,
        vms=_vms(top, _Surroundings(seed, names, {network.name: network.mtu for network in networks}, base)),
        links=_links(top, names),
    )
    _check_networks(top, cluster)
    _check_links(top, cluster)
    return cluster


def resolve_state(cluster: Cluster, state_dir: Path) -> Cluster:
    """`cluster` with `@state/...` replaced by files below `state_dir`."""

    def absolute(path: str | None) -> str | None:
        if path is None or not path.startswith(STATE_PREFIX):
            return path
        return str(state_dir / path.removeprefix(STATE_PREFIX))

    def resolved(vm: VmSpec) -> VmSpec:
        guest = msgspec.structs.replace(
            vm.guest,
            image=absolute(vm.guest.image),
            initrd=absolute(vm.guest.initrd),
            esm_blob=absolute(vm.guest.esm_blob),
        )
        disks = [msgspec.structs.replace(disk, path=absolute(disk.path)) for disk in vm.disks]
        return msgspec.structs.replace(vm, guest=guest, disks=disks)

    return msgspec.structs.replace(cluster, vms=[resolved(vm) for vm in cluster.vms])


def check_cluster_name(name: str) -> str:
    """`name` when it can name a cluster; raises UserError."""
    if not _CLUSTER_NAME.fullmatch(name):
        raise UserError(f'"{name}" cannot name a cluster: letters, digits, _ . and -, up to 41, no . or - in front')
    return name


def _cluster_name(top: Section, default_name: str) -> str:
    name = top.text("name", default_name)
    if not _CLUSTER_NAME.fullmatch(name):
        top.fail("name", f'"{name}" is no name; allowed: letters, digits, _ . and -, up to 41, no . or - in front')
    return name


def _network(name: str, section: Section) -> NetworkSpec:
    return NetworkSpec(name=name, mtu=section.integer("mtu", DEFAULT_MTU, MIN_MTU, MAX_MTU))


def _check_networks(top: Section, cluster: Cluster) -> None:
    """No network is too large, and no two cards of it have one address."""
    for network in cluster.networks:
        vms = cluster.vms_on(network.name)
        if len(vms) > MAX_NETWORK_VMS:
            top.document.fail(("networks", network.name), f"has {len(vms)} VMs; allowed: up to {MAX_NETWORK_VMS}")
        cards = [(vm.name, device) for vm in vms for device in vm.devices if device.network == network.name]
        macs = Counter(card.mac for _, card in cards)
        for mac, n in macs.items():
            if n > 1:
                owners = ", ".join(vm for vm, card in cards if card.mac == mac)
                top.document.fail(("networks", network.name), f"{n} cards have the address {mac} ({owners})")


def _check_links(top: Section, cluster: Cluster) -> None:
    """No VM is on too many large networks."""
    n_links: Counter[str] = Counter()
    for network in cluster.networks:
        vms = cluster.vms_on(network.name)
        n_links.update({vm.name: len(vms) - 1 for vm in vms})
    for vm, n in n_links.items():
        if n > MAX_VM_LINKS:
            problem = f"has {n} links to other VMs of its networks; allowed: up to {MAX_VM_LINKS}"
            top.document.fail(("vms", vm), problem)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a VM's table refers to."""

    seed: int
    hosts: list[str]
    mtus: dict[str, int]
    """By network."""
    base: Path


def _vms(top: Section, around: _Surroundings) -> list[VmSpec]:
    sections = top.named_tables("vms", VM_KEYS)
    lpids = _lpids(sections)
    for name, section in sections.items():
        if name in around.hosts:
            section.document.fail(section.key, f'"{name}" is a host already; hosts and VMs share their names')
    return [_vm(name, section, lpids[name], around) for name, section in sections.items()]


def _lpids(sections: dict[str, Section]) -> dict[str, int]:
    """The lpid of each VM: as given, else the lowest that is free."""
    given: dict[int, str] = {}
    for name, section in sections.items():
        if "lpid" not in section:
            continue
        lpid = section.integer("lpid", 0, 1, MAX_LPID)
        if lpid in given:
            section.fail("lpid", f"{lpid} is taken by {given[lpid]}; an lpid is unique in the cluster")
        given[lpid] = name
    by_name = {name: lpid for lpid, name in given.items()}
    free = (lpid for lpid in range(1, MAX_LPID + 1) if lpid not in given)
    for name, section in sections.items():
        if name not in by_name:
            lpid = next(free, 0)
            if not lpid:
                section.document.fail(section.key, f"a cluster has at most {MAX_LPID} VMs")
            by_name[name] = lpid
    return by_name


def _vm(name: str, section: Section, lpid: int, around: _Surroundings) -> VmSpec:
    guest = _guest(section, around.base)
    disks = _disks(section, around.base)
    devices = DeviceReader(section, disks, guest, f"{around.seed}:{name}:{lpid}", around.mtus).read()
    if guest.boot == "program" and guest.image is None:
        section.document.fail(section.key, 'boot = "program" needs guest.image, an ELF program')
    if guest.boot == "disk" and not disks:
        section.document.fail(section.key, 'boots from disk but has none; add disks.NAME, or boot = "kernel"')
    return VmSpec(
        name=name,
        host=section.choice("host", around.hosts),
        lpid=lpid,
        memory_bytes=section.size_bytes("memory", multiple_of=PAGE_BYTES, lowest=MIN_VM_BYTES, highest=MAX_VM_BYTES),
        time=_time(section, devices),
        secure_allowed=section.flag("secure", True),
        debuggable=section.flag("debuggable", False),
        guest=guest,
        disks=disks,
        devices=devices,
        dma=_dma_machine(section, guest),
        migration=_migration(section, around.hosts),
    )


def _migration(vm: Section, hosts: list[str]) -> PolicyFile:
    section = vm.table("migration", MIGRATION_KEYS)
    named = section.texts("hosts")
    for name in named:
        if name not in hosts:
            section.fail("hosts", f'no host "{name}"{did_you_mean(name, hosts)}; allowed: {quoted(hosts)}')
    return PolicyFile(section.flag("allowed", True), (), tuple(named), section.flag("to_debuggable", False))


def _dma_machine(vm: Section, guest: GuestEntry) -> DmaMachine:
    wanted = DESIGNS[DmaDesign(guest.dma)].machine
    return DmaMachine(tell_secure=vm.flag("tell_secure", wanted.tell_secure), ddw=vm.flag("ddw", wanted.ddw))


def _time(section: Section, devices: list[DeviceEntry]) -> str:
    """Frames come when the other VMs send them: no such run repeats, and timers that jump ahead would always expire."""
    if not any(device.network is not None for device in devices):
        return section.choice("time", TIMES, "instructions")
    time = section.choice("time", TIMES, "wall")
    if time != "wall":
        section.fail("time", f'"{time}" is not possible with a virtio-net; allowed: "wall"')
    return time


def _guest(vm: Section, base: Path) -> GuestEntry:
    guest = vm.table("guest", GUEST_KEYS)
    kernel, boot = guest.choice("kernel", KERNELS, "model"), guest.choice("boot", BOOTS, "disk")
    return GuestEntry(
        kernel=kernel,
        boot=boot,
        image=_path(guest, "image", base),
        initrd=_path(guest, "initrd", base),
        esm_blob=_path(guest, "esm_blob", base),
        firmware=_firmware(guest, base) if kernel == MACHINE_KERNEL and boot in FIRMWARE_BOOTS else None,
        pci_nodes=guest.choice("pci_nodes", PCI_NODES, "qemu"),
        command_line=_command_line(guest),
        workload=guest.text("workload", "prompt"),
        dma=guest.choice("dma", tuple(DmaDesign), DmaDesign.QUIRK.value),
        old_firmware=guest.flag("old_firmware", False),
        options=_options(guest),
    )


def _command_line(guest: Section) -> str:
    text = guest.text("command_line", "")
    fault = command_line_fault(text)
    if fault is not None:
        guest.fail("command_line", fault)
    return text


def _firmware(guest: Section, base: Path) -> str:
    path = _path(guest, "firmware", base) or find_firmware()
    if path is None:
        guest.document.fail(
            guest.key, f"starts in firmware, and none was found: apt-get install {PACKAGE}, or set guest.firmware"
        )
    return path


def _options(guest: Section) -> dict[str, str | int | bool]:
    """What goes into the image of the model kernel beside workload and DMA design."""
    kinds = {name: kind for name, kind in OPTIONS.items() if name != "dma"}
    section = guest.table("options", tuple(kinds))
    values: dict[str, str | int | bool] = {}
    for name, kind in kinds.items():
        if name in section:
            values[name] = section.flag(name, False) if kind is bool else section.integer(name, 0, 0, MAX_OPTION)
    return values


def _path(section: Section, name: str, base: Path) -> str | None:
    path = section.optional_text(name)
    if path is None or path.startswith(STATE_PREFIX):
        return path
    if not path:
        section.fail(name, "is empty; a file name is wanted")
    try:
        return str(base / Path(path).expanduser())
    except RuntimeError:
        section.fail(name, f'"{path}" begins with the home directory of a user that there is not')


def _disks(vm: Section, base: Path) -> list[DiskEntry]:
    disks = []
    for name, section in vm.named_tables("disks", DISK_KEYS).items():
        section.text("path")
        disk = DiskEntry(
            name=name,
            path=_path(section, "path", base) or "",
            readonly=section.flag("readonly", False),
            format=section.choice("format", DISK_FORMATS, "raw"),
        )
        disks.append(disk)
    return disks


def _links(top: Section, hosts: list[str]) -> list[HostLinkSpec]:
    links: list[HostLinkSpec] = []
    for section in top.listed_tables("links", LINK_KEYS):
        link = _link(section, hosts)
        if any(set(link.between) == set(other.between) for other in links):
            section.fail("between", f"{link.between[0]} and {link.between[1]} are linked already")
        links.append(link)
    return links


def _link(section: Section, hosts: list[str]) -> HostLinkSpec:
    ends = section.texts("between")
    if len(ends) != 2 or ends[0] == ends[1]:
        section.fail("between", "must name two different hosts")
    for end in ends:
        if end not in hosts:
            section.fail("between", f'no host "{end}"{did_you_mean(end, hosts)}; allowed: {quoted(hosts)}')
    return HostLinkSpec(between=(ends[0], ends[1]), shape=_shape(section))


def _shape(section: Section) -> LinkShape:
    shape = LinkShape(
        latency_ms=section.number("latency", 0.0),
        jitter_ms=section.number("jitter", 0.0),
        bandwidth_bytes_per_second=section.rate("bandwidth", 0),
        loss=section.number("loss", 0.0),
        down=section.flag("down", False),
    )
    fault = fault_of(shape)
    if fault is not None:
        section.fail(*fault)
    return shape
