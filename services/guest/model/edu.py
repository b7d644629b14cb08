"""The driver of QEMU's educational device: transfers between guest memory and the device's buffer.

The device says nothing of a transfer that it could not make: whoever wants to know compares.

Source: QEMU `docs/specs/edu.rst`.
"""

from __future__ import annotations

from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.dma_domains import Domain
from services.guest.model.extra_driver import ExtraDriver
from services.guest.model.pages import PageAllocator
from services.guest.model.pci import Bus
from services.guest.model.state import DmaPath, Edu
from shared.edu import BUFFER_ADDRESS, DEVICE_ID, FIRST_WIDE, IDENTIFICATION, VENDOR_ID, EduDma, EduRegister
from shared.pci import Capability

MMIO_BAR = 0
_IDENTITY = (VENDOR_ID, DEVICE_ID)


class EduDriver(ExtraDriver):
    """The edu number `number` on the bus, over `state`; its buffers are mapped in `domain`."""

    def __init__(self, cpu: Cpu, bus: Bus, pages: PageAllocator, domain: Domain, state: Edu, number: int) -> None:
        super().__init__(cpu.clock, state)
        self.state: Edu = state
        self.domain = domain
        self.name = f"edu {number}"
        self._cpu = cpu
        self._bus = bus
        self._pages = pages
        self._number = number

    @property
    def irq(self) -> int:
        """As ExtraDriver."""
        return self.state.irq

    @property
    def path(self) -> DmaPath:
        """As ExtraDriver."""
        return self.domain.path

    @property
    def liobn(self) -> int:
        """As ExtraDriver."""
        return self.domain.dma.liobn

    def find(self) -> Step[None]:
        """Take the function of this number."""
        state = self.state
        found = [function for function in self._bus.functions if (function.vendor, function.device) == _IDENTITY]
        if len(found) <= self._number:
            return
        config_addr = found[self._number].config_addr
        bars = yield from self._bus.memory_bars(config_addr)
        if MMIO_BAR not in bars:
            raise NoDevice("its registers have no address")
        yield from self._bus.enable(config_addr)
        state.config_addr, state.bar, state.present = config_addr, bars[MMIO_BAR], True

    def bring_up(self) -> Step[None]:
        """As ExtraDriver."""
        state = self.state
        if (yield from self._load(EduRegister.IDENTIFICATION)) != IDENTIFICATION:
            raise NoDevice("no edu of version 1.0")
        yield from self.domain.open(self._pages, state.config_addr)
        msi_cap = yield from self._bus.capability(state.config_addr, Capability.MSI)
        state.irq = yield from self._bus.enable_msi(state.config_addr, msi_cap)

    def quiesce(self) -> Step[None]:
        """The device has no reset; without mastery of the bus it reaches no memory."""
        try:
            yield from self._bus.take_mastery(self.state.config_addr)
        except NoDevice as error:
            self.give_up(str(error))
            raise
        self.state.ready, self.state.submitted_ns = False, 0

    def transfer(self, addr: int, n_bytes: int, *, to_ram: bool) -> Step[None]:
        """Have the device copy between `addr`, as it knows it, and its buffer; it is over when nothing is submitted."""
        state = self.state
        source, destination = (BUFFER_ADDRESS, addr) if to_ram else (addr, BUFFER_ADDRESS)
        yield from self._store(EduRegister.DMA_SOURCE, source)
        yield from self._store(EduRegister.DMA_DESTINATION, destination)
        yield from self._store(EduRegister.DMA_COUNT, n_bytes)
        state.to_ram, state.submitted_ns = to_ram, self._clock.now_ns()
        command = EduDma.RUN | EduDma.IRQ_WHEN_DONE | (EduDma.TO_RAM if to_ram else 0)
        yield from self._store(EduRegister.DMA_COMMAND, command)

    def interrupted(self) -> Step[None]:
        """Acknowledge, and look whether the transfer is over."""
        causes = yield from self._load(EduRegister.IRQ_STATUS)
        yield from self._store(EduRegister.IRQ_ACKNOWLEDGE, causes)
        # Whatever the cause: it is gone when the step was busy here and runs again.
        if not (yield from self._load(EduRegister.DMA_COMMAND)) & EduDma.RUN:
            self.state.submitted_ns = 0

    def _load(self, register: EduRegister) -> Step[int]:
        return (yield from self._cpu.mmio_load(self.state.bar + register, 4))

    def _store(self, register: EduRegister, value: int) -> Step[None]:
        wide = register >= FIRST_WIDE
        yield from self._cpu.mmio_store(self.state.bar + register, 8 if wide else 4, value)
