"""The sPAPR PCI host bridge: windows into the PCI bus, interrupt sources, DMA windows.

Where things lie, for bridge `index` (the guest reads all of it from the device tree):

| what        | guest physical                      | on the bus         | size    |
|-------------|-------------------------------------|--------------------|---------|
| IO          | 32 TiB + index * 64 KiB             | 0                  | 64 KiB  |
| 32-bit MMIO | 32 TiB + (index + 1) * 2 GiB        | 2 GiB              | 2 GiB   |
| 64-bit MMIO | 32 TiB + (index + 1) * 1 TiB        | the same address   | 1 TiB   |

A message signalled interrupt is a write to the MSI window whose data is the source number.

Source: QEMU `include/hw/pci-host/spapr.h`, `hw/ppc/spapr.c` (placement), `include/hw/ppc/spapr_irq.h` (sources).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.qemu.dma_domain import DmaDomain
from services.qemu.pci_bus import Bar, PciBus, PciFunction, Region
from shared.interrupt_sources import MSI_BASE, PCI_LSI_BASE, SOURCES_END
from shared.pci import Command, Config, OfSpace, slot_and_function
from shared.tce import BUS_DOMAIN

BUID_BASE = 0x800000020000000
PCI_BASE = 1 << 45
IO_WINDOW_BYTES = 0x10000
MEM32_BUS = 0x80000000
MEM32_BYTES = 0x80000000
MEM64_BYTES = 1 << 40
MSI_WINDOW = 0x40000000000
N_PINS = 4


class IrqPort(Protocol):
    """The interrupt controller, which lives in kvm."""

    def msi(self, source: int) -> None:
        """An edge of `source`."""

    def lsi(self, source: int, level: bool) -> None:
        """The new level of `source`."""

    async def define(self, source: int, *, level_triggered: bool) -> None:
        """`source` exists from now on."""


TellDoorbell = Callable[[int, bool], None]
"""The guest physical address of a doorbell, and whether it is one from now on."""


@dataclass(frozen=True, slots=True)
class Window:
    """A range of guest physical addresses that reaches the bus at `bus`."""

    space: OfSpace
    gpa: int
    bus: int
    size_bytes: int


class PciHostBridge:
    """One bridge with bus 0. Its devices translate through `bus_domain`, but those in a slot that has its own.


    `ddw` says whether it makes dynamic DMA windows.
    """

    def __init__(self, irq: IrqPort, index: int = 0, *, ddw: bool = True) -> None:
        self.index = index
        self.ddw = ddw
        self.buid = BUID_BASE + index
        self.io = Window(OfSpace.IO, PCI_BASE + index * IO_WINDOW_BYTES, 0, IO_WINDOW_BYTES)
        self.mem32 = Window(OfSpace.MEM32, PCI_BASE + (index + 1) * MEM32_BYTES, MEM32_BUS, MEM32_BYTES)
        mem64_gpa = PCI_BASE + (index + 1) * MEM64_BYTES
        self.mem64 = Window(OfSpace.MEM64, mem64_gpa, mem64_gpa, MEM64_BYTES)
        self.windows = (self.mem64, self.mem32, self.io)
        self.bus_domain = DmaDomain(index, BUS_DOMAIN)
        self._own_domains: dict[int, DmaDomain] = {}
        self.bus = PciBus(self._set_intx, self._send_message, self._set_doorbells)
        self.msis = MsiSources()
        self._irq = irq
        self._asserted: list[set[int]] = [set() for _ in range(N_PINS)]
        self._doorbells: dict[int, frozenset[int]] = {}
        self.tell_doorbell: TellDoorbell | None = None

    @property
    def domains(self) -> list[DmaDomain]:
        """All of them, that of the bus first."""
        return [self.bus_domain, *self._own_domains.values()]

    def domain_of(self, devfn: int) -> DmaDomain:
        """What the functions of this slot translate through."""
        return self._own_domains.get(slot_and_function(devfn)[0], self.bus_domain)

    def give_own_domain(self, devfn: int) -> DmaDomain:
        """From now on the functions of this slot share no window with the others on the bus."""
        slot = slot_and_function(devfn)[0]
        return self._own_domains.setdefault(slot, DmaDomain(self.index, slot))

    def domain_with(self, liobn: int) -> DmaDomain | None:
        """The domain that may have a window of this liobn."""
        return next((domain for domain in self.domains if liobn in domain.liobns), None)

    def mmio_load(self, gpa: int, size_bytes: int) -> int | None:
        """The little-endian value at `gpa`; None where nothing answers."""
        found = self._find(gpa, size_bytes)
        return None if found is None else found[0].load(found[1], size_bytes)

    def mmio_store(self, gpa: int, size_bytes: int, value: int) -> bool:
        """Store the low `size_bytes` of `value`; False where nothing answers."""
        found = self._find(gpa, size_bytes)
        if found is None:
            return False
        found[0].store(found[1], size_bytes, value & (1 << size_bytes * 8) - 1)
        return True

    def lsi_source(self, devfn: int, pin: int) -> int:
        """The source that pin 1 to 4 of `devfn` drives: pins rotate by slot."""
        return PCI_LSI_BASE + self.index * N_PINS + _line(devfn, pin)

    def lsi_sources(self) -> range:
        """The four level sources of the bridge."""
        first = PCI_LSI_BASE + self.index * N_PINS
        return range(first, first + N_PINS)

    def assign_bars(self) -> None:
        """Give every BAR an address and turn decoding on, as firmware would."""
        next_free = {OfSpace.IO: 0x1000, OfSpace.MEM32: self.mem32.bus, OfSpace.MEM64: self.mem64.bus}
        for _, function in sorted(self.bus.functions.items()):
            for bar in function.bars:
                size = bar.region.size_bytes
                address = (next_free[bar.space] + size - 1) & -size
                function.assign_bar(bar, address)
                next_free[bar.space] = address + size
            function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.IO)

    def gpa_of_bar(self, function: PciFunction, bar: Bar) -> int | None:
        """Where the processor reaches a BAR; None while it is unassigned."""
        address = function.bar_address(bar)
        for window in self.windows:
            same_kind = (window.space is OfSpace.IO) == (bar.space is OfSpace.IO)
            if address and same_kind and 0 <= address - window.bus < window.size_bytes:
                return window.gpa + address - window.bus
        return None

    def _find(self, gpa: int, size_bytes: int) -> tuple[Region, int] | None:
        if gpa % size_bytes:
            return None
        for window in self.windows:
            offset = gpa - window.gpa
            if 0 <= offset < window.size_bytes:
                return self.bus.find(window.bus + offset, size_bytes, io=window.space is OfSpace.IO)
        return None

    def _set_intx(self, devfn: int, pin: int, level: bool) -> None:
        line = _line(devfn, pin)
        asserted = self._asserted[line]
        before = bool(asserted)
        (asserted.add if level else asserted.discard)(devfn)
        if bool(asserted) != before:
            self._irq.lsi(self.lsi_source(devfn, pin), bool(asserted))

    def _set_doorbells(self, function: PciFunction, bar: Bar, offsets: frozenset[int]) -> None:
        if self.tell_doorbell is None:
            return
        base = self.gpa_of_bar(function, bar) if function.command(Command.MEMORY) else None
        wanted = frozenset() if base is None else frozenset(base + offset for offset in offsets)
        before, self._doorbells[function.devfn] = self._doorbells.get(function.devfn, frozenset()), wanted
        for gpa in sorted(before ^ wanted):
            self.tell_doorbell(gpa, gpa in wanted)

    def _send_message(self, address: int, data: int) -> None:
        # A message elsewhere would be a write to memory that no driver asked for: it goes nowhere.
        if address == MSI_WINDOW and self.msis.owned(data):
            self._irq.msi(data)


class MsiSources:
    """Which function owns which block of message sources."""

    def __init__(self, first: int = MSI_BASE, end: int = SOURCES_END) -> None:
        self._first, self._end = first, end
        self.blocks: dict[int, range] = {}
        """devfn -> its sources."""

    def allocate(self, devfn: int, n: int) -> range | None:
        """`n` consecutive sources for `devfn` in place of what it had; None when so many are not free."""
        self.blocks.pop(devfn, None)
        start = self._first
        for block in sorted(self.blocks.values(), key=lambda taken: taken.start):
            if block.start - start >= n:
                break
            start = block.stop
        if start + n > self._end:
            return None
        self.blocks[devfn] = range(start, start + n)
        return self.blocks[devfn]

    def release(self, devfn: int) -> None:
        """Free the sources of `devfn`."""
        self.blocks.pop(devfn, None)

    def owned(self, source: int) -> bool:
        """Whether `source` belongs to a function."""
        return any(source in block for block in self.blocks.values())


def _line(devfn: int, pin: int) -> int:
    return (slot_and_function(devfn)[0] + pin - 1) % N_PINS
