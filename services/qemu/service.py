"""The qemu process: one VM's devices, monitor and boot."""

from __future__ import annotations

import functools
import mmap
import os
from typing import Any

import msgspec
import trio

from protocol import messages as m
from protocol.control import GDB_TAG
from protocol.errors import HostFault, PefboxError, UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gfn_of, gpa_of
from protocol.links import KVM_QEMU, QEMU_MIGRATION, QEMU_QEMU
from protocol.startup import MACHINE_KERNEL, Keys, LinkEntry, LinkKey, VmEntry
from services.qemu.board import Board
from services.qemu.description import describe_machine
from services.qemu.dma_windows import DmaWindows
from services.qemu.host_target import HostTarget
from services.qemu.loader import BOOT_FILES, load_machine
from services.qemu.machine import Machine
from services.qemu.migration.control import MigrationControl
from services.qemu.migration.kvm_port import KvmPort
from services.qemu.migration.monitor import MigrationEvent, MigrationMonitor
from services.qemu.migration.status import MigrationStatus
from services.qemu.moving_machine import MovingMachine
from services.qemu.network_links import NetworkLinks
from services.qemu.qmp import COMMANDS, Monitored, MonitorEvents, RunState, serve_monitors
from services.qemu.snapshot.control import FILE_GIFT, SnapshotControl, SnapshotPlace
from services.qemu.virtio_balloon import VirtioBalloon
from services.qemu.virtio_console import VirtioConsole
from services.runtime.gdb.server import Debuggers
from services.runtime.link import Link
from services.runtime.process import Query, Runtime
from shared.gdb_registers import MODEL, POWER
from shared.guest_ram import GuestRam
from shared.host_view import HostState
from shared.link_shape import LinkShapes
from shared.memfd import SealedMemory, map_sealed
from shared.stream_buffer import StreamBuffer
from shared.typed_text import Offer

_STATS_SECONDS = 0.3
MIGRATION_SOCKETS = frozenset({"migration-source", "migration-destination"})
"""Tags of the stream socket that the launcher gives to the two qemus of a migration."""


class Qemu:
    """One VM's device model."""

    def __init__(self, runtime: Runtime, keys: Keys) -> None:
        self._runtime = runtime
        self._vm: VmEntry | None = None
        self._machine: Machine | None = None
        self._link: Link | None = None
        self._networks: NetworkLinks | None = None
        self._shapes = LinkShapes()
        self._ram: GuestRam | None = None
        self._host_view: memoryview | None = None
        self._has_view = trio.Event()
        self._mappings: list[mmap.mmap] = []
        self._events: MonitorEvents | None = None
        self._migrations: MigrationControl | None = None
        self._migration_monitor: MigrationMonitor | None = None
        self._migration_link: Link | None = None
        self._snapshots = SnapshotControl(runtime.nursery, runtime.log)
        self._debuggers: Debuggers | None = None
        self._built = trio.Event()
        self._announced = False

    async def start(self) -> None:
        """Nothing host-wide."""

    async def add_vm(
        self, vm: VmEntry, links: list[LinkEntry], keys: dict[str, LinkKey], files: dict[str, int]
    ) -> None:
        """The VM of this process."""
        self._vm = vm
        entry = next(link for link in links if link.kind == KVM_QEMU.name)
        link = self._link = self._runtime.make_link(entry, keys[entry.id])
        events = self._events = MonitorEvents()
        machine = self._machine = Machine(link, events, self._runtime.nursery, self._runtime.log)
        machine.register(link)
        await self._runtime.serve_link(link)
        self._networks = NetworkLinks(self._runtime, vm)
        await self._networks.open([link for link in links if link.kind == QEMU_QEMU.name], keys)
        self._runtime.nursery.start_soon(self._run, vm, files, events)
        self._runtime.nursery.start_soon(self._open_migration_links, links, keys)

    async def replace_links(self, links: list[LinkEntry], keys: dict[str, LinkKey]) -> None:
        """Another VM of a network is in its next incarnation, or this one is to move and has a link to where."""
        if self._networks is not None:
            await self._networks.open([link for link in links if link.kind == QEMU_QEMU.name], keys)
        await self._open_migration_links(links, keys)
        if self._vm is not None and self._vm.incoming and not self._announced and self._machine is not None:
            self._runtime.nursery.start_soon(self._announce, self._machine)

    async def _open_migration_links(self, links: list[LinkEntry], keys: dict[str, LinkKey]) -> None:
        for entry in links:
            if entry.kind != QEMU_MIGRATION.name:
                continue
            await self._built.wait()
            assert self._migrations is not None
            if self._migration_link is not None:
                await self._runtime.close_link(self._migration_link)
            link = self._migration_link = self._runtime.make_link(entry, keys[entry.id])
            self._migrations.use_link(link)
            await self._runtime.serve_link(link)

    async def _run(self, vm: VmEntry, files: dict[str, int], events: MonitorEvents) -> None:
        assert self._machine is not None
        try:
            await self._build(vm, files)
            await self._serve_monitor(vm, events)
            if vm.starts:
                await self._machine.power_on()
        except PefboxError as error:
            self._runtime.log.error("the machine does not start", reason=str(error))
            await self._runtime.notice("vm-failed", vm.name, str(error))
            return
        await self._machine.quit_asked.wait()
        await self._runtime.notice("vm-off", vm.name, "quit")

    async def _build(self, vm: VmEntry, files: dict[str, int]) -> None:
        assert self._machine is not None
        assert self._link is not None
        await self._has_view.wait()
        assert self._host_view is not None
        marks = [await self._give_marks("device-dirty-map", "pefbox-dirty-device", vm)]
        if vm.guest.kernel == MACHINE_KERNEL:
            marks.append(await self._give_marks("device-writes", "pefbox-written-device", vm))
        ram_fd = files[f"ram:{vm.name}"]
        memory = memoryview(self._map_ram(ram_fd, vm.memory_bytes))
        ram = self._ram = GuestRam(memory, self._host_view, self._machine.want, *marks)
        disks = {name.removeprefix("disk:"): fd for name, fd in files.items() if name.startswith("disk:")}
        loads = {name: files[name] for name in BOOT_FILES if name in files}
        assert self._networks is not None
        board = self._machine.board = Board(
            vm, ram, disks, self._machine, networks=self._networks.switches, tracer=self._runtime.tracer
        )
        self._machine.load = lambda: load_machine(board, ram, loads)
        await self._link.call(m.MEMSLOT_SET, m.MemslotBody(0, 0, vm.memory_bytes))
        await board.start()
        self._machine.windows = DmaWindows(self._link, board.add_dma_window, board.remove_dma_window, self._runtime.log)
        for window in board.default_windows():
            if not await self._machine.windows.create(window):
                raise HostFault("kvm made no DMA window")
        self._runtime.nursery.start_soon(board.run)
        self._migrations = self._make_migrations(vm, board, memory, files)
        self._debuggers = Debuggers(self._host_target, self._runtime.nursery, self._runtime.log)
        self._built.set()

    def _host_target(self) -> HostTarget:
        assert self._machine is not None
        assert self._link is not None
        assert self._ram is not None
        assert self._host_view is not None
        assert self._vm is not None
        description = POWER if self._vm.guest.kernel == MACHINE_KERNEL else MODEL
        return HostTarget(self._machine, self._link, self._ram, self._host_view, description)

    def _make_migrations(
        self, vm: VmEntry, board: Board, ram: memoryview, files: dict[str, int]
    ) -> MigrationControl | None:
        stream = files.get(f"stream:{vm.name}")
        if stream is None:
            return None
        assert self._machine is not None
        assert self._link is not None
        assert self._host_view is not None
        machine = MovingMachine(vm, self._machine, board, ram, files[f"ram:{vm.name}"], self._host_view)
        if not vm.starts:
            self._machine.state = RunState.INMIGRATE
        kvm, buffer = KvmPort(self._link), StreamBuffer(stream)
        disks = {disk.name: files[f"disk:{disk.name}"] for disk in vm.disks}
        self._snapshots.place = SnapshotPlace(machine, kvm, buffer, disks, self._runtime.config.host, self._restored)
        control = MigrationControl(
            machine,
            kvm,
            buffer,
            self._runtime.nursery,
            self._runtime.log,
            self._migration_status,
            lambda host: self._runtime.notice("migrate", vm.name, host),
            self._runtime.tracer,
        )
        control.set_shape(self._shapes.migration)
        self._migration_monitor = MigrationMonitor(control, PAGE_BYTES)
        return control

    def _migration_status(self, status: MigrationStatus) -> None:
        if self._events is not None and self._migration_monitor is not None and self._migration_monitor.tells_events:
            self._events.emit(MigrationEvent(status))

    def _restored(self) -> None:
        if self._machine is not None:
            self._runtime.nursery.start_soon(self._announce, self._machine)

    async def _announce(self, machine: Machine) -> None:
        """Tell the networks where the VM that has arrived is now."""
        board = machine.board
        if machine.state.elsewhere or board is None or self._migrations is None:
            return
        self._announced = True
        for delay_ms in self._migrations.parameters.announcements_ms():
            await trio.sleep(delay_ms / 1000)
            board.announce()

    async def _give_marks(self, tag: str, name: str, vm: VmEntry) -> memoryview:
        """A map of a byte a GFN that devices set; whoever reads it clears it."""
        memory = SealedMemory(name, vm.memory_bytes >> PAGE_SHIFT, others_write=True)
        await self._runtime.give(tag, vm.name, memory.fd)
        return memory.buffer

    def _map_ram(self, fd: int, size_bytes: int) -> mmap.mmap:
        try:
            mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise HostFault(f"cannot map the RAM segment: {error}") from None
        self._mappings.append(mapping)
        return mapping

    async def _serve_monitor(self, vm: VmEntry, events: MonitorEvents) -> None:
        config = self._runtime.config
        if config.monitor_socket is None or config.control_monitor_socket is None or self._machine is None:
            return
        monitored = Monitored(vm.name, self._machine, events, self._runtime.log)
        commands = COMMANDS
        if self._migration_monitor is not None:
            commands = commands.extended(*self._migration_monitor.commands())
        await self._runtime.nursery.start(
            functools.partial(serve_monitors, commands=commands),
            monitored,
            config.monitor_socket,
            config.control_monitor_socket,
        )

    async def remove_vm(self, name: str) -> None:
        """A qemu process ends with its VM."""

    async def gift(self, tag: str, vm: str, fd: int) -> None:
        """kvm's host view and TCE tables; the launcher's socket to another qemu."""
        if tag in MIGRATION_SOCKETS and self._migrations is not None:
            self._migrations.take_socket(fd)
            return
        if tag == FILE_GIFT:
            self._snapshots.take_file(fd)
            return
        if tag == GDB_TAG and self._debuggers is not None:
            self._debuggers.take(fd)
            return
        if tag == "host-view" and self._vm is not None and not self._has_view.is_set():
            mapping = map_sealed(fd, self._vm.memory_bytes >> PAGE_SHIFT)
            self._mappings.append(mapping)
            self._host_view = memoryview(mapping)
            self._has_view.set()
        elif not self._take_window(tag, fd):
            os.close(fd)
            self._runtime.log.warning("unexpected descriptor", tag=tag, vm=vm)

    def _take_window(self, tag: str, fd: int) -> bool:
        windows = None if self._machine is None else self._machine.windows
        return windows is not None and windows.take(tag, fd)

    def peer_state(self, peer: str, state: str) -> None:
        """kvm died, stopped, came back: the link tells whoever waits."""

    def hold_time(self, on: bool) -> None:
        """Only guests keep time."""

    async def stop(self) -> None:
        """The disks are written through, and a debugger goes."""
        if self._debuggers is not None:
            self._debuggers.close()

    # -- questions of the operator ----------------------------------------------------------------------------

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {
            "vm.status": self._vm_status,
            "machine.describe": self._describe,
            "page.bytes": self._page_bytes,
            "dma.reach": self._dma_reach,
            "run.stop": self._run_stop,
            "run.cont": self._run_cont,
            "network.status": self._network_status,
            "link.shape": self._link_shape,
            "balloon.status": self._balloon_status,
            "balloon.ask": self._balloon_ask,
            "console.read": self._console_read,
            "console.write": self._console_write,
            "gdb.order": self._gdb_order,
            "migration.start": self._migration_start,
            "migration.status": self._migration_describe,
            "migration.cancel": self._migration_cancel,
            "migration.set": self._migration_set,
            "migration.refused": self._migration_refused,
            "migration.resume": self._migration_resume,
            "migration.has-started": self._migration_has_started,
            **self._snapshots.queries(),
        }

    async def _gdb_order(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """The byte order of the processor; None of a secure VM's, which the host cannot know."""
        if self._debuggers is None:
            raise UserError("the machine has no devices yet")
        return {"order": await self._host_target().order()}

    # -- migration --------------------------------------------------------------------------------------------

    async def _migration_start(self, arguments: dict[str, Any]) -> dict[str, Any]:
        asked = str(arguments["host"]) if arguments["by_monitor"] else None
        self._moves().start(dict(arguments["parameters"]), asked)
        return self._moves().describe()

    async def _migration_describe(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        return self._moves().describe()

    async def _migration_cancel(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        self._moves().cancel()
        return self._moves().describe()

    async def _migration_set(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._moves().limit(dict(arguments["parameters"]))
        parameters: dict[str, Any] = msgspec.to_builtins(self._moves().parameters)
        return parameters

    async def _migration_refused(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The launcher does not do what a user of the monitor asked for."""
        self._moves().refused(str(arguments["reason"]))
        return self._moves().describe()

    async def _migration_resume(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """An operator found out that a VM in doubt is here again."""
        await self._moves().resume()
        return self._moves().describe()

    async def _migration_has_started(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """An operator found out that a VM in doubt runs here, where it arrived."""
        await self._moves().has_started()
        return self._moves().describe()

    def _moves(self) -> MigrationControl:
        if self._migrations is None:
            raise UserError("the machine has no devices yet")
        return self._migrations

    async def _vm_status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        machine = self._machine
        if machine is None or machine.board is None:
            return {"state": "prelaunch", "faults": {}}
        return {
            "state": machine.state.value,
            "faults": machine.board.faults(),
            "exit_status": machine.exit_status,
            "run_seconds": machine.run_seconds,
            "panic": machine.panic,
            "iommu_lookups": machine.board.n_iommu_lookups,
        }

    async def _describe(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """What the machine is made of."""
        if self._machine is None or self._machine.board is None:
            raise HostFault("the machine has no devices yet")
        return describe_machine(self._machine.board)

    async def _dma_reach(self, _arguments: dict[str, Any]) -> dict[str, dict[str, int]]:
        """How many frames each virtio device could read or write now, by their state in the host's view."""
        board = None if self._machine is None else self._machine.board
        reach = {} if board is None else board.reach()
        return {name: {state.name: n for state, n in states.items()} for name, states in reach.items()}

    async def _run_stop(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """As the monitor's `stop`; whether the machine was running, or would have but for a debugger."""
        machine = self._made_machine()
        was_running = machine.is_running
        await machine.stop()
        return {"stopped": was_running}

    async def _run_cont(self, _arguments: dict[str, Any]) -> None:
        """As the monitor's `cont`."""
        await self._made_machine().cont()

    def _made_machine(self) -> Machine:
        if self._machine is None:
            raise HostFault("the machine has not started")
        return self._machine

    async def _network_status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Network cards, and the other VMs of each network, with what was sent, received and dropped."""
        board = None if self._machine is None else self._machine.board
        return {
            "devices": [] if board is None else board.network_cards(),
            "networks": [] if self._networks is None else self._networks.status(),
        }

    async def _link_shape(self, arguments: dict[str, Any]) -> None:
        """What the links to the hosts of other qemus do to what is sent to these."""
        shapes = msgspec.convert(arguments, LinkShapes)
        if shapes.number <= self._shapes.number:
            return
        self._shapes = shapes
        if self._networks is not None:
            self._networks.set_shapes(shapes.peers)
        if self._migrations is not None:
            self._migrations.set_shape(shapes.migration)

    async def _balloon_status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """How much memory the guest has and is to have, as far as its balloon goes."""
        status: dict[str, Any] = msgspec.to_builtins(self._balloon().balloon_status())
        return status

    async def _balloon_ask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """As `balloon.status`, with statistics that the guest was asked for just now, if it answers at once."""
        await self._balloon().ask_stats(_STATS_SECONDS)
        return await self._balloon_status(arguments)

    def _balloon(self) -> VirtioBalloon:
        board = None if self._machine is None else self._machine.board
        if board is None or board.balloon is None:
            raise UserError("the machine has no balloon")
        return board.balloon

    async def _console_read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Text printed on the virtio console `port`; waits for some."""
        return await self._console(arguments).text.answer_read(arguments)

    async def _console_write(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"taken": self._console(arguments).type_in(Offer.of(arguments))}

    def _console(self, arguments: dict[str, Any]) -> VirtioConsole:
        board = None if self._machine is None else self._machine.board
        consoles = {} if board is None else board.consoles
        port = str(arguments["port"])
        if port not in consoles:
            raise UserError(f"no virtio-console {port!r}; there is: {', '.join(consoles) or 'none'}")
        return consoles[port]

    async def _page_bytes(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """One page as the host sees it, through the accessor; with `raw` the frame itself when it is present."""
        if self._ram is None or self._host_view is None:
            raise HostFault("the machine has no memory yet")
        gpa = gpa_of(gfn_of(int(arguments["gpa"])))
        self._ram.check(gpa, PAGE_BYTES)
        before = HostState(self._host_view[gfn_of(gpa)]).name
        return {"gpa": gpa, "host_view": before, "bytes": await self._ram.read(gpa, PAGE_BYTES)}
