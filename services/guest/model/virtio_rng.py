"""The virtio entropy driver: one request at a time. Source: VIRTIO 1.4, section 5.4."""

from __future__ import annotations

from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.designs import Rules
from services.guest.model.dma import Dma
from services.guest.model.pci import Bus
from services.guest.model.state import Rng
from services.guest.model.swiotlb import Direction
from services.guest.model.virtio_driver import COMMON_FEATURES, VirtioExtraDriver
from services.guest.model.virtqueue import QueueBroken, Virtqueue
from shared.virtio import DeviceId

QUEUE_SIZE = 4
MAX_BYTES = 4096
_TABLE_AT = 0x800
"""Where the indirect table is in the ring's page."""


class RngDriver(VirtioExtraDriver):
    """Fills a buffer with random bytes over `state`."""

    device = DeviceId.RNG

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, rules: Rules, state: Rng) -> None:
        super().__init__(cpu, bus, dma, rules, state)
        self.state: Rng = state
        self._queue = Virtqueue(cpu, state.queue)

    def bring_up(self) -> Step[None]:
        """As ExtraDriver."""
        state = self.state
        # What a device that was given up still had stays taken, and is nobody's any more.
        state.mapping = None
        yield from self.negotiate(COMMON_FEATURES)
        yield from self.open_page(state.ring)
        yield from self.set_up_queue(self._queue, 0, QUEUE_SIZE, state.ring.gpa, state.ring.addr)
        yield from self.enable_interrupt()
        yield from self.transport.enable_queue(state.queue, vector=0)
        yield from self.transport.start()

    def release(self) -> Step[None]:
        """Let somebody else drive the device, with no way left to this driver's memory; `start` takes it back."""
        if self.state.mapping is not None:
            raise NoDevice("the device is busy")
        yield from self.quiesce()

    def ask(self, gpa: int, n_bytes: int) -> Step[None]:
        """Have the device fill `n_bytes` at `gpa`; raises NoDevice when it cannot be asked now."""
        state = self.state
        if not state.ready or state.mapping is not None:
            raise NoDevice(state.error or "the device is busy")
        state.mapping = yield from self._dma.map(state.pci.path, gpa, n_bytes, Direction.FROM_DEVICE)
        if state.mapping is None:
            raise NoDevice("no room in the DMA pool")
        state.n_written = -1
        table = (state.ring.gpa + _TABLE_AT, state.ring.addr + _TABLE_AT)
        self._queue.add([(state.mapping.addr, n_bytes, True)], *table)
        state.submitted_ns = self._cpu.clock.now_ns()
        if self._queue.must_kick():
            yield from self.transport.kick(state.queue)

    def interrupted(self) -> Step[None]:
        """Take what the device has filled."""
        state = self.state
        if not state.ready or state.mapping is None:
            return
        try:
            used = self._queue.take_used()
        except QueueBroken as broken:
            self.give_up(broken.error.value)
            return
        if used is not None:
            mapping, state.mapping = state.mapping, None
            yield from self._dma.unmap(mapping, used[1])
            state.n_written, state.submitted_ns = used[1], 0
            self._queue.ask_for_interrupt()
