"""What every virtio driver of the kernel does the same: finding its function, negotiation, memory, queues."""

from __future__ import annotations

from abc import abstractmethod

from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.designs import Rules
from services.guest.model.dma import Dma
from services.guest.model.pci import Bus, Function
from services.guest.model.state import ExtraDevice, VirtioPci
from services.guest.model.virtio_pci import Transport
from services.guest.model.virtqueue import ANSWER_LIMIT_NS, QueueError, Virtqueue
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
        yield from self.transport.accept_features(offered & wanted | self._rules.choose(offered))
        self._pci.path = yield from self._rules.open(self._pci)
        return self._pci.features

    def open_page(self, gpa: int) -> Step[int]:
        """Let the device reach a page of `Dma.alloc_coherent`: its device address."""
        return (yield from self._dma.open_coherent(self._pci.path, gpa))

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


class ExtraDriver(VirtioDriver):
    """A device beside the disk, driven by interrupts: the kernel finds it, starts it and calls it when one comes.

    A device that breaks its rules, or does not answer within ANSWER_LIMIT_NS, is given up by name; the kernel goes on.
    """

    device: DeviceId

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, rules: Rules, state: ExtraDevice) -> None:
        super().__init__(cpu, bus, dma, rules, state.pci)
        self.state = state

    @abstractmethod
    def bring_up(self) -> Step[None]:
        """Negotiate, lay out the queues, take an interrupt, go; raises NoDevice with the reason."""

    @abstractmethod
    def interrupted(self) -> Step[None]:
        """The device has something to say."""

    def work(self) -> Step[None] | None:
        """What is to do without an interrupt, in one step; None when there is nothing."""
        return None

    def rest(self) -> Step[None] | None:
        """The kernel is about to idle: `work`, and None once an interrupt tells of the next."""
        return self.work()

    def find(self) -> Step[None]:
        """Take the first function of this kind."""
        for function in self._bus.functions:
            if self.is_function(function, self.device):
                yield from self.transport.find(function)
                self.state.present = True
                return

    def start(self) -> Step[None]:
        """As `bring_up`, and ready after it."""
        self.state.ready, self.state.error = False, ""
        yield from self.bring_up()
        self.state.ready = True

    def quiesce(self) -> Step[None]:
        """Reset the device so that it touches no memory any more."""
        self.state.ready = False
        yield from self.transport.reset()

    def deadline_ns(self) -> int | None:
        """When the device is `overdue`, as what it was asked counts as unanswered; None while nothing is."""
        state = self.state
        return state.submitted_ns + ANSWER_LIMIT_NS if state.ready and state.submitted_ns else None

    def overdue(self) -> Step[None]:
        """The limit is over: an interrupt may have been lost, so look before giving up."""
        yield from self.interrupted()
        deadline_ns = self.deadline_ns()
        if deadline_ns is not None and self._cpu.clock.now_ns() >= deadline_ns:
            self.give_up(QueueError.NO_ANSWER.value)

    def give_up(self, reason: str) -> None:
        """No more of this device; its memory stays taken, since it may still write to it."""
        self.state.ready, self.state.error, self.state.submitted_ns = False, reason, 0
