"""What a host offers to VMs: answers of its ultravisor, and the declarations that cluster files are read with."""

from __future__ import annotations

from pathlib import Path

import msgspec

from deploy.cluster_devices import KEYS_OF, MAX_DEVICES
from deploy.cluster_file import BOOTS, DISK_FORMATS, KERNELS, MIN_VM_BYTES, PCI_NODES, TIMES
from deploy.cluster_run import ClusterRun
from deploy.status import ask
from protocol.geometry import MAX_VM_BYTES, PAGE_BYTES
from protocol.roles import Role
from shared.dma_designs import DmaDesign
from shared.machine_type import ARCHITECTURE, CPU_MODEL, MACHINE, N_CPUS, QEMU_RELEASE, VERSIONED_MACHINE
from shared.tce import WINDOWS_PER_DOMAIN

LAUNCH_SECURITY = "pef"
BALLOON = "virtio-balloon"
_REPOSITORY = Path(__file__).resolve().parent.parent


class SecureMemoryAnswer(msgspec.Struct, kw_only=True):
    """An ultravisor's answer to `capabilities`."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    largest_secret_bytes: int | None


class SecureMemory(SecureMemoryAnswer, kw_only=True):
    """Secure memory of a host. `mode` is the kind of file that a new VM gets, `memfd_secret` or `memfd`.

    With `memfd_secret`, a VM above `largest_secret_bytes` still gets a `memfd`; None: none does.
    """

    mode: str


class DeviceOffer(msgspec.Struct, kw_only=True):
    """A kind of device: its keys in a cluster file, the features that one may offer."""

    keys: list[str]
    features: list[str]
    access_platform: bool


class DmaOffer(msgspec.Struct, kw_only=True):
    """DMA windows of a VM's PCI host bridge. `page_bytes` must divide the RAM of a VM."""

    max_windows: int
    default_base: int
    default_bytes: int
    default_page_bytes: int
    window64_base: int
    max_window_pages: int
    page_bytes: list[int]


class HostDescription(msgspec.Struct, kw_only=True):
    """A host. `launch_security` names what a VM can turn into; `no_launch_security` says why nothing.

    `migration_hosts` are those that its VMs may move to; whether one can now, `pefbox can-migrate` says.
    """

    cluster: str
    host: str
    vms: list[str]
    launch_security: list[str]
    no_launch_security: str
    secure_memory: SecureMemory | None
    architectures: list[str]
    machine: str
    machine_alias: str
    qemu_release: str
    cpu_model: str
    max_vcpus: int
    min_memory_bytes: int
    max_memory_bytes: int
    page_bytes: int
    emulator: str
    max_devices: int
    devices: dict[str, DeviceOffer]
    memballoon_models: list[str]
    disk_formats: list[str]
    kernels: list[str]
    boots: list[str]
    clocks: list[str]
    pci_nodes: list[str]
    dma_designs: list[str]
    dma: DmaOffer
    migration_hosts: list[str] = []


async def describe_host(run: ClusterRun, name: str) -> HostDescription:
    """Ask the ultravisor of a host, bounded; raises UserError for an unknown host."""
    run.host_named(name)
    memory = await _secure_memory(run, name)
    why_not = _no_launch_security(run, name, memory)
    return HostDescription(
        cluster=run.cluster.name,
        host=name,
        vms=[vm.spec.name for vm in run.vms.values() if vm.spec.host == name],
        launch_security=[] if why_not else [LAUNCH_SECURITY],
        no_launch_security=why_not,
        secure_memory=memory,
        architectures=[ARCHITECTURE, f"{ARCHITECTURE}le"],
        machine=VERSIONED_MACHINE,
        machine_alias=MACHINE,
        qemu_release=".".join(map(str, QEMU_RELEASE)),
        cpu_model=CPU_MODEL,
        max_vcpus=N_CPUS,
        min_memory_bytes=MIN_VM_BYTES,
        max_memory_bytes=MAX_VM_BYTES,
        page_bytes=PAGE_BYTES,
        emulator=str(_REPOSITORY / "services" / "qemu" / "__main__.py"),
        max_devices=MAX_DEVICES,
        devices=_devices(),
        memballoon_models=[BALLOON, "none"] if BALLOON in KEYS_OF else ["none"],
        disk_formats=list(DISK_FORMATS),
        kernels=list(KERNELS),
        boots=list(BOOTS),
        clocks=list(TIMES),
        pci_nodes=list(PCI_NODES),
        dma_designs=[design.value for design in DmaDesign],
        dma=_dma(),
        migration_hosts=[other for other in run.hosts if other != name and run.cluster.may_move(name, other)],
    )


async def _secure_memory(run: ClusterRun, host: str) -> SecureMemory | None:
    answer = await ask(run.child(host, Role.ULTRAVISOR), "capabilities", {})
    try:
        memory = msgspec.convert(answer, SecureMemoryAnswer)
    except msgspec.ValidationError:
        return None
    largest = memory.largest_secret_bytes
    mode = "memfd_secret" if largest is None or largest >= MIN_VM_BYTES else "memfd"
    return SecureMemory(**msgspec.structs.asdict(memory), mode=mode)


def _no_launch_security(run: ClusterRun, host: str, memory: SecureMemory | None) -> str:
    """Why no VM of the host can turn secure now; empty when one can."""
    for role in (Role.ULTRAVISOR, Role.KVM):
        child = run.child(host, role)
        if child is None or not child.state.answers:
            return f"{host}/{role.value} is {child.state.value if child is not None else 'missing'}"
    return "" if memory is not None else f"{host}/ultravisor does not answer"


def _devices() -> dict[str, DeviceOffer]:
    # What makes devices is no part of a launcher's start.
    from services.qemu.devices import DEVICE_KINDS

    offers = {}
    for kind, keys in KEYS_OF.items():
        features = DEVICE_KINDS[kind].may_offer()
        offers[kind] = DeviceOffer(keys=list(keys), features=features, access_platform="ACCESS_PLATFORM" in features)
    return offers


def _dma() -> DmaOffer:
    from services.qemu.dma_domain import DEFAULT_BASE, DEFAULT_BYTES, DEFAULT_SHIFT
    from services.qemu.rtas_ddw import DMA64_BASE, MAX_WINDOW_TCES, PAGE_SIZE_BITS

    return DmaOffer(
        max_windows=WINDOWS_PER_DOMAIN,
        default_base=DEFAULT_BASE,
        default_bytes=DEFAULT_BYTES,
        default_page_bytes=1 << DEFAULT_SHIFT,
        window64_base=DMA64_BASE,
        max_window_pages=MAX_WINDOW_TCES,
        page_bytes=sorted(1 << shift for shift in PAGE_SIZE_BITS),
    )
