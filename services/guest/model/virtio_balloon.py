"""The virtio balloon driver: one request at a time, pages of the allocator in and out.

A page of 64 KiB goes as its sixteen page numbers of 4 KiB. They are guest physical, whatever the rings' addresses are,
so nothing that translates is ever taken from the device (Linux clears ACCESS_PLATFORM in `virtballoon_validate`).

Source: VIRTIO 1.4, section 5.5.
"""

from __future__ import annotations

import struct

from protocol.geometry import PAGE_SHIFT
from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.designs import IDENTITY, PLATFORM, Rules
from services.guest.model.dma import Dma
from services.guest.model.pci import Bus
from services.guest.model.state import Balloon
from services.guest.model.virtio_driver import COMMON_FEATURES, VirtioExtraDriver
from services.guest.model.virtqueue import QueueBroken, Virtqueue
from shared.virtio import DeviceId
from shared.virtio_balloon import DEFLATE_QUEUE, INFLATE_QUEUE, PFN_BYTES, PFN_SHIFT, BalloonConfig, BalloonFeature

QUEUE_SIZE = 4
PFNS_PER_PAGE = 1 << PAGE_SHIFT - PFN_SHIFT
MAX_PAGES = 16
"""Pages of one request: 256 page numbers, as many as Linux gives at a time."""
_RINGS_AT = (0, 0x1000)
_PFNS_AT = 0x2000
_TABLE_AT = 0x3000
"""Where rings, page numbers and the indirect table are in the ring page."""


class BalloonDriver(VirtioExtraDriver):
    """Tells the device which pages it has, over `state`; which those are is for `services.guest.model.balloon`."""

    device = DeviceId.BALLOON

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, rules: Rules, state: Balloon) -> None:
        super().__init__(cpu, bus, dma, rules, state)
        self.state: Balloon = state
        self._queues = (Virtqueue(cpu, state.inflate), Virtqueue(cpu, state.deflate))

    @property
    def gives_pages(self) -> bool:
        """Whether pages are given at all; without it the device is told of no queue."""
        return self._rules.gives_pages

    def choose_access(self, offered: int) -> int:
        """As the design, but for what translates."""
        return super().choose_access(offered) & ~(PLATFORM | IDENTITY)

    def bring_up(self) -> Step[None]:
        """As ExtraDriver. The balloon is empty then, as a reset leaves it."""
        state = self.state
        yield from self.negotiate(COMMON_FEATURES | 1 << BalloonFeature.MUST_TELL_HOST)
        state.emptied, state.answered = True, False
        if self.gives_pages:
            yield from self.open_page(state.ring)
        yield from self.enable_interrupt()
        yield from self.transport.set_config_vector(0)
        if self.gives_pages:
            yield from self._enable_queues()
        yield from self.transport.start()
        yield from self._read_target()

    def _enable_queues(self) -> Step[None]:
        state = self.state
        for index, at in enumerate(_RINGS_AT):
            queue = self._queues[index]
            yield from self.set_up_queue(queue, index, QUEUE_SIZE, state.ring.gpa + at, state.ring.addr + at)
            yield from self.transport.enable_queue(queue.state, vector=0)

    def give(self, gpas: list[int]) -> Step[None]:
        """Put these pages into the balloon, at most MAX_PAGES; `state.answered` when the device has taken note."""
        yield from self._ask(INFLATE_QUEUE, gpas)

    def take_back(self, gpas: list[int]) -> Step[None]:
        """Take these pages out of it, as `give`."""
        yield from self._ask(DEFLATE_QUEUE, gpas)

    def _ask(self, index: int, gpas: list[int]) -> Step[None]:
        state, queue = self.state, self._queues[index]
        pfns = [(gpa >> PFN_SHIFT) + n for gpa in gpas for n in range(PFNS_PER_PAGE)]
        self._cpu.store(state.ring.gpa + _PFNS_AT, struct.pack(f"<{len(pfns)}I", *pfns))
        segment = (state.ring.addr + _PFNS_AT, PFN_BYTES * len(pfns), False)
        queue.add([segment], state.ring.gpa + _TABLE_AT, state.ring.addr + _TABLE_AT)
        state.asked, state.inflating, state.answered = gpas, index == INFLATE_QUEUE, False
        state.submitted_ns = self._cpu.clock.now_ns()
        if queue.must_kick():
            yield from self.transport.kick(queue.state)

    def tell_actual(self, n_pages: int) -> Step[None]:
        """So many pages are in the balloon."""
        yield from self.transport.store_device_config(BalloonConfig.ACTUAL, 4, n_pages * PFNS_PER_PAGE)

    def interrupted(self) -> Step[None]:
        """Queues and configuration share the interrupt: look at all that may have changed."""
        state = self.state
        if not state.ready:
            return
        if (yield from self.transport.needs_reset()):
            raise NoDevice("the device needs a reset")
        if state.submitted_ns:
            self._take_answer()
        yield from self._read_target()

    def _take_answer(self) -> None:
        state = self.state
        queue = self._queues[INFLATE_QUEUE if state.inflating else DEFLATE_QUEUE]
        try:
            used = queue.take_used()
        except QueueBroken as broken:
            raise NoDevice(broken.error.value) from None
        if used is not None:
            state.answered, state.submitted_ns = True, 0
            queue.ask_for_interrupt()

    def _read_target(self) -> Step[None]:
        n_pfns = yield from self.transport.device_config(BalloonConfig.NUM_PAGES, 4)
        self.state.target = n_pfns // PFNS_PER_PAGE

    def give_up(self, reason: str) -> None:
        """As ExtraDriver; the pages of a request that is open stay in the balloon, too."""
        super().give_up(reason)
        self.state.unsaid = reason
