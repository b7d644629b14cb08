"""What the launcher tells a process when it starts it, and when a VM is added to it later.

The start configuration binds VM name, lpid, the peers' public keys and the RAM segment for all four processes of a
VM. No message of a peer can change it. Secret keys are apart (`Keys`): a process reads them only once it is confined.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from protocol.ethernet import DEFAULT_MTU


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the control plane's Structs: by name on the wire."""


class DiskEntry(Struct, frozen=True):
    """A disk of a VM; its file comes as descriptor `disk:NAME`."""

    name: str
    path: str
    readonly: bool = False
    format: str = "raw"


class AccessPlatform(StrEnum):
    """Whether a virtio device offers VIRTIO_F_ACCESS_PLATFORM, and serves a driver that does not accept it."""

    NO = "no"
    REQUIRED = "required"
    OPTIONAL = "optional"


class DmaOffer(Struct, frozen=True):
    """What a virtio device offers its driver as ways to memory.

    `no_translation` and `identity_address` are the proposed feature bits of these names; `bypass_switch` lets
    H_SET_DMA_BYPASS take the device out of the IOMMU; `iommu_switch` is a register that puts it behind the IOMMU.
    """

    access_platform: AccessPlatform = AccessPlatform.NO
    no_translation: bool = False
    identity_address: bool = False
    bypass_switch: bool = False
    iommu_switch: bool = False


NO_OFFER = DmaOffer()
"""A device that goes past the IOMMU."""
PLATFORM_OFFER = DmaOffer(access_platform=AccessPlatform.REQUIRED)
"""A device behind the IOMMU."""


class DmaMachine(Struct, frozen=True):
    """What the machine around the devices does about DMA.

    `tell_secure`: kvm tells qemu when the VM turns secure, and qemu moves its virtio devices behind the IOMMU.
    `ddw`: the host bridge makes dynamic DMA windows.
    """

    tell_secure: bool = False
    ddw: bool = True


DEFAULT_DMA_BITS = 28
"""How many bits of a bus address an edu has, as QEMU's."""


class IommuDomain(StrEnum):
    """Whose DMA windows a device translates through."""

    BUS = "bus"
    OWN = "own"


class DeviceEntry(Struct, frozen=True):
    """A device of a VM. `kind` says which of the other fields it has; all have `iommu_domain`.

    `virtio-blk` has a `disk`; `virtio-net` a `network`, its `mac` (`52:54:00:00:00:01`) and `mtu`; `virtio-console` a
    `name`; `virtio-rng` and `virtio-balloon` nothing; `edu` a `name` and `dma_bits`, how many bits of a bus address it
    has. `offer` is of virtio devices.
    """

    kind: str
    disk: str | None = None
    network: str | None = None
    mac: str | None = None
    mtu: int = DEFAULT_MTU
    name: str | None = None
    offer: DmaOffer = DmaOffer()
    iommu_domain: IommuDomain = IommuDomain.BUS
    dma_bits: int = DEFAULT_DMA_BITS


MACHINE_KERNEL = "machine"
BENCH_KERNEL = "bench"


class GuestEntry(Struct, frozen=True):
    """The guest kernel of a VM.

    `kernel` is "model", "bench" or "machine" (real POWER code); `boot` is "disk", "kernel" (image, initrd and blob
    loaded by qemu) or "program" (an ELF program without firmware); a machine that boots from disk or kernel starts in
    `firmware`, and `pci_nodes` says who describes its PCI devices ("qemu" or "firmware"); `workload` names what the
    model runs; `dma` is the DMA design of its drivers (shared.dma_designs); `old_firmware` says that the model's boot
    stage does not know VIRTIO_F_ACCESS_PLATFORM, as SLOF of 2018; `options` are further settings of the model's image.
    """

    kernel: str = "model"
    boot: str = "disk"
    image: str | None = None
    initrd: str | None = None
    esm_blob: str | None = None
    firmware: str | None = None
    pci_nodes: str = "qemu"
    command_line: str = ""
    workload: str = "prompt"
    dma: str = "quirk"
    old_firmware: bool = False
    options: dict[str, str | int | bool] = {}


class VmEntry(Struct, frozen=True):
    """One virtual machine, the same for all processes that know it.

    `incoming` says that it does not start here, but arrives from another host; `restoring`, that it goes on out of a
    snapshot.
    """

    name: str
    lpid: int
    incarnation: int
    memory_bytes: int
    ram_segment: str
    time: str
    secure_allowed: bool
    debuggable: bool
    guest: GuestEntry
    disks: list[DiskEntry]
    devices: list[DeviceEntry]
    dma: DmaMachine = DmaMachine()
    incoming: bool = False
    restoring: bool = False

    @property
    def starts(self) -> bool:
        """It boots, by itself."""
        return not (self.incoming or self.restoring)


class LinkEntry(Struct, frozen=True):
    """One end of a link. `id` is unique in the cluster and is also its ZAP domain.

    `binds` says which end makes the socket; `network` names the network whose frames the link carries.
    """

    id: str
    kind: str
    endpoint: str
    vm: str | None
    peer: str
    peer_public_key: str
    binds: bool
    network: str | None = None


class ProcessConfig(Struct, frozen=True):
    """Everything a process needs to know before it runs.

    `target` is its name (`alpha/kvm`, `vm1/guest`); `secure_memory_bytes` is the ultravisor's account;
    `record` says that it records a trace from the start; `descriptors` names the files that come with this message, in
    order.
    """

    cluster: str
    host: str
    role: str
    target: str
    run_dir: str
    state_dir: str
    log_file: str
    trace_file: str
    record: bool
    debuggable: bool
    secure_memory_bytes: int
    seed: int
    vms: list[VmEntry]
    links: list[LinkEntry]
    descriptors: list[str]
    monitor_socket: str | None = None
    control_monitor_socket: str | None = None


class LinkKey(Struct, frozen=True):
    """The CURVE key pair of one link end."""

    link: str
    public_key: str
    secret_key: str


class Keys(Struct, frozen=True):
    """All secret keys of a process; `identity` is the ultravisor's own key material."""

    links: list[LinkKey]
    identity: dict[str, str] = {}
