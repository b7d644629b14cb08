"""What every virtio driver of the kernel does the same: finding its function, negotiation, memory, queues."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.geometry import PAGE_BYTES
from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.designs import Rules
from services.guest.model.dma import Dma
from services.guest.model.extra_driver import ExtraDriver
from services.guest.model.pci import Bus, Function
from services.guest.model.state import DmaPage, DmaPath, VirtioExtra, VirtioPci
from services.guest.model.virtio_pci import Transport
from services.guest.model.virtqueue import Virtqueue
from shared.virtio import DeviceId, Feature, feature_mask, has_feature
from shared.virtio_pci import MODERN_DEVICE_BASE, VENDOR_ID

COMMON_FEATURES = feature_mask((Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX))
"""What every driver takes where it is offered."""


class VirtioDriver:
    """The common part over the transport state `pci`."""

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, rules: Rules, pci: VirtioPci) -> None:
        self._cpu = cpu
        self._bus = bus
        self._dma = dma
        self._rules = rules
        self._pci = pci
        self.transport = Transport(cpu, bus, pci)

    @staticmethod
    def is_function(function: Function, device: DeviceId) -> bool:
        """Whether it is a modern virtio device of this kind."""
        return function.vendor == VENDOR_ID and function.device == MODERN_DEVICE_BASE + device

    def negotiate(self, wanted: int) -> Step[int]:
        """Reset, settle on what is offered of `wanted` and what the design takes, open the way to memory.

        The feature word; raises NoDevice with the reason.
        """
        yield from self._rules.prepare(self.transport)
        offered = yield from self.transport.read_features()
        if not has_feature(offered, Feature.VERSION_1):
            raise NoDevice("the device does not offer VERSION_1")
        yield from self.transport.accept_features(offered & wanted | self.choose_access(offered))
        self._pci.path = yield from self._rules.open(self._pci)
        return self._pci.features

    def choose_access(self, offered: int) -> int:
        """Which of the bits about access to memory it takes; raises NoDevice when it will not go on."""
        return self._rules.choose(offered)

    def open_page(self, page: DmaPage) -> Step[None]:
        """Let the device reach a page full of zeros; it is allocated once, and stays open until `stop`."""
        if not page.gpa:
            page.gpa = self._dma.alloc_coherent_apart() if self._rules.rings_apart else self._dma.alloc_coherent()
        if page.addr:
            # The step was busy further on.
            self._cpu.fill(page.gpa, PAGE_BYTES)
            return
        page.addr = yield from self._dma.open_coherent(self._pci.path, page.gpa)

    def stop(self, pages: Iterable[DmaPage]) -> Step[None]:
        """Reset the device, and leave it no way to `pages`; Busy until then, NoDevice when it never ends its reset."""
        yield from self.transport.reset()
        for page in pages:
            if page.addr:
                yield from self._dma.close_coherent(self._pci.path, page.addr)
                page.addr = 0

    def set_up_queue(self, queue: Virtqueue, index: int, size: int, gpa: int, addr: int) -> Step[None]:
        """Lay out queue `index` with at most `size` entries at `gpa`, which the device knows as `addr`.

        Raises NoDevice when the device has no such queue.
        """
        largest = yield from self.transport.queue_size(index)
        if largest < 2:
            raise NoDevice(f"the device has no queue {index}")
        features = self._pci.features
        queue.set_up(
            min(size, 1 << largest.bit_length() - 1),
            gpa,
            addr,
            indirect=has_feature(features, Feature.INDIRECT_DESC),
            event_idx=has_feature(features, Feature.EVENT_IDX),
        )
        queue.state.index = index

    def enable_interrupt(self) -> Step[None]:
        """One message interrupt for the device."""
        self._pci.irq = yield from self._bus.enable_msix(self._pci.config_addr, self._pci.msix_cap)


class VirtioExtraDriver(VirtioDriver, ExtraDriver):
    """A virtio device beside the disk."""

    device: DeviceId

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, rules: Rules, state: VirtioExtra) -> None:
        VirtioDriver.__init__(self, cpu, bus, dma, rules, state.pci)
        ExtraDriver.__init__(self, cpu.clock, state)
        self.state: VirtioExtra = state
        self.name = self.device.name.lower()

    @property
    def irq(self) -> int:
        """As ExtraDriver."""
        return self._pci.irq

    @property
    def path(self) -> DmaPath:
        """As ExtraDriver."""
        return self._pci.path

    @property
    def liobn(self) -> int:
        """As ExtraDriver."""
        return self._dma.liobn

    def find(self) -> Step[None]:
        """Take the first function of this kind."""
        for function in self._bus.functions:
            if self.is_function(function, self.device):
                yield from self.transport.find(function)
                self.state.present = True
                return

    def quiesce(self) -> Step[None]:
        """Reset the device so that it touches no memory any more; Busy until then, NoDevice when it never does."""
        self.state.ready = False
        try:
            yield from self.stop([self.state.ring])
        except NoDevice as error:
            self.give_up(str(error))
            raise
