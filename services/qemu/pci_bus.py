"""A PCI function with its configuration space, and the bus that dispatches to functions.

The header is bytes with a mask of what a write changes: BAR sizing, the command register and capabilities all follow
from the mask. The bus keeps a table of decoded BARs, made again after a write that could move one.

Source: PCI Local Bus 3.0, chapter 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from shared.pci import (
    BAR_IO,
    BAR_IO_FLAGS,
    BAR_MEMORY_FLAGS,
    BAR_PREFETCHABLE,
    BAR_TYPE_64,
    CONFIG_BYTES,
    STATUS_CAPABILITIES,
    STATUS_INTERRUPT,
    Capability,
    Command,
    Config,
    OfSpace,
)

_HEADER_BYTES = 0x40
_COMMAND_MASK = Command.IO | Command.MEMORY | Command.MASTER | Command.PARITY | Command.SERR | Command.INTX_DISABLE


class Region(Protocol):
    """What lies behind a BAR; offsets are within it and the access never leaves it."""

    @property
    def size_bytes(self) -> int:
        """A power of two."""

    def load(self, offset: int, size_bytes: int) -> int:
        """The little-endian value there."""

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        """Store `value`."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: `index` 0 to 5; a MEM64 one also takes the next."""

    index: int
    space: OfSpace
    region: Region
    prefetchable: bool = False

    @property
    def register(self) -> int:
        """Its offset in configuration space."""
        return Config.BAR0 + 4 * self.index

    @property
    def n_bytes(self) -> int:
        """Length of the register: 8 for a 64-bit BAR."""
        return 8 if self.space is OfSpace.MEM64 else 4

    @property
    def flags(self) -> int:
        """Its read-only low bits."""
        if self.space is OfSpace.IO:
            return BAR_IO
        return (BAR_TYPE_64 if self.space is OfSpace.MEM64 else 0) | (BAR_PREFETCHABLE if self.prefetchable else 0)

    @property
    def flag_bits(self) -> int:
        """Which low bits are flags."""
        return BAR_IO_FLAGS if self.space is OfSpace.IO else BAR_MEMORY_FLAGS


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """The read-only identity of a function. `class_code` has 24 bits; `interrupt_pin` is 1 to 4, or 0 for none."""

    vendor: int
    device: int
    class_code: int
    revision: int
    subsystem_vendor: int
    subsystem: int
    interrupt_pin: int = 1


class MessageInterrupts(Protocol):
    """The messages that a function can send; the platform programs them (ibm,change-msi)."""

    @property
    def capability(self) -> Capability:
        """MSI or MSI-X."""

    @property
    def n_vectors(self) -> int:
        """How many there are."""

    def set_message(self, vector: int, address: int, data: int) -> None:
        """Program and unmask `vector`."""


class PciFunction:
    """One function; `devfn` is set when it is plugged."""

    def __init__(self, identity: PciIdentity) -> None:
        self.identity = identity
        self.devfn = 0
        self.bars: list[Bar] = []
        self.messages: MessageInterrupts | None = None
        self.capabilities: dict[int, int] = {}
        """Offset of each capability -> its id, in list order."""
        self.bus: PciBus | None = None
        self._config = bytearray(CONFIG_BYTES)
        self._mask = bytearray(CONFIG_BYTES)
        self._next_capability = _HEADER_BYTES
        self._last_link = int(Config.CAPABILITIES)
        self._write_header()

    # Construction.

    def add_bar(self, bar: Bar) -> None:
        """Add a BAR, unassigned."""
        size = bar.region.size_bytes
        self.bars.append(bar)
        self._set(bar.register, bar.n_bytes, bar.flags)
        address_bits = (1 << bar.n_bytes * 8) - size
        self._mask[bar.register : bar.register + bar.n_bytes] = address_bits.to_bytes(bar.n_bytes, "little")

    def add_capability(self, capability: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability; `body` follows its id and next pointer, `writable` is a mask over body. Its offset."""
        offset = self._next_capability
        self._config[offset : offset + 2 + len(body)] = bytes((capability, 0)) + body
        self._mask[offset + 2 : offset + 2 + len(writable)] = writable
        self._config[self._last_link] = offset
        self._last_link = offset + 1
        self._next_capability = (offset + 2 + len(body) + 3) & ~3
        self.capabilities[offset] = capability
        self._config[Config.STATUS] |= STATUS_CAPABILITIES
        return offset

    # Configuration space.

    def read_config(self, offset: int, size_bytes: int) -> int:
        """The little-endian value at an aligned offset within the 256 bytes."""
        return int.from_bytes(self._config[offset : offset + size_bytes], "little")

    def write_config(self, offset: int, size_bytes: int, value: int) -> None:
        """Change the writable bits at an aligned offset within the 256 bytes."""
        for at, byte in enumerate(value.to_bytes(size_bytes, "little"), offset):
            mask = self._mask[at]
            self._config[at] = self._config[at] & ~mask | byte & mask
        self.config_written(offset, size_bytes)
        if offset < _HEADER_BYTES and self.bus is not None:
            self.bus.forget_decoding()

    def config_written(self, offset: int, size_bytes: int) -> None:
        """For a subclass: a write to configuration space has taken effect."""

    def reset(self) -> None:
        """Writable bits back to 0: BARs unassigned, decoding and bus mastering off."""
        for at, mask in enumerate(self._mask):
            self._config[at] &= ~mask
        self.set_intx(False)
        if self.bus is not None:
            self.bus.forget_decoding()

    @property
    def config(self) -> bytes:
        """A copy of configuration space."""
        return bytes(self._config)

    def load_config(self, config: bytes) -> None:
        """Take over saved configuration space of an equal function."""
        if len(config) != CONFIG_BYTES:
            raise ValueError("configuration space has 256 bytes")
        self._config[:] = config
        if self.bus is not None:
            self.bus.forget_decoding()

    # Addresses and interrupts.

    def command(self, bit: Command) -> bool:
        """Whether a bit of the command register is set."""
        return bool(self.read_config(Config.COMMAND, 2) & bit)

    def bar_address(self, bar: Bar) -> int:
        """What the BAR holds: the bus address, 0 when unassigned."""
        return self.read_config(bar.register, bar.n_bytes) & ~bar.flag_bits

    def assign_bar(self, bar: Bar, bus_address: int) -> None:
        """Set the BAR."""
        self.write_config(bar.register, 4, bus_address & 0xFFFFFFFF)
        if bar.n_bytes == 8:
            self.write_config(bar.register + 4, 4, bus_address >> 32)

    def decoded(self) -> Iterator[tuple[OfSpace, int, Region]]:
        """The BARs that answer now: assigned, and their kind enabled in the command register."""
        for bar in self.bars:
            enable = Command.IO if bar.space is OfSpace.IO else Command.MEMORY
            address = self.bar_address(bar)
            if address and self.command(enable):
                yield bar.space, address, bar.region

    def set_intx(self, level: bool) -> None:
        """The level that the function gives its interrupt pin."""
        status = self._config[Config.STATUS]
        self._config[Config.STATUS] = status | STATUS_INTERRUPT if level else status & ~STATUS_INTERRUPT
        self.update_intx()

    def update_intx(self) -> None:
        """Pass the level on as the command register allows."""
        pending = bool(self._config[Config.STATUS] & STATUS_INTERRUPT)
        if self.bus is not None and self.identity.interrupt_pin:
            level = pending and not self.command(Command.INTX_DISABLE)
            self.bus.set_intx(self.devfn, self.identity.interrupt_pin, level)

    def send_message(self, address: int, data: int) -> None:
        """A message signalled interrupt: a memory write, so it needs bus mastering."""
        if self.bus is not None and self.command(Command.MASTER):
            self.bus.send_message(address, data)

    def _write_header(self) -> None:
        identity = self.identity
        self._set(Config.VENDOR_ID, 2, identity.vendor)
        self._set(Config.DEVICE_ID, 2, identity.device)
        self._set(Config.REVISION, 1, identity.revision)
        self._set(Config.PROG_IF, 3, identity.class_code)
        self._set(Config.SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
        self._set(Config.SUBSYSTEM_ID, 2, identity.subsystem)
        self._set(Config.INTERRUPT_PIN, 1, identity.interrupt_pin)
        self._mask[Config.COMMAND : Config.COMMAND + 2] = int(_COMMAND_MASK).to_bytes(2, "little")
        for register in (Config.CACHE_LINE_SIZE, Config.LATENCY_TIMER, Config.INTERRUPT_LINE):
            self._mask[register] = 0xFF

    def _set(self, offset: int, size_bytes: int, value: int) -> None:
        self._config[offset : offset + size_bytes] = value.to_bytes(size_bytes, "little")


class PciBus:
    """Bus 0 of a host bridge: functions by devfn."""

    def __init__(
        self,
        set_intx: Callable[[int, int, bool], None],
        send_message: Callable[[int, int], None],
        set_doorbells: Callable[[PciFunction, Bar, frozenset[int]], None],
    ) -> None:
        self.functions: dict[int, PciFunction] = {}
        self.set_doorbells = set_doorbells
        """Told the offsets in a BAR of the registers that only wake a device, whenever they may have changed."""
        self.set_intx = set_intx
        self.send_message = send_message
        self._decoded: dict[bool, list[tuple[int, int, Region]]] | None = None

    def plug(self, devfn: int, function: PciFunction) -> None:
        """Put `function` at `devfn`; raises ValueError when it is taken."""
        if devfn in self.functions or not 0 <= devfn < 256:
            raise ValueError(f"devfn {devfn:#x} is taken or no devfn")
        self.functions[devfn] = function
        function.devfn = devfn
        function.bus = self
        self.forget_decoding()

    def forget_decoding(self) -> None:
        """A BAR or a command register changed."""
        self._decoded = None

    def find(self, address: int, size_bytes: int, *, io: bool) -> tuple[Region, int] | None:
        """The region that answers at bus `address`, and the offset in it; None when none takes the whole access."""
        if self._decoded is None:
            self._decoded = self._decode()
        for start, end, region in self._decoded[io]:
            if start <= address and address + size_bytes <= end:
                return region, address - start
        return None

    def _decode(self) -> dict[bool, list[tuple[int, int, Region]]]:
        table: dict[bool, list[tuple[int, int, Region]]] = {False: [], True: []}
        for devfn in sorted(self.functions):
            for space, address, region in self.functions[devfn].decoded():
                table[space is OfSpace.IO].append((address, address + region.size_bytes, region))
        return table
