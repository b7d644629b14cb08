"""The kernel's parts, put together over one KernelState."""

from __future__ import annotations

from services.guest.address_space import AddressSpace
from services.guest.model import xics
from services.guest.model.balloon import Ballooning
from services.guest.model.bulk import BulkReader
from services.guest.model.console import Console
from services.guest.model.cpu import Clock, Cpu, NoDevice, Step
from services.guest.model.designs import rules_for
from services.guest.model.disk_hash import DiskHasher
from services.guest.model.disk_load import DiskWorkload
from services.guest.model.dma import Dma
from services.guest.model.dma_domains import Domain
from services.guest.model.edu import EduDriver
from services.guest.model.edu_copy import EduCopier
from services.guest.model.extra_driver import ExtraDriver
from services.guest.model.io_run import IoRunner
from services.guest.model.iommu import IoWindow
from services.guest.model.net_run import NetRunner
from services.guest.model.pages import PageAllocator
from services.guest.model.pci import Bus, unmask
from services.guest.model.region_writer import RegionWriter
from services.guest.model.state import Blk, ExtraDevice, KernelState, Owner
from services.guest.model.swiotlb import Swiotlb
from services.guest.model.virtio_balloon import BalloonDriver
from services.guest.model.virtio_blk import BlkDriver, Finished, NoRoom
from services.guest.model.virtio_driver import VirtioDriver
from services.guest.model.virtio_net import NetDriver
from services.guest.model.virtio_rng import RngDriver
from services.guest.model.virtqueue import QueueBroken, QueueError
from services.guest.model.wide_window import WideWindows
from shared.virtio import DeviceId
from shared.virtio_pci import VENDOR_ID

NO_ROOM_NS = 1_000_000_000
"""So long requests may find the DMA pool full before what made them ends in an error."""


class Parts:
    """Everything that boot stage, kernel, prompt and workloads use. Holds no state of its own but caches."""

    def __init__(self, memory: AddressSpace, clock: Clock, state: KernelState) -> None:
        self.state = state
        self.machine = state.machine
        self.cpu = Cpu(memory, clock, state.machine, state.calls)
        self.console = Console(self.cpu, state.machine, state.console)
        self.pages = PageAllocator(self.cpu, state.pages)
        self.pool = Swiotlb(self.cpu, state.pool)
        self.window = IoWindow(self.cpu, state.window)
        self.wide = WideWindows(self.cpu, state.machine, state.wide)
        self.rules = rules_for(self.cpu, state, self.wide)
        self.dma = Dma(self.cpu, self.pages, self.pool, self.window)
        self.bus = Bus(self.cpu, state.machine)
        self.blk = BlkDriver(self.cpu, self.bus, self.dma, state.blk, self.rules)
        self.rng = RngDriver(self.cpu, self.bus, self.dma, self.rules, state.rng)
        self.net = NetDriver(self.cpu, self.bus, self.dma, self.rules, self.pages, state.net)
        self.edus = [self._edu(number) for number in range(len(state.edus))]
        self.edu_copier = EduCopier(self.cpu, self.pages, self.edus, state.edu_copy)
        balloon = BalloonDriver(self.cpu, self.bus, self.dma, self.rules, state.balloon)
        self.extras: list[ExtraDriver] = [self.rng, self.net, *self.edus, balloon]
        self.ballooning = Ballooning(self.pages, self.console, balloon)
        self.reader = BulkReader(self.blk, state.bulk)
        self.hasher = DiskHasher(self.cpu, self.pages, self.reader, state.bulk, state.disk_hash)
        self.writer = RegionWriter(self.cpu, self.pages, self.blk, state.writer)
        self.io_run = IoRunner(self.cpu, self.pages, state.pool, self.blk, state.io_run)
        self.net_run = NetRunner(self.cpu, self.pages, state.pool, self.net, state.net_run)
        self.load = DiskWorkload(self.cpu, self.pages, self.blk, state.disk_load)

    def _edu(self, number: int) -> EduDriver:
        state = self.state.edus[number]
        domain = Domain(self.cpu, self.state, self.wide, self.dma, state.window)
        return EduDriver(self.cpu, self.bus, self.pages, domain, state, number)

    def open_interrupts(self) -> Step[None]:
        """Take interrupts of every priority, the terminal's among them."""
        yield from xics.open_interrupts(self.cpu)
        if self.machine.console_irq:
            yield from unmask(self.cpu, self.machine.console_irq)
        # The line may be up since before there was this kernel, and it is told of only when it changes: look once.
        self.state.interrupts_on = self.state.line = True

    # -- the disk's outcomes, handed to whoever asked --------------------------------------------------------------

    def guarded(self, step: Step[None]) -> Step[None]:
        """Run a step that uses the disk; a device that breaks its rules or is gone ends the queue by name."""
        try:
            yield from step
        except NoRoom as lack:
            blk, now_ns = self.state.blk, self.cpu.clock.now_ns()
            blk.no_room_ns = blk.no_room_ns or now_ns
            if now_ns - blk.no_room_ns < NO_ROOM_NS:
                raise
            blk.no_room_ns = 0
            lack.fail("no room in the DMA pool")
        except QueueBroken as broken:
            yield from self.end_queue(broken.error)
        except NoDevice:
            yield from self.end_queue(QueueError.NO_DEVICE)

    def collect(self) -> Step[None]:
        """Take some of what the disk has finished, and let the reader keep the device busy."""
        for finished in (yield from self.blk.collect()):
            self._deliver(finished)
        if self.state.blk.queue.broken:
            self._fail_all(self.state.blk.error)
            return
        refill = self.reader.work() or self.io_run.work()
        if refill is not None:
            yield from refill

    def end_queue(self, error: QueueError) -> Step[None]:
        """End the disk's queue and everything that waits for it."""
        if not self.state.blk.queue.broken:
            yield from self.blk.give_up(error)
        self._fail_all(self.state.blk.error)

    def _deliver(self, finished: Finished) -> None:
        if finished.owner is Owner.BULK:
            self.reader.on_finished(finished)
        elif finished.owner is Owner.WRITER:
            self.writer.on_finished(finished)
        elif finished.owner is Owner.DISK:
            self.load.on_finished(finished)
        elif finished.owner is Owner.IO_RUN:
            self.io_run.on_finished(finished)

    def _fail_all(self, error: str) -> None:
        self.reader.fail(error)
        self.writer.fail(error)
        self.load.fail(error)
        self.io_run.fail(error)

    # -- starting the disk, for boot stage and kernel ----------------------------------------------------------------

    def probe_bus(self) -> Step[None]:
        """Look for the devices behind the bridge."""
        if self.machine.has_bridge:
            yield from self.bus.probe()

    @property
    def window_function(self) -> int | None:
        """Configuration address of a virtio function, for which the bridge's DMA windows are asked."""
        found = (function for function in self.bus.functions if function.vendor == VENDOR_ID)
        return next((function.config_addr for function in found), None)

    def find_disk(self) -> Step[None]:
        """Look for the first disk; what is wrong with it is said, and the kernel goes on without."""
        disks = (function for function in self.bus.functions if VirtioDriver.is_function(function, DeviceId.BLOCK))
        disk = next(disks, None)
        if disk is None:
            return
        try:
            yield from self.blk.find(disk)
        except NoDevice as error:
            self._no_disk(str(error))

    def start_disk(self) -> Step[None]:
        """Reset, renegotiate, go."""
        if not self.state.blk.present:
            return
        try:
            yield from self.blk.start()
        except NoDevice as error:
            self._no_disk(str(error))

    def quiesce(self) -> Step[None]:
        """Stop what touches memory by itself, before another kernel takes over: devices, then DMA windows.

        One that does not stop is said: it reaches what it reached before, and the next kernel does not take it.
        """
        for driver in self.extras:
            if driver.state.present:
                yield from self._stop(driver.name, driver.state, driver.quiesce())
        yield from self.stop_disk()
        if self.window_function is not None:
            yield from self.wide.give_back(self.window_function)

    def stop_disk(self) -> Step[None]:
        """As `quiesce`, of the disk alone."""
        if self.state.blk.present:
            yield from self._stop("disk", self.state.blk, self.blk.quiesce())

    def _stop(self, name: str, state: ExtraDevice | Blk, quiesce: Step[None]) -> Step[None]:
        said = state.error
        try:
            yield from quiesce
        except NoDevice as error:
            state.ready, state.error = False, str(error)
            if state.error != said:
                self.console.say(f"pefbox: {name}: {error}")

    def start_extra(self, driver: ExtraDriver) -> Step[bool]:
        """The next step on the way to a device beside the disk; True when it runs or never will."""
        state = driver.state
        try:
            if not state.present:
                yield from driver.find()
                return not state.present
            yield from driver.start()
        except NoDevice as error:
            state.ready, state.error = False, str(error)
            self.console.say(f"pefbox: {driver.name}: {error}")
        return True

    def _no_disk(self, reason: str) -> None:
        self.state.blk.ready = False
        self.state.blk.error = reason
        self.console.say(f"pefbox: disk: {reason}")

    def set_up_memory(self) -> None:
        """The page allocator, and the DMA window's table where there is a window."""
        self.pages.set_up(self.machine.memory_bytes, self.machine.reserved)
        if self.machine.window.n_bytes:
            self.window.set_up(self.pages, self.machine.window)
