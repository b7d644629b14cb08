"""The boot stage: firmware and boot loader in one. It brings the VM from QEMU's entry to UV_ESM.

BOOT_TREE reads the device tree and instantiates RTAS, BOOT_BUS finds the devices and gives them addresses, BOOT_DISK
starts the disk, BOOT_TABLE reads the partition table, BOOT_HEADER the boot header, BOOT_LOAD image, initramfs and
command line, BOOT_DEMO reads a part of the disk for the demo, BOOT_ENTER writes the tree and calls UV_ESM. With the
image already in RAM (`qemu,boot-kernel`) nothing is loaded. `svm=on` (or `svm=1`) in the command line asks for UV_ESM;
if it fails, the kernel runs as a normal VM.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.codes import UCode
from protocol.declare import Space
from protocol.errors import ImageRefused
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.ucalls import UV_ESM
from services.guest.model import image
from services.guest.model.bulk import CHUNK_BYTES
from services.guest.model.cpu import RTAS_AREA_BYTES, NoDevice, Step
from services.guest.model.machine import has_boot_arg, load_tree, place, read_machine, write_bypass, write_chosen
from services.guest.model.pages import PageUse, pages_for
from services.guest.model.parts import Parts
from services.guest.model.pci import Function
from services.guest.model.state import Owner, Phase, VirtioPci, Workload
from services.guest.model.virtio_pci import Transport
from shared import boot_partition
from shared.boot_partition import PartitionType
from shared.esm_digest import RTAS_TEXT
from shared.fdt_writer import write_fdt
from shared.virtio import Feature, has_feature
from shared.virtio_blk import SECTOR_BYTES, BlkRequest

DEMO_NORMAL_BYTES = 1 << 20
LEFT_READS = 16
LEFT_READ_BYTES = 1 << 20
"""Of each request that the boot stage leaves behind when it does not quiesce the disk."""


class BootStage:
    """The phases before the kernel; `enter_kernel` is what follows when the VM stays normal."""

    def __init__(self, parts: Parts, enter_kernel: Callable[[], None]) -> None:
        self._parts = parts
        self._state = parts.state
        self._enter_kernel = enter_kernel
        self._phases: dict[Phase, Callable[[], Step[None] | None]] = {
            Phase.BOOT_TREE: self._tree,
            Phase.BOOT_BUS: self._bus,
            Phase.BOOT_DISK: self._disk,
            Phase.BOOT_TABLE: self._table,
            Phase.BOOT_HEADER: self._header,
            Phase.BOOT_LOAD: self._load,
            Phase.BOOT_DEMO: self._demo,
            Phase.BOOT_ENTER: self._enter,
        }

    def work(self) -> Step[None] | None:
        """What this phase does next; None while it waits."""
        phase = self._phases.get(self._state.phase)
        return phase() if phase else None

    # -- device tree ----------------------------------------------------------------------------------------------

    def _tree(self) -> Step[None]:
        parts, machine = self._parts, self._state.machine
        tree, machine.fdt_bytes = load_tree(parts.cpu, machine.fdt)
        read_machine(tree, machine, parts.cpu.memory.size_bytes)
        if not machine.rtas_base:
            machine.rtas_base = place(machine, RTAS_AREA_BYTES)
            parts.cpu.fill(machine.rtas_base, RTAS_AREA_BYTES)
            parts.cpu.store(machine.rtas_base, RTAS_TEXT)
        parts.set_up_memory()
        parts.console.say(f"pefbox: boot stage, {machine.memory_bytes >> 20} MiB")
        yield from parts.open_interrupts()
        self._state.kbase = machine.kernel
        self._state.phase = Phase.BOOT_BUS

    def _bus(self) -> Step[None]:
        """Find what is on the bus, and give a function after the other its addresses."""
        parts, machine, boot = self._parts, self._state.machine, self._state.boot
        if not boot.probed:
            yield from parts.probe_bus()
            boot.probed = True
        elif boot.n_assigned < len(machine.functions):
            config_addr, *_ = machine.functions[boot.n_assigned]
            try:
                yield from parts.bus.assign_bars(config_addr)
            except NoDevice as error:
                parts.console.say(f"pefbox: boot: {error}")
            boot.n_assigned += 1
        else:
            self._state.phase = Phase.BOOT_DISK

    def _disk(self) -> Step[None]:
        parts, blk = self._parts, self._state.blk
        if not blk.present and not blk.error:
            yield from parts.find_disk()
            if blk.present:
                return
        yield from parts.start_disk()
        self._state.phase = Phase.BOOT_TABLE if blk.ready else Phase.BOOT_ENTER

    # -- loading --------------------------------------------------------------------------------------------------

    def _table(self) -> Step[None] | None:
        return read_partitions(self._parts, self._have_partitions)

    def _have_partitions(self) -> None:
        has_boot = self._state.partitions.boot[1] and not self._state.kbase
        self._state.phase = Phase.BOOT_HEADER if has_boot else self._after_load()

    def _header(self) -> Step[None] | None:
        first, _ = self._state.partitions.boot
        return read_sector(self._parts, first, self._have_header)

    def _have_header(self, sector: bytes) -> None:
        first, n_sectors = self._state.partitions.boot
        parts, machine, boot = self._parts, self._state.machine, self._state.boot
        try:
            header = boot_partition.parse_header(sector, n_sectors * SECTOR_BYTES)
        except ImageRefused as error:
            parts.console.say(f"pefbox: boot: {error.reason}")
            self._state.phase = Phase.BOOT_ENTER
            return
        loads = []
        for extent in (header.image, header.initrd, header.command_line):
            n_pages = pages_for(extent.n_bytes)
            gpa = parts.pages.must_alloc(n_pages, PageUse.RESERVED) if n_pages else 0
            loads.append((first * SECTOR_BYTES + extent.offset_bytes, gpa, extent.n_bytes))
        machine.kernel, machine.kernel_bytes = loads[0][1:]
        machine.initrd, machine.initrd_bytes = loads[1][1:]
        machine.reserved += [load[1:] for load in loads[:2] if load[2]]
        boot.command_line = loads[2][1:]
        boot.loads = [load for load in loads if load[2]]
        self._state.kbase = machine.kernel
        self._state.phase = Phase.BOOT_LOAD

    def _load(self) -> Step[None] | None:
        parts, boot, bulk = self._parts, self._state.boot, self._state.bulk
        if not boot.loading:
            return self._next_file()
        while parts.reader.has_chunk():
            parts.reader.consume()
        if not parts.reader.finished:
            return parts.reader.work()
        bulk.active = boot.loading = False
        boot.loads.pop(0)
        if bulk.error:
            parts.console.say(f"pefbox: boot: disk: {bulk.error}")
            self._state.kbase = 0
            self._state.phase = Phase.BOOT_ENTER
        elif not boot.loads:
            self._take_command_line()
            self._state.phase = self._after_load()
        return _nothing()

    def _next_file(self) -> Step[None]:
        boot = self._state.boot
        start, gpa, n_bytes = boot.loads[0]
        # Whole sectors: the pages behind a file's end are its own.
        n_bytes = -(-n_bytes // SECTOR_BYTES) * SECTOR_BYTES
        chunk_bytes = min(CHUNK_BYTES, self._parts.blk.max_bytes)
        n_chunks = -(-n_bytes // chunk_bytes)
        self._parts.reader.start(start // SECTOR_BYTES, n_bytes, gpa, n_chunks, chunk_bytes)
        boot.loading = True
        return
        yield

    def _take_command_line(self) -> None:
        gpa, n_bytes = self._state.boot.command_line
        if n_bytes:
            text = self._parts.cpu.load(gpa, n_bytes)
            self._state.machine.boot_args = text.rstrip(b"\0").decode("ascii", "replace")

    def _after_load(self) -> Phase:
        """The demo reads a part of its disk as a normal VM first."""
        state = self._state
        if not (state.kbase and state.blk.ready):
            return Phase.BOOT_ENTER
        try:
            header = image.parse_header(self._parts.cpu.load(state.kbase, PAGE_BYTES))
        except ImageRefused:
            return Phase.BOOT_ENTER
        return Phase.BOOT_DEMO if header.settings.workload is Workload.DEMO else Phase.BOOT_ENTER

    def _demo(self) -> Step[None] | None:
        parts, state = self._parts, self._state.disk_hash
        n_disk_bytes = self._state.blk.sectors * SECTOR_BYTES
        if not state.active and not state.result and not state.error:
            n_bytes = min(DEMO_NORMAL_BYTES, n_disk_bytes)
            free = self._state.pages.n_free
            parts.hasher.start(n_bytes, parts.blk.max_bytes, free, page_cache=True, asked=False)
        if state.active:
            return parts.hasher.work() or parts.reader.work()
        n_bytes = state.position
        parts.console.say(f"pefbox: normal read {n_bytes} bytes sha256 {state.result or state.error}")
        self._state.phase = Phase.BOOT_ENTER
        return _nothing()

    # -- entering the kernel --------------------------------------------------------------------------------------

    def _enter(self) -> Step[None] | None:
        state = self._state
        if state.console.out:
            return None
        if not state.kbase:
            return self._nothing_to_boot()
        if state.blk.ready and state.boot.n_left < LEFT_READS and not self._quiesces():
            return self._leave_read()
        return self._ask_next() or self._go()

    def _ask_next(self) -> Step[None] | None:
        """A step for a device that the boot stage does not drive: whether it offers ACCESS_PLATFORM."""
        parts, disk = self._parts, self._state.blk.pci.config_addr
        others = [one for one in parts.bus.functions if one.is_virtio and one.config_addr != disk]
        if self._state.old_firmware or self._state.boot.n_asked >= len(others):
            return None
        return self._ask(others[self._state.boot.n_asked])

    def _ask(self, function: Function) -> Step[None]:
        boot = self._state.boot
        transport = Transport(self._parts.cpu, self._parts.bus, boot.asked)
        try:
            yield from transport.find(function)
            offered = yield from transport.read_features()
            yield from transport.reset()
        except NoDevice as error:
            self._parts.console.say(f"pefbox: boot: {error}")
            offered = 0
        if has_feature(offered, Feature.ACCESS_PLATFORM):
            boot.demanding.append(function.config_addr)
        boot.n_asked, boot.asked = boot.n_asked + 1, VirtioPci()

    def _nothing_to_boot(self) -> Step[None]:
        self._parts.console.say("pefbox: no kernel to boot; this is the boot stage")
        self._parts.console.prompt()
        self._state.phase = Phase.RUN
        return
        yield

    def _go(self) -> Step[None]:
        parts, state = self._parts, self._state
        if not state.boot.n_left:
            yield from parts.stop_disk()
        self._write_tree()
        if state.boot.n_left:
            yield from parts.blk.kick()
        if not has_boot_arg(state.machine, "svm=on", "svm=1"):
            self._enter_kernel()
            return
        result = yield from call_esm(parts)
        parts.console.say(f"pefbox: UV_ESM failed: {result}; going on as a normal VM")
        self._enter_kernel()

    def _quiesces(self) -> bool:
        """Whether the kernel's image wants the disk stopped before it is entered."""
        try:
            header = image.parse_header(self._parts.cpu.load(self._state.kbase, PAGE_BYTES))
        except ImageRefused:
            return True
        return bool(header.settings.options.get("quiesce", True))

    def _leave_read(self) -> Step[None]:
        """What a careless boot loader does: it goes, and the disk still has requests."""
        parts, blk, boot = self._parts, self._state.blk, self._state.boot
        n_bytes = min(LEFT_READ_BYTES, parts.blk.max_bytes, blk.sectors * SECTOR_BYTES)
        if not boot.left_buffer:
            boot.left_buffer = parts.pages.must_alloc_apart(pages_for(n_bytes), PageUse.BUFFER)
            gfns = [gpa >> PAGE_SHIFT for gpa in (boot.left_buffer, blk.commands.gpa, blk.ring.gpa)]
            at = "buffer {:#x}, commands {:#x}, ring {:#x}".format(*gfns)
            parts.console.say(f"pefbox: boot: {LEFT_READS} reads are left behind: {at}")
        yield from parts.blk.submit(BlkRequest.IN, 0, boot.left_buffer, n_bytes, Owner.NONE, 0)
        boot.n_left += 1

    def _write_tree(self) -> None:
        machine, parts = self._state.machine, self._parts
        tree, _ = load_tree(parts.cpu, machine.fdt)
        write_chosen(tree, machine)
        pci = self._state.blk.pci
        disk = [pci.config_addr] if has_feature(pci.features, Feature.ACCESS_PLATFORM) else []
        # What a device demands is known to firmware alone: it is not in what the device model describes.
        for config_addr in disk + self._state.boot.demanding:
            write_bypass(tree, config_addr)
        data = write_fdt(tree)
        # The ultravisor adds its reservations to the tree in place: leave it a page.
        n_pages = pages_for(len(data)) + 1
        machine.fdt, machine.fdt_bytes = parts.pages.must_alloc(n_pages, PageUse.RESERVED), len(data)
        parts.cpu.store(machine.fdt, data)


def call_esm(parts: Parts) -> Step[str]:
    """UV_ESM. On success the processor starts anew at kbase and nothing comes back; else the name of the code."""
    machine = parts.machine
    code, *_ = yield from parts.cpu.ucall_once(UV_ESM, parts.state.kbase, machine.fdt)
    return "U_SUCCESS without a start" if code == UCode.U_SUCCESS else Space.UCALL.code(code)


def read_sector(parts: Parts, sector: int, use: Callable[[bytes], None]) -> Step[None] | None:
    """Read one sector and hand it to `use`; an error reads as zeros, which no header is."""
    bulk = parts.state.bulk
    if not bulk.active:
        return _start_sector(parts, sector)
    if parts.reader.has_chunk():
        parts.reader.consume()
    if not parts.reader.finished:
        return parts.reader.work()
    return _end_sector(parts, use)


def _start_sector(parts: Parts, sector: int) -> Step[None]:
    buffer = parts.pages.must_alloc(1, PageUse.BUFFER)
    parts.reader.start(sector, SECTOR_BYTES, buffer, 1, SECTOR_BYTES)
    return
    yield


def _end_sector(parts: Parts, use: Callable[[bytes], None]) -> Step[None]:
    bulk = parts.state.bulk
    data = bytes(SECTOR_BYTES) if bulk.error else parts.cpu.load(bulk.buffers, SECTOR_BYTES)
    if bulk.error:
        parts.console.say(f"pefbox: disk: {bulk.error}")
    parts.pages.free(bulk.buffers, 1)
    bulk.active = False
    use(data)
    return
    yield


def read_partitions(parts: Parts, then: Callable[[], None]) -> Step[None] | None:
    """Read the partition table into the state, then call `then`."""

    def use(sector: bytes) -> None:
        state = parts.state.partitions
        try:
            found = boot_partition.parse_mbr(sector)
        except ImageRefused:
            found = []
        for partition in found:
            if partition.first_sector + partition.n_sectors > parts.state.blk.sectors:
                continue
            if partition.type == PartitionType.BOOT:
                state.boot = (partition.first_sector, partition.n_sectors)
            elif partition.type == PartitionType.SCRATCH:
                state.scratch = (partition.first_sector, partition.n_sectors)
        state.read = True
        then()

    return read_sector(parts, 0, use)


def _nothing() -> Step[None]:
    return
    yield
