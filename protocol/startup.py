"""What the launcher tells a process when it starts it, and when a VM is added to it later.

The start configuration binds VM name, lpid, the peers' public keys and the RAM segment for all four processes of a
VM. No message of a peer can change it. Secret keys are apart (`Keys`): a process reads them only once it is confined.
"""

from __future__ import annotations

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


class DeviceEntry(Struct, frozen=True):
    """A device of a VM. `kind` says which of the other fields it has.

    `virtio-blk` has a `disk`; `virtio-net` a `network`, its `mac` (`52:54:00:00:00:01`) and `mtu`; `virtio-console` a
    `name`; `virtio-rng` nothing.
    """

    kind: str
    disk: str | None = None
    network: str | None = None
    mac: str | None = None
    mtu: int = DEFAULT_MTU
    name: str | None = None
    access_platform: bool = False


class GuestEntry(Struct, frozen=True):
    """The guest kernel of a VM.

    `kernel` is "model", "bench" or "machine" (real POWER code); `boot` is "disk", "kernel" (image, initrd and blob
    loaded by qemu) or "program" (an ELF program without firmware); a machine that boots from disk or kernel starts in
    `firmware`, and `pci_nodes` says who describes its PCI devices ("qemu" or "firmware"); `workload` names what the
    model runs; `dma` is the DMA design of its drivers; `options` are further settings of the model's image.
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
    options: dict[str, str | int | bool] = {}


class VmEntry(Struct, frozen=True):
    """One virtual machine, the same for all processes that know it."""

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
    `record` and `log` are files; `descriptors` names the files that come with this message, in order.
    """

    cluster: str
    host: str
    role: str
    target: str
    run_dir: str
    state_dir: str
    log_file: str
    record_file: str
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
