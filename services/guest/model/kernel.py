"""The kernel: what it does next, as steps between safe points.

`next_step` gives a generator (one step), an Idle exit when everything waits, or a Crash. Nothing of a step outlives
it: a step reads the state, makes its calls, and leaves a state from which the next one follows. Order of work:
interrupts, finished and overdue disk requests, the terminal, then the phase. Before it idles the kernel looks at the
disk's ring for a while, and only then asks the device for an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.codes import UCode
from protocol.declare import Space
from protocol.errors import ImageRefused
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.ucalls import UV_SHARE_PAGE
from services.guest.address_space import AddressSpace
from services.guest.exits import Crash, Idle
from services.guest.model import image, xics
from services.guest.model.boot import BootStage, read_partitions
from services.guest.model.commands import Commands
from services.guest.model.cpu import STEP_COST, Clock, Panic, Step
from services.guest.model.demo import Demo
from services.guest.model.machine import load_tree, read_machine
from services.guest.model.parts import Parts
from services.guest.model.state import KernelState, Phase, Workload
from services.guest.model.swiotlb import DEFAULT_SLOTS
from services.guest.model.virtio_blk import Look
from services.guest.model.virtqueue import QueueError
from shared.dma_designs import DmaDesign

RESET_VECTOR = 0x100
LOOKS_A_STEP = 16
SHARE_PAGES_A_CALL = 32
"""Bounds how long one UV_SHARE_PAGE of the pool stays open."""


class Kernel:
    """Runs over `state`; `Kernel(memory, clock, loaded_state)` continues where the state was saved."""

    def __init__(self, memory: AddressSpace, clock: Clock, state: KernelState, *, old_firmware: bool = False) -> None:
        self.state = state
        self._old_firmware = old_firmware
        self._clock = clock
        self._memory = memory
        self._build()

    def _build(self) -> None:
        state = self.state
        self._parts = Parts(self._memory, self._clock, state)
        self._boot = BootStage(self._parts, self._enter_as_normal_vm)
        self._demo = Demo(self._parts, self._parts.console.prompt)
        self._commands = Commands(self._parts, self._demo)
        self._phases: dict[Phase, Callable[[], Step[None] | None]] = {
            Phase.KERNEL_IMAGE: self._image,
            Phase.KERNEL_POOL: self._pool,
            Phase.KERNEL_SHARE: self._share,
            Phase.KERNEL_WINDOW: self._window,
            Phase.KERNEL_BUS: self._bus,
            Phase.KERNEL_DMA: self._dma,
            Phase.KERNEL_DISK: self._disk,
            Phase.KERNEL_DEVICES: self._devices,
            Phase.KERNEL_TABLE: self._table,
            Phase.RUN: self._run,
            Phase.HALTED: lambda: None,
        }

    def start(self, pc: int, gprs: dict[int, int], *, secure: bool) -> None:
        """The state of a processor that begins at `pc`: the boot stage at 0x100, the kernel anywhere else."""
        state = KernelState(secure=secure, old_firmware=self._old_firmware)
        state.machine.fdt = gprs.get(3, 0)
        state.phase = Phase.BOOT_TREE if pc == RESET_VECTOR else Phase.KERNEL_IMAGE
        state.kbase = 0 if pc == RESET_VECTOR else gprs.get(4, pc)
        self.state = state
        self._build()

    # -- what is next -----------------------------------------------------------------------------------------------

    def next_step(self) -> Step[None] | Idle | Crash:
        """See the module."""
        state = self.state
        if state.crash:
            return Crash(state.crash)
        now_ns = self._clock.now_ns()
        if now_ns < state.wake_ns:
            return Idle(state.wake_ns, device_open=self._device_open)
        if state.phase is Phase.OFF:
            return Idle(None)
        step = (
            self._urgent(now_ns)
            or self._extra_step()
            or self._parts.console.work(now_ns)
            or self._phase_step()
            or self._poll(now_ns)
        )
        if step is None:
            return Idle(self._deadline_ns(), device_open=self._device_open)
        if not self._parts.hasher.rebuilding:
            self._clock.charge(STEP_COST)
        return step

    @property
    def _device_open(self) -> bool:
        """Whether a device owes an answer."""
        return bool(self.state.blk.requests) or any(driver.state.submitted_ns for driver in self._parts.extras)

    def _urgent(self, now_ns: int) -> Step[None] | None:
        state = self.state
        if state.line and state.interrupts_on:
            return self._interrupt()
        if self._parts.blk.has_finished():
            return self._parts.guarded(self._parts.collect())
        deadline_ns = self._parts.blk.deadline_ns()
        if deadline_ns is not None and now_ns >= deadline_ns:
            return self._overdue()
        for driver in self._parts.extras:
            deadline_ns = driver.deadline_ns()
            if deadline_ns is not None and now_ns >= deadline_ns:
                return driver.guarded(driver.overdue())
        return None

    def _extra_step(self) -> Step[None] | None:
        """The devices beside the disk have every other step at most: one that is never quiet holds up nothing else."""
        state = self.state
        if state.extra_served:
            state.extra_served = False
            return None
        for driver in self._parts.extras:
            step = driver.attend() if driver.state.calls else driver.work()
            if step is not None:
                state.extra_served = True
                return driver.guarded(step)
        return None

    def _poll(self, now_ns: int) -> Step[None] | None:
        """Nothing else is to do: look at the disk's ring, until an interrupt is asked for and the kernel may idle."""
        look = self._parts.blk.look(now_ns)
        if look is Look.SLEEP:
            return self._rest()
        return self._parts.guarded(self._parts.collect()) if look is Look.TAKE else self._look_again()

    def _rest(self) -> Step[None] | None:
        for driver in self._parts.extras:
            step = driver.attend() if driver.state.calls else driver.rest()
            if step is not None:
                return driver.guarded(step)
        return None

    def _look_again(self) -> Step[None]:
        """A step that only takes time."""
        for _ in range(LOOKS_A_STEP):
            if self._parts.blk.has_finished():
                return
        return
        yield

    def _phase_step(self) -> Step[None] | None:
        phase = self._phases.get(self.state.phase)
        step = phase() if phase else self._boot.work()
        return self._parts.guarded(step) if step is not None else None

    def _deadline_ns(self) -> int | None:
        parts = self._parts
        times = [parts.console.deadline_ns(), parts.blk.deadline_ns(), parts.net_run.deadline_ns()]
        times += [driver.deadline_ns() for driver in parts.extras]
        return min((time for time in times if time is not None), default=None)

    def _interrupt(self) -> Step[None]:
        # The presentation controller drops the line when the interrupt is accepted; a new level comes as an event.
        self.state.line = False
        xirr = yield from xics.accept(self._parts.cpu)
        source = xirr & xics.SOURCE_MASK
        if not source:
            return
        # Sources are edges: ended first, so that others come although the work of this one may be busy.
        yield from xics.end(self._parts.cpu, xirr)
        extra = next((driver for driver in self._parts.extras if driver.irq == source), None)
        if source == self.state.blk.pci.irq:
            yield from self._parts.guarded(self._parts.collect())
        elif extra is not None:
            extra.state.calls = True
            yield from extra.guarded(extra.attend())
        elif source == self.state.machine.console_irq:
            self.state.console.check = True

    def _overdue(self) -> Step[None]:
        """The oldest request is over its limit: an interrupt may have been lost, so look before giving up."""
        yield from self._parts.guarded(self._parts.collect())
        deadline_ns = self._parts.blk.deadline_ns()
        if deadline_ns is not None and self._clock.now_ns() >= deadline_ns:
            yield from self._parts.end_queue(QueueError.NO_ANSWER)

    # -- coming up ----------------------------------------------------------------------------------------------------

    def _enter_as_normal_vm(self) -> None:
        """From the boot stage into the kernel without UV_ESM: what the boot stage held is given up."""
        old = self.state
        state = KernelState(phase=Phase.KERNEL_IMAGE, kbase=old.kbase, calls=old.calls, console=old.console)
        state.machine.fdt = old.machine.fdt
        for name in KernelState.__struct_fields__:
            setattr(old, name, getattr(state, name))
        self._build()

    def _image(self) -> Step[None]:
        state, cpu = self.state, self._parts.cpu
        try:
            header = image.parse_header(cpu.load(state.kbase, image.HEADER_BYTES))
        except ImageRefused as error:
            raise Panic(f"kernel image: {error.reason}") from None
        self._check_sources(header)
        tree, state.machine.fdt_bytes = load_tree(cpu, state.machine.fdt)
        state.machine.kernel = state.kbase
        state.machine.kernel_bytes = image.HEADER_BYTES + header.payload_bytes
        kernel = (state.machine.kernel, state.machine.kernel_bytes)
        read_machine(tree, state.machine, self._memory.size_bytes)
        state.machine.kernel, state.machine.kernel_bytes = kernel
        state.machine.reserved.append(kernel)
        if not state.machine.rtas_base:
            raise Panic("the device tree has no RTAS area")
        options = header.settings.options
        state.workload, state.options = header.settings.workload, options
        state.dma_design = DmaDesign(str(options.get("dma", DmaDesign.QUIRK)))
        self._build()
        self._parts.set_up_memory()
        self._parts.console.say(f"pefbox: kernel {state.workload} secure={int(state.secure)}")
        yield from self._parts.open_interrupts()
        has_pool = state.secure and self._parts.rules.has_pool
        state.phase = Phase.KERNEL_POOL if has_pool else Phase.KERNEL_WINDOW

    def _check_sources(self, header: image.ImageHeader) -> None:
        """What was measured must be what runs: header and payload against this kernel's own sources."""
        payload = self._parts.cpu.load(self.state.kbase + image.HEADER_BYTES, header.payload_bytes)
        if header.sources_sha512 != image.sources_digest() or payload != image.sources():
            raise Panic("kernel image: not of this version of the model kernel")

    def _pool(self) -> Step[None]:
        options = self.state.options
        n_slots, n_areas = options.get("swiotlb_slots", DEFAULT_SLOTS), options.get("swiotlb_areas", 1)
        at_top = self._parts.rules.pool_at_top
        self._parts.pool.set_up(self._parts.pages, int(n_slots), int(n_areas), at_top=at_top)
        self.state.phase = Phase.KERNEL_SHARE
        return
        yield

    def _share(self) -> Step[None]:
        pool = self.state.pool
        n_pages = min(SHARE_PAGES_A_CALL, self._parts.pool.n_pages - pool.shared_pages)
        if n_pages:
            gfn = (pool.base >> PAGE_SHIFT) + pool.shared_pages
            code, *_ = yield from self._parts.cpu.ucall(UV_SHARE_PAGE, gfn, n_pages)
            if code != UCode.U_SUCCESS:
                raise Panic(f"UV_SHARE_PAGE of the swiotlb pool gave {Space.UCALL.code(code)}")
            pool.shared_pages += n_pages
            return
        mib = pool.shared_pages * PAGE_BYTES >> 20
        self._parts.console.say(f"pefbox: swiotlb {pool.n_slots} slots, {mib} MiB shared")
        self.state.phase = Phase.KERNEL_WINDOW

    def _window(self) -> Step[None]:
        if self.state.window.n_io_pages:
            yield from self._parts.window.clear_all()
        self.state.phase = Phase.KERNEL_BUS

    def _bus(self) -> Step[None]:
        parts, machine = self._parts, self.state.machine
        if not machine.functions:
            yield from parts.probe_bus()
        if machine.functions:
            yield from parts.find_disk()
        self.state.phase = Phase.KERNEL_DMA

    def _dma(self) -> Step[None]:
        """The dynamic DMA window, where the design has one and devices can address it."""
        state, parts = self.state, self._parts
        at_zero, function, step = parts.rules.wants_identity, parts.window_function, None
        if at_zero is not None and function is not None and (at_zero or parts.rules.reaches_window):
            step = parts.wide.work(function, at_zero=at_zero)
        if step is None:
            state.phase = Phase.KERNEL_DISK
            return
        yield from step

    def _disk(self) -> Step[None]:
        yield from self._parts.start_disk()
        self.state.phase = Phase.KERNEL_DEVICES

    def _devices(self) -> Step[None]:
        """One step for a device beside the disk after the other."""
        extras, state = self._parts.extras, self.state
        if state.n_started < len(extras):
            if (yield from self._parts.start_extra(extras[state.n_started])):
                state.n_started += 1
        elif state.blk.ready:
            state.phase = Phase.KERNEL_TABLE
        else:
            self._up()

    def _table(self) -> Step[None] | None:
        return read_partitions(self._parts, self._up)

    def _up(self) -> None:
        state = self.state
        was_up, state.up, state.phase = state.up, True, Phase.RUN
        if state.workload is Workload.PROMPT and not was_up:
            self._parts.console.say("pefbox: ready")
            self._parts.console.prompt()

    # -- running ------------------------------------------------------------------------------------------------------

    def _run(self) -> Step[None] | None:
        parts = self._parts
        return (
            parts.hasher.work()
            or parts.reader.work()
            or parts.writer.work()
            or parts.io_run.work()
            or parts.ballooning.work()
            or parts.net_run.work()
            or self._workload()
            or self._commands.work()
        )

    def _workload(self) -> Step[None] | None:
        if self.state.workload is Workload.DEMO:
            return self._demo.work()
        if self.state.workload is Workload.DISK:
            return self._disk_workload()
        return None

    def _disk_workload(self) -> Step[None] | None:
        state, load = self.state, self._parts.load
        first, n_sectors = state.partitions.scratch
        if not state.disk_load.started and not state.disk_load.error:
            self._start_disk_workload(n_sectors)
        if state.disk_load.error and not state.disk_load.finished:
            state.disk_load.finished = True
            self._parts.console.say(f"pefbox: disk workload: {state.disk_load.error}")
        was_over = state.disk_load.finished
        step = load.work(first, int(state.options.get("disk_ops", 0)))
        if state.disk_load.finished and not was_over:
            self._parts.console.say(f"pefbox: disk workload done: {load.describe()}")
        return step

    def _start_disk_workload(self, n_sectors: int) -> None:
        seed = int(self.state.options.get("seed", 1))
        if not self.state.blk.ready or not self._parts.load.start(n_sectors, seed):
            self.state.disk_load.error = self.state.blk.error or "the disk has no scratch partition"
