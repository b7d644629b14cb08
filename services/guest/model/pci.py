"""PCI over RTAS: configuration space, probing one bus, BARs, MSI-X.

Source: LoPAR 7.3.4 (config access), 7.3.10.5 (ibm,change-msi, ibm,query-interrupt-source-number); Linux rtas_pci.c.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.codes import RtasStatus
from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.state import Machine
from shared.pci import (
    ABSENT_VENDOR,
    BAR_IO,
    BAR_TYPE_64,
    CONFIG_BYTES,
    MSI_ENABLE,
    MSIX_ENABLE,
    N_BARS,
    STATUS_CAPABILITIES,
    Capability,
    Command,
    Config,
    MsiField,
    Msix,
    devfn_of,
)
from shared.virtio_pci import MODERN_DEVICE_BASE, VENDOR_ID

MAX_CAPABILITIES = 48
N_SLOTS = 32
MSI_FUNCTION, MSIX_FUNCTION = 3, 4
"""Function numbers of ibm,change-msi that ask for messages of the two kinds."""
DEFAULT_PRIORITY = 5
_ALL_ONES = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Function:
    """A function found on the bus."""

    config_addr: int
    vendor: int
    device: int

    @property
    def is_virtio(self) -> bool:
        """Whether it is a modern virtio device, of whatever kind."""
        return self.vendor == VENDOR_ID and self.device >= MODERN_DEVICE_BASE


class BarSpace:
    """Addresses for BARs out of the bridge's memory windows, lowest window first; what is taken is in `machine`."""

    def __init__(self, machine: Machine) -> None:
        self._windows = sorted((pci, pci + n_bytes) for pci, _, n_bytes in machine.mmio)
        self._machine = machine
        if not machine.next_bar:
            machine.next_bar = [max(start, 1 << 16) for start, _ in self._windows]

    def take(self, n_bytes: int) -> int:
        """A naturally aligned PCI address; raises NoDevice when no window has room."""
        next_bar = self._machine.next_bar
        for index, (_, end) in enumerate(self._windows):
            address = (next_bar[index] + n_bytes - 1) // n_bytes * n_bytes
            if address + n_bytes <= end:
                next_bar[index] = address + n_bytes
                return address
        raise NoDevice(f"no address for a BAR of {n_bytes} bytes")


class Bus:
    """The devices behind the host bridge that `machine` names."""

    def __init__(self, cpu: Cpu, machine: Machine) -> None:
        self._cpu = cpu
        self._machine = machine

    def read(self, config_addr: int, offset: int, size: int) -> Step[int]:
        """A configuration register; all ones where no function answers."""
        buid = self._machine.buid
        args = (config_addr | offset, buid >> 32, buid & _ALL_ONES, size)
        status, value = yield from self._cpu.rtas("ibm,read-pci-config", args, 2)
        return value if status == RtasStatus.SUCCESS else _ALL_ONES >> 32 - 8 * size

    def write(self, config_addr: int, offset: int, size: int, value: int) -> Step[None]:
        """Write a configuration register; raises NoDevice."""
        buid = self._machine.buid
        args = (config_addr | offset, buid >> 32, buid & _ALL_ONES, size, value)
        (status,) = yield from self._cpu.rtas("ibm,write-pci-config", args, 1)
        if status != RtasStatus.SUCCESS:
            raise NoDevice(f"PCI function {config_addr:#x} refuses a write")

    @property
    def functions(self) -> list[Function]:
        """What the last probe found."""
        return [Function(*function) for function in self._machine.functions]

    def probe(self) -> Step[None]:
        """Look for function 0 of each slot of bus 0."""
        found = []
        for slot in range(N_SLOTS):
            config_addr = devfn_of(slot) << 8
            ids = yield from self.read(config_addr, Config.VENDOR_ID, 4)
            if ids & 0xFFFF != ABSENT_VENDOR:
                found.append((config_addr, ids & 0xFFFF, ids >> 16))
        self._machine.functions = found

    def capabilities(self, config_addr: int) -> Step[list[tuple[int, int]]]:
        """The (id, offset) of each capability; a list that does not end is cut."""
        status = yield from self.read(config_addr, Config.STATUS, 2)
        if not status & STATUS_CAPABILITIES:
            return []
        found: list[tuple[int, int]] = []
        at = (yield from self.read(config_addr, Config.CAPABILITIES, 1)) & ~3
        while at and at < CONFIG_BYTES and len(found) < MAX_CAPABILITIES:
            word = yield from self.read(config_addr, at, 2)
            found.append((word & 0xFF, at))
            at = word >> 8 & ~3
        return found

    # -- BARs ---------------------------------------------------------------------------------------------------

    def memory_bars(self, config_addr: int) -> Step[dict[int, int]]:
        """The gpa of each memory BAR that has an address."""
        bars: dict[int, int] = {}
        for number, _, address in (yield from self._memory_bars(config_addr)):
            gpa = self._gpa_of(address)
            if address and gpa is not None:
                bars[number] = gpa
        return bars

    def assign_bars(self, config_addr: int) -> Step[None]:
        """Give an address to each memory BAR that has none, as firmware does."""
        space = BarSpace(self._machine)
        for number, wide, address in (yield from self._memory_bars(config_addr)):
            if not address:
                yield from self._assign(config_addr, number, wide, space)

    def _memory_bars(self, config_addr: int) -> Step[list[tuple[int, bool, int]]]:
        """Number, whether it has 64 bits, and address of each memory BAR."""
        bars = []
        number = 0
        while number < N_BARS:
            low = yield from self.read(config_addr, Config.BAR0 + 4 * number, 4)
            wide = bool(low & BAR_TYPE_64) and not low & BAR_IO
            if not low & BAR_IO:
                high = (yield from self.read(config_addr, Config.BAR0 + 4 * number + 4, 4)) if wide else 0
                bars.append((number, wide, high << 32 | low & ~0xF))
            number += 2 if wide else 1
        return bars

    def _assign(self, config_addr: int, number: int, wide: bool, space: BarSpace) -> Step[None]:
        offset = Config.BAR0 + 4 * number
        yield from self.write(config_addr, offset, 4, _ALL_ONES)
        mask = (yield from self.read(config_addr, offset, 4)) & ~0xF
        if not mask:
            yield from self.write(config_addr, offset, 4, 0)
            return
        address = space.take((~mask & _ALL_ONES) + 1)
        yield from self.write(config_addr, offset, 4, address & _ALL_ONES)
        if wide:
            yield from self.write(config_addr, offset + 4, 4, address >> 32)

    def _gpa_of(self, address: int) -> int | None:
        for pci, gpa, n_bytes in self._machine.mmio:
            if pci <= address < pci + n_bytes:
                return gpa + address - pci
        return None

    def enable(self, config_addr: int) -> Step[None]:
        """Let the function answer memory accesses and master the bus."""
        yield from self.write(config_addr, Config.COMMAND, 2, Command.MEMORY | Command.MASTER)

    def take_mastery(self, config_addr: int) -> Step[None]:
        """Let the function answer memory accesses and reach no memory itself."""
        yield from self.write(config_addr, Config.COMMAND, 2, Command.MEMORY)

    # -- interrupts ---------------------------------------------------------------------------------------------

    def enable_msix(self, config_addr: int, msix_cap: int) -> Step[int]:
        """One MSI-X vector: its interrupt source, unmasked; raises NoDevice."""
        source = yield from self._message(config_addr, MSIX_FUNCTION)
        control = yield from self.read(config_addr, msix_cap + Msix.CONTROL, 2)
        yield from self.write(config_addr, msix_cap + Msix.CONTROL, 2, control | MSIX_ENABLE)
        return source

    def enable_msi(self, config_addr: int, msi_cap: int) -> Step[int]:
        """The first message of a function with MSI: its interrupt source, unmasked; raises NoDevice."""
        source = yield from self._message(config_addr, MSI_FUNCTION)
        control = yield from self.read(config_addr, msi_cap + MsiField.CONTROL, 2)
        yield from self.write(config_addr, msi_cap + MsiField.CONTROL, 2, control | MSI_ENABLE)
        return source

    def _message(self, config_addr: int, kind: int) -> Step[int]:
        buid = self._machine.buid
        where = (config_addr, buid >> 32, buid & _ALL_ONES)
        rets = yield from self._cpu.rtas("ibm,change-msi", (*where, kind, 1, 0), 4)
        if rets[0] != RtasStatus.SUCCESS or rets[1] < 1:
            raise NoDevice(f"PCI function {config_addr:#x} gets no message interrupt")
        source = yield from self._cpu.rtas("ibm,query-interrupt-source-number", (*where, 0), 3)
        if source[0] != RtasStatus.SUCCESS:
            raise NoDevice(f"PCI function {config_addr:#x} has no interrupt source")
        yield from unmask(self._cpu, source[1])
        return source[1]

    def capability(self, config_addr: int, wanted: Capability) -> Step[int]:
        """Where a capability is; raises NoDevice."""
        for kind, at in (yield from self.capabilities(config_addr)):
            if kind == wanted:
                return at
        raise NoDevice(f"PCI function {config_addr:#x} has no {wanted.name} capability")


def unmask(cpu: Cpu, source: int) -> Step[None]:
    """Route an interrupt source to this processor and turn it on."""
    yield from cpu.rtas("ibm,set-xive", (source, 0, DEFAULT_PRIORITY), 1)
    yield from cpu.rtas("ibm,int-on", (source,), 1)
