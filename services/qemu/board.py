"""All devices of one VM, put together from its start configuration.

The process around it carries kvm's exits here (`mmio_load`, `mmio_store`, `rtas`), runs `run`, and gives the ports by
which devices reach interrupt controller, terminal and run state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
import trio

from protocol.codes import HCode
from protocol.messages import TceWindowBody
from protocol.roles import Role
from protocol.rtas import EXIT, RTAS, SERVED_BY
from protocol.startup import DeviceEntry, IommuDomain, VmEntry
from services.qemu.device_function import DeviceFunction
from services.qemu.device_tree import BootFacts, PciNodes, TreeFacts, build_device_tree
from services.qemu.devices import DeviceMaker, DevicePort, FunctionState
from services.qemu.dma import BypassSpace, IommuSpace
from services.qemu.hcalls import QemuHcalls
from services.qemu.network import Switch
from services.qemu.phb import IrqPort, PciHostBridge
from services.qemu.rtas import MachineFacts, MachinePort, RtasServices, RtasState
from services.qemu.virtio_access import DeviceMemory
from services.qemu.virtio_balloon import BalloonState, VirtioBalloon
from services.qemu.virtio_console import VirtioConsole
from services.qemu.virtio_net import VirtioNet
from services.qemu.virtio_pci import VirtioPciFunction
from services.runtime.text_buffers import TextState
from services.runtime.tracer import UNTRACED, Tracer
from shared.guest_ram import GuestRam
from shared.host_view import HostState
from shared.interrupt_sources import EPOW_SOURCE, HOTPLUG_SOURCE, NVRAM_SOURCE, VTY_SOURCE
from shared.machine_type import N_CPUS, machine_uuid, slot_of
from shared.pci import devfn_of
from shared.tce import TceTable
from shared.virtio import DeviceStatus

ACCESS_SIZES = (1, 2, 4, 8)


class BoardPort(IrqPort, MachinePort, DevicePort, Protocol):
    """What a board needs from its process."""

    def doorbell(self, gpa: int, on: bool) -> None:
        """A store to the notify register at `gpa` only wakes a device, or is an exit as any other again."""

    def cas_refused(self, reason: str) -> None:
        """The guest's kernel asked for a machine that this is not: for the operator."""


class BoardState(msgspec.Struct):
    """Everything that a guest can see of its devices, between two requests; functions by devfn."""

    functions: dict[int, FunctionState]
    msi_blocks: dict[int, tuple[int, int]]
    """devfn -> first source and number of sources."""
    rtas: RtasState
    consoles: dict[str, TextState]
    """What the virtio consoles keep, by name."""
    balloon: BalloonState | None


class Board:
    """The devices of `vm`. `disks` are open descriptors by disk name; they stay the caller's to close.

    `networks` are the VM's ends of its networks; `tracer` is told of each request.

    With `assign_bars` BARs have addresses from the start, otherwise firmware or driver gives them. With `time` of the
    VM "instructions" a kick returns when the device has finished what was available, so that runs repeat.

    Raises UserError for a device that does not exist here, a disk without descriptor, a network without end.
    """

    def __init__(
        self,
        vm: VmEntry,
        ram: GuestRam,
        disks: Mapping[str, int],
        port: BoardPort,
        *,
        networks: Mapping[str, Switch] | None = None,
        assign_bars: bool = False,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self.vm = vm
        self.bridge = PciHostBridge(port, ddw=vm.dma.ddw)
        self.functions: list[DeviceFunction[Any]] = []
        self._ram = ram
        self._port = port
        self._assign_bars = assign_bars
        self._waits_for_devices = vm.time == "instructions"
        if not self._waits_for_devices:
            self.bridge.tell_doorbell = port.doorbell
        self.uuid = machine_uuid(vm.name, vm.lpid)
        self._iommus: list[IommuSpace] = []
        for index, device in enumerate(vm.devices):
            devfn = devfn_of(slot_of(index))
            function = DeviceMaker(vm, self._memory_of(devfn, device), port, disks, networks or {}).make(device)
            function.device.trace_to(tracer, vm.lpid)
            self.functions.append(function)
            self.bridge.bus.plug(devfn, function)
        facts = MachineFacts(vm.memory_bytes, N_CPUS, self.uuid.bytes, repeatable=vm.time == "instructions")
        self.rtas_services = RtasServices(ram, self.bridge, port, port, facts)
        self.hcalls = QemuHcalls(ram, self, self)
        self.updated_tree: bytes | None = None
        """What firmware made of the device tree, once it has told."""
        self._described: tuple[BootFacts, PciNodes] = (BootFacts(), PciNodes.QEMU)
        if assign_bars:
            self.bridge.assign_bars()

    def _memory_of(self, devfn: int, device: DeviceEntry) -> DeviceMemory:
        own = device.iommu_domain is IommuDomain.OWN
        domain = self.bridge.give_own_domain(devfn) if own else self.bridge.bus_domain
        iommu = IommuSpace(self._ram, domain.windows)
        self._iommus.append(iommu)
        return DeviceMemory(BypassSpace(self._ram), iommu)

    # Life.

    async def start(self) -> None:
        """Tell the interrupt controller which sources exist; before the guest runs."""
        for source in (EPOW_SOURCE, HOTPLUG_SOURCE, VTY_SOURCE, NVRAM_SOURCE):
            await self._port.define(source, level_triggered=False)
        for source in self.bridge.lsi_sources():
            await self._port.define(source, level_triggered=True)

    async def run(self) -> None:
        """Serve all devices until cancelled."""
        async with trio.open_nursery() as nursery:
            for function in self.functions:
                nursery.start_soon(function.device.run)

    async def drained(self) -> None:
        """Return when no device has anything left to do."""
        for function in self.functions:
            await function.device.drained()

    async def reset(self) -> None:
        """All devices as at power-on, once their open requests have ended; non-volatile memory and clock stay."""
        for function in self.functions:
            await function.reset_function()
            self.bridge.msis.release(function.devfn)
        self.updated_tree = None
        await self.rtas_services.ddw.to_default()
        if self._assign_bars:
            self.bridge.assign_bars()

    def announce(self) -> None:
        """Every network card says where it is, so that frames for it come here."""
        for function in self._virtio:
            if isinstance(function.device, VirtioNet):
                function.device.announce()

    @property
    def n_iommu_lookups(self) -> int:
        """Ranges that devices had translated."""
        return sum(iommu.n_lookups for iommu in self._iommus)

    def reach(self) -> dict[str, dict[HostState, int]]:
        """How many frames each virtio device could read or write now, by their state."""
        return {function.device.name: self._ram.states(function.device.reach()) for function in self._virtio}

    def default_windows(self) -> list[TceWindowBody]:
        """The 32-bit DMA windows that kvm makes: for the bus, then for each device that has its own."""
        return [domain.default_window for domain in self.bridge.domains]

    def add_dma_window(self, table: TceTable) -> None:
        """The devices of its domain translate through `table` from now on; it replaces one of the same liobn."""
        domain = self.bridge.domain_with(table.liobn)
        if domain is not None:
            domain.use(table)

    def remove_dma_window(self, liobn: int) -> None:
        """Devices reach nothing through the window any more."""
        domain = self.bridge.domain_with(liobn)
        if domain is not None:
            domain.drop(liobn)

    # Exits.

    def mmio_load(self, gpa: int, size_bytes: int) -> tuple[int, int]:
        """(H_SUCCESS, the little-endian value at `gpa`), or (H_PARAMETER, 0) where no device answers."""
        if size_bytes not in ACCESS_SIZES:
            return HCode.H_PARAMETER, 0
        value = self.bridge.mmio_load(gpa, size_bytes)
        return (HCode.H_PARAMETER, 0) if value is None else (HCode.H_SUCCESS, value)

    def ring(self, gpa: int, size_bytes: int, value: int) -> None:
        """A store to a doorbell; nothing happens where no device answers."""
        if size_bytes in ACCESS_SIZES:
            self.bridge.mmio_store(gpa, size_bytes, value)

    async def mmio_store(self, gpa: int, size_bytes: int, value: int) -> int:
        """H_SUCCESS, or H_PARAMETER where no device answers."""
        if size_bytes not in ACCESS_SIZES or not self.bridge.mmio_store(gpa, size_bytes, value):
            return HCode.H_PARAMETER
        if self._waits_for_devices:
            await self.drained()
        return HCode.H_SUCCESS

    async def rtas(self, name: str, args: list[int], n_rets: int) -> list[int]:
        """`n_rets` return words of the service called `name`, the status first."""
        return await self.rtas_services.call(name, args, n_rets)

    async def rtas_token(self, token: int, args: list[int], n_rets: int) -> list[int]:
        """As `rtas`, by token; an unknown one is PARAMETER_ERROR."""
        call = RTAS.by_number.get(token)
        return await self.rtas("" if call is None else call.name, args, n_rets)

    def set_dma_bypass(self, buid: int, config_addr: int, *, on: bool) -> HCode:
        """H_SET_DMA_BYPASS."""
        if not any(function.device.access.offer.bypass_switch for function in self._virtio):
            return HCode.H_FUNCTION
        function = self.bridge.bus.functions.get(config_addr >> 8) if buid == self.bridge.buid else None
        if not isinstance(function, VirtioPciFunction) or config_addr & 0xFF:
            return HCode.H_PARAMETER
        if function.device.status & DeviceStatus.DRIVER_OK:
            return HCode.H_IN_USE
        return HCode.H_SUCCESS if function.device.access.set_bypass(on) else HCode.H_UNSUPPORTED

    def turned_secure(self) -> None:
        """The VM is secure now: its virtio devices move behind the IOMMU, whatever their drivers had settled on."""
        for function in self._virtio:
            function.device.put_behind_iommu("moved behind the IOMMU: the VM turned secure")

    @property
    def _virtio(self) -> list[VirtioPciFunction]:
        return [function for function in self.functions if isinstance(function, VirtioPciFunction)]

    # Description and state.

    def device_tree(self, boot: BootFacts, pci_nodes: PciNodes = PciNodes.QEMU) -> bytes:
        """The flattened tree of the machine as it stands; names only RTAS services that somebody answers."""
        self._described = (boot, pci_nodes)
        answered = {
            call.name: call.number
            for call in RTAS
            if call.name in self.rtas_services.names or SERVED_BY.get(call.number) is Role.KVM
        }
        if self.vm.guest.boot != "program":
            # A property that QEMU's machine lacks is for those only who cannot take it for QEMU's.
            del answered[RTAS.by_number[EXIT].name]
        facts = TreeFacts(self.vm.name, self.uuid.bytes, self.vm.memory_bytes, N_CPUS, answered, pci_nodes, boot)
        return build_device_tree(facts, self.bridge)

    def agreed_tree(self) -> bytes:
        """As `device_tree` for the same start, with the option vector that a guest agreed on."""
        boot, pci_nodes = self._described
        return self.device_tree(dataclasses.replace(boot, negotiated=True), pci_nodes)

    @property
    def loaded_little_endian(self) -> bool:
        """Whether the kernel that was loaded with the machine is little-endian; unknown is no."""
        boot, _ = self._described
        return boot.kernel_little_endian

    def tree_updated(self, tree: bytes) -> None:
        """Firmware told its final tree."""
        self.updated_tree = tree

    def cas_refused(self, reason: str) -> None:
        """The guest's kernel asked for what is not there."""
        self._port.cas_refused(reason)

    def save(self) -> BoardState:
        """A copy of the state; the devices are drained."""
        functions = {function.devfn: function.save() for function in self.functions}
        blocks = {devfn: (block.start, len(block)) for devfn, block in self.bridge.msis.blocks.items()}
        consoles = {name: console.text.save() for name, console in self.consoles.items()}
        balloon = None if self.balloon is None else self.balloon.save_balloon()
        return BoardState(functions, blocks, self.rtas_services.save(), consoles, balloon)

    def load(self, state: BoardState) -> None:
        """Go on from `state`, of a board with the same devices; raises ValueError for another one's."""
        kinds = {function.devfn: function.state_type for function in self.functions}
        saved = {devfn: type(function) for devfn, function in state.functions.items()}
        others = saved != kinds or set(state.consoles) != set(self.consoles)
        if others or (state.balloon is None) is not (self.balloon is None):
            raise ValueError("the saved board has other devices")
        self.bridge.msis.blocks = {
            devfn: range(first, first + n) for devfn, (first, n) in sorted(state.msi_blocks.items())
        }
        for name, console in self.consoles.items():
            console.text.load(state.consoles[name])
        for function in self.functions:
            function.load_state(state.functions[function.devfn])
        if self.balloon is not None and state.balloon is not None:
            self.balloon.load_balloon(state.balloon)
        self.rtas_services.load(state.rtas)

    @property
    def consoles(self) -> dict[str, VirtioConsole]:
        """The virtio consoles by name."""
        devices = zip(self.vm.devices, self.functions, strict=True)
        return {
            entry.name: function.device
            for entry, function in devices
            if entry.name is not None and isinstance(function.device, VirtioConsole)
        }

    @property
    def balloon(self) -> VirtioBalloon | None:
        """The balloon; a VM has one at most."""
        devices = (function.device for function in self.functions)
        return next((device for device in devices if isinstance(device, VirtioBalloon)), None)

    def network_cards(self) -> list[dict[str, object]]:
        """Each network card: its network, address and traffic."""
        devices = zip(self.vm.devices, self.functions, strict=True)
        return [
            {"network": entry.network, "mac": entry.mac, **function.device.traffic.as_dict()}
            for entry, function in devices
            if isinstance(function.device, VirtioNet)
        ]

    def faults(self) -> dict[str, str]:
        """Why devices need a reset or refused their driver, by device name; those without a fault are left out."""
        devices = [function.device for function in self.functions]
        return {device.name: device.fault for device in devices if device.fault is not None}
