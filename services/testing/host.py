"""One host whose ultravisor and kvm are real processes, and whose VMs are played: the launcher's part.

    async with real_host(directory, identity) as host:
        vm = await host.add_vm("vm1", memory_bytes=4 << 20)
        await vm.qemu.power_on(image)
        await vm.guest.esm(image)

The ends that this process plays speak the real links (CURVE, the declared calls) and the real control protocol.
Sources: `protocol.control`, `protocol.startup`.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio
import zmq

from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from protocol.links import KVM_GUEST, KVM_QEMU, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, LinkKind
from protocol.roles import Role
from protocol.startup import GuestEntry, Keys, LinkEntry, LinkKey, ProcessConfig, VmEntry
from services.runtime.channel import ZmqChannel
from services.runtime.link import Link
from services.runtime.sockets import connect_socket
from services.testing.calls import CallLog
from services.testing.guest import PlayedGuest
from services.testing.process import ServiceProcess
from services.testing.qemu import PlayedQemu

HOST = "alpha"
_GIFT_SECONDS = 5.0
_LOG = structlog.wrap_logger(structlog.ReturnLogger())
_KeyPair = tuple[str, str]


class PlayedVm:
    """One incarnation of a VM: its RAM, and the guest and qemu that the caller plays."""

    def __init__(self, entry: VmEntry, ram_fd: int, log: CallLog) -> None:
        self.entry = entry
        self.ram_fd = ram_fd
        self.ram = mmap.mmap(ram_fd, entry.memory_bytes)
        self.log = log
        self.links: list[Link] = []
        self.gifts: dict[str, trio.Event] = {"host-view": trio.Event(), "normal-map": trio.Event()}
        self.holds_maps = False
        """True: kvm's maps for the guest are late; they wait in `held_maps`."""
        self.held_maps: list[int] = []
        self.guest: PlayedGuest
        self.qemu: PlayedQemu
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.name

    @property
    def n_pages(self) -> int:
        """Size of its RAM in pages."""
        return self.entry.memory_bytes >> PAGE_SHIFT

    def raw(self) -> bytes:
        """All normal RAM without touching it: a hole reads as zeros and stays a hole."""
        return os.pread(self.ram_fd, self.entry.memory_bytes, 0)

    def raw_page(self, gfn: int) -> bytes:
        """One frame of it."""
        return os.pread(self.ram_fd, PAGE_BYTES, gpa_of(gfn))

    def forge(self, gfn: int, content: bytes) -> None:
        """What a hostile host does: store into a frame behind everybody's back."""
        os.pwrite(self.ram_fd, content, gpa_of(gfn))

    def take(self, tag: str, fd: int) -> None:
        """A descriptor that kvm made for the VM."""
        if tag == "host-view":
            self.qemu.take_view(fd, self.n_pages)
        elif tag == "normal-map":
            if self.holds_maps:
                self.held_maps.append(fd)
                return
            self.guest.take_normal_map(fd, self.n_pages)
        else:
            os.close(fd)
            return
        self.gifts[tag].set()

    def hand_over_maps(self) -> None:
        """The guest gets the maps that were late."""
        self.holds_maps = False
        while self.held_maps:
            self.take("normal-map", self.held_maps.pop(0))

    def close(self) -> None:
        """Guest and qemu are dead."""
        while self.held_maps:
            os.close(self.held_maps.pop())
        self.guest.close()
        self.qemu.close()
        self.ram.close()
        os.close(self.ram_fd)


@dataclass(frozen=True, slots=True)
class _Wire:
    """One link: its plan and the key pair of each end."""

    id: str
    kind: LinkKind
    endpoint: str
    vm: str | None
    names: dict[Role, str]
    pairs: dict[Role, _KeyPair]

    def entry(self, me: Role) -> LinkEntry:
        other = self.kind.lower if me is self.kind.upper else self.kind.upper
        return LinkEntry(
            id=self.id,
            kind=self.kind.name,
            endpoint=self.endpoint,
            vm=self.vm,
            peer=self.names[other],
            peer_public_key=self.pairs[other][0],
            binds=me is self.kind.upper,
        )

    def key(self, me: Role) -> LinkKey:
        public, secret = self.pairs[me]
        return LinkKey(link=self.id, public_key=public, secret_key=secret)


class RealHost:
    """The host. `calls` logs every call that a played process makes, of all VMs."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.calls = CallLog()
        self.vms: dict[str, PlayedVm] = {}
        self.ultravisor = ServiceProcess(Role.ULTRAVISOR, f"{HOST}/ultravisor", self._given)
        self.kvm = ServiceProcess(Role.KVM, f"{HOST}/kvm", self._given)
        self._nursery = nursery
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._incarnations: dict[str, int] = {}

    # -- the processes ----------------------------------------------------------------------------------------

    async def start(self, identity: dict[str, str], secure_memory_bytes: int) -> None:
        """Start both processes; raises HostFault when one refuses."""
        wire = self._wire(ULTRAVISOR_KVM, None, 1)
        for process in (self.ultravisor, self.kvm):
            me = process.role
            keys = Keys(links=[wire.key(me)], identity=identity if me is Role.ULTRAVISOR else {})
            config = self._config(process, [wire.entry(me)], secure_memory_bytes if me is Role.ULTRAVISOR else 0)
            files = {name: self._open(process, name) for name in config.descriptors}
            try:
                await process.start(config, files, keys, self._nursery)
            finally:
                for fd in files.values():
                    os.close(fd)

    async def stop(self) -> None:
        """End everything; what is left of a process is killed."""
        for name in list(self.vms):
            await self._end_played(self.vms.pop(name))
        for process in (self.kvm, self.ultravisor):
            await process.stop()
        self._context.destroy(linger=0)

    def log_text(self, process: ServiceProcess) -> str:
        """What the process logged so far."""
        return (self._home(process.role) / "log").read_text()

    def _home(self, role: Role) -> Path:
        home = self.directory / role.value
        home.mkdir(exist_ok=True)
        return home

    def _open(self, process: ServiceProcess, name: str) -> int:
        path = self._home(process.role) / name
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _config(self, process: ServiceProcess, links: list[LinkEntry], secure_memory_bytes: int) -> ProcessConfig:
        home = self._home(process.role)
        return ProcessConfig(
            cluster="played",
            host=HOST,
            role=process.role.value,
            target=process.target,
            run_dir=str(home),
            state_dir=str(self.directory),
            log_file=str(home / "log"),
            trace_file=str(home / "trace"),
            record=False,
            debuggable=False,
            secure_memory_bytes=secure_memory_bytes,
            seed=0,
            vms=[],
            links=links,
            descriptors=["log", "trace", "audit"] if process.role is Role.ULTRAVISOR else ["log", "trace"],
        )

    # -- VMs --------------------------------------------------------------------------------------------------

    async def add_vm(self, name: str, *, memory_bytes: int, lpid: int = 1, secure_allowed: bool = True) -> PlayedVm:
        """A VM, or the next incarnation of one that was removed: fresh RAM, links and keys. It is off."""
        incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        entry = _vm_entry(name, lpid, incarnation, memory_bytes, secure_allowed=secure_allowed)
        ram_fd = os.memfd_create(f"pefbox-ram-{name}", os.MFD_CLOEXEC)
        os.ftruncate(ram_fd, memory_bytes)
        vm = self.vms[name] = PlayedVm(entry, ram_fd, self.calls)
        wires = [self._wire(kind, name, incarnation) for kind in (KVM_GUEST, ULTRAVISOR_GUEST, KVM_QEMU)]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._play(vm, wires, ours)
            await self._introduce(self.ultravisor, vm, wires, {f"secure:{name}": theirs.fileno()})
        await self._introduce(self.kvm, vm, wires, {})
        await self._nursery.start(self._serve, vm)
        await self._all_gifts(vm)
        if code := await vm.qemu.add_memory(memory_bytes):
            raise HostFault(f"kvm refuses the memory of {name}: code {code}")
        return vm

    async def destroy_vm(self, name: str) -> None:
        """kvm destroys a VM whose guest and qemu still live; their open calls to it end with PeerGone."""
        await self.kvm.remove_vm(name)
        for link in self.vms[name].links:
            if link.peer == self.kvm.target:
                link.peer_is("gone")

    async def forget_vm(self, name: str) -> None:
        """The rest of a destroyed VM: the ultravisor forgets it, guest and qemu end."""
        await self.ultravisor.remove_vm(name)
        await self._end_played(self.vms.pop(name))

    async def kill_vm(self, name: str) -> None:
        """As a restart does: guest and qemu die first, and both processes are told so."""
        await self._end_played(self.vms.pop(name))
        for process, role in ((self.ultravisor, Role.GUEST), (self.kvm, Role.GUEST), (self.kvm, Role.QEMU)):
            await process.peer_state(f"{name}/{role.value}", "gone")
        for process in (self.ultravisor, self.kvm):
            await process.remove_vm(name)

    def _play(self, vm: PlayedVm, wires: list[_Wire], private: socket.socket) -> None:
        kvm_guest, ultravisor_guest, kvm_qemu = (self._link(wire) for wire in wires)
        vm.guest = PlayedGuest(vm.ram, private, kvm_guest, ultravisor_guest, self.calls)
        vm.qemu = PlayedQemu(vm.ram, kvm_qemu, self.calls)
        vm.links = [kvm_guest, ultravisor_guest, kvm_qemu]

    async def _introduce(
        self, process: ServiceProcess, vm: PlayedVm, wires: list[_Wire], files: Mapping[str, int]
    ) -> None:
        me = process.role
        own = [wire for wire in wires if me in (wire.kind.upper, wire.kind.lower)]
        keys = Keys(links=[wire.key(me) for wire in own])
        await process.add_vm(vm.entry, [wire.entry(me) for wire in own], keys, {f"ram:{vm.name}": vm.ram_fd, **files})

    async def _serve(self, vm: PlayedVm, task_status: trio.TaskStatus[None]) -> None:
        try:
            with vm.scope:
                async with trio.open_nursery() as nursery:
                    for link in vm.links:
                        await nursery.start(link.run)
                    task_status.started()
        finally:
            vm.ended.set()

    async def _all_gifts(self, vm: PlayedVm) -> None:
        with trio.move_on_after(_GIFT_SECONDS):
            for gift in vm.gifts.values():
                await gift.wait()
            return
        raise HostFault(f"kvm gave no map for {vm.name}")

    async def _end_played(self, vm: PlayedVm) -> None:
        vm.scope.cancel()
        await vm.ended.wait()
        vm.close()

    def _given(self, tag: str, vm: str, fd: int) -> None:
        if vm in self.vms:
            self.vms[vm].take(tag, fd)
        else:
            os.close(fd)

    # -- links ------------------------------------------------------------------------------------------------

    def _wire(self, kind: LinkKind, vm: str | None, incarnation: int) -> _Wire:
        directory = self._home(kind.upper) / f"{vm or kind.lower.value}.{kind.lower.value}.{incarnation}"
        directory.mkdir()
        names = {
            role: f"{vm}/{role.value}" if role in (Role.GUEST, Role.QEMU) else f"{HOST}/{role.value}"
            for role in (kind.upper, kind.lower)
        }
        link_id = f"{vm or HOST}:{kind.name}.{incarnation}"
        return _Wire(link_id, kind, f"ipc://{directory}/s", vm, names, {role: _key_pair() for role in names})

    def _link(self, wire: _Wire) -> Link:
        me = wire.kind.lower
        channel = ZmqChannel(connect_socket(self._context, wire.entry(me), wire.key(me)))
        return Link(channel, wire.kind, me, wire.id, wire.names[wire.kind.upper], _LOG)


def _key_pair() -> _KeyPair:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _vm_entry(name: str, lpid: int, incarnation: int, memory_bytes: int, *, secure_allowed: bool) -> VmEntry:
    return VmEntry(
        name=name,
        lpid=lpid,
        incarnation=incarnation,
        memory_bytes=memory_bytes,
        ram_segment=f"pefbox-ram-{name}",
        time="wall",
        secure_allowed=secure_allowed,
        debuggable=False,
        guest=GuestEntry(),
        disks=[],
        devices=[],
    )


@asynccontextmanager
async def real_host(
    directory: Path, identity: dict[str, str], *, secure_memory_bytes: int = 64 << 20
) -> AsyncIterator[RealHost]:
    """A running host; `identity` are the ultravisor's keys as PEM text, `directory` is short and empty."""
    async with trio.open_nursery() as nursery:
        host = RealHost(directory, nursery)
        try:
            await host.start(identity, secure_memory_bytes)
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await host.stop()
            nursery.cancel_scope.cancel()
