"""QEMU's educational device: a few registers, a factorial, and DMA between guest memory and a buffer of 4 KiB.

It is the device here that is no virtio device: it always translates through DMA windows, whatever virtio devices
beside it negotiated. An address that it may not reach, or a range outside its buffer, ends the transfer with nothing
copied and a line for the operator; RUN falls and the interrupt comes as ever, for the device has no register that says
more, and the next transfer is served.

Unlike QEMU's, an address beyond its `dma_bits` is such a fault and not cut to fit, a transfer begins at once and not
after 100 ms, and registers are little-endian whatever the guest.

Source: QEMU `docs/specs/edu.rst`, `hw/misc/edu.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from protocol.errors import PefboxError
from protocol.trace import RequestStep
from services.qemu.device_function import DeviceFunction
from services.qemu.dma import DmaFault, DmaSpace
from services.qemu.msi import Msi
from services.qemu.pci_bus import Bar, PciIdentity
from services.qemu.request_trace import RequestTrace
from services.runtime.cause import CAUSE
from services.runtime.tracer import UNTRACED, Tracer
from shared.edu import (
    BAR_BYTES,
    BUFFER_ADDRESS,
    BUFFER_BYTES,
    DEVICE_ID,
    FIRST_WIDE,
    IDENTIFICATION,
    REVISION,
    SUBSYSTEM_ID,
    SUBSYSTEM_VENDOR_ID,
    VENDOR_ID,
    EduDma,
    EduIrq,
    EduRegister,
    EduStatus,
)
from shared.pci import Command, OfSpace, PciClass

MMIO_BAR = 0
_U32 = (1 << 32) - 1
_ZERO_FROM = 34
"""34! and every larger factorial is a multiple of 2^32, so no driver makes the device compute for long."""
_FIELDS = {
    EduRegister.LIVENESS: "liveness",
    EduRegister.FACTORIAL: "factorial",
    EduRegister.STATUS: "status",
    EduRegister.IRQ_STATUS: "irq_status",
    EduRegister.DMA_SOURCE: "source",
    EduRegister.DMA_DESTINATION: "destination",
    EduRegister.DMA_COUNT: "count",
    EduRegister.DMA_COMMAND: "command",
}
"""The registers that can be read, and where their value is kept."""


class EduState(msgspec.Struct):
    """The registers, the buffer, and the last thing that a driver did wrong."""

    liveness: int = 0
    factorial: int = 0
    status: int = 0
    irq_status: int = 0
    source: int = 0
    destination: int = 0
    count: int = 0
    command: int = 0
    buffer: bytes = bytes(BUFFER_BYTES)
    fault: str | None = None


class Transport(Protocol):
    """The function around the device."""

    def interrupt(self) -> None:
        """A cause was raised."""

    def acknowledged(self) -> None:
        """Causes were taken back."""

    @property
    def masters_bus(self) -> bool:
        """Whether the function may reach memory at all."""


class Edu:
    """The device. Accesses outside its registers or of another width read as ones and store nothing, as in QEMU."""

    size_bytes = BAR_BYTES

    def __init__(self, name: str, dma: DmaSpace, dma_bits: int) -> None:
        self.name = name
        self.state = EduState()
        self.transport: Transport | None = None
        self.on_fault: Callable[[str, str], None] | None = None
        self._dma = dma
        self._dma_bits = dma_bits
        self._wake = trio.Event()
        self._quiet = trio.Event()
        self._working = False
        self._resetting = False
        self._cause = 0
        """Of the last store that gave it something to do."""
        self._trace = RequestTrace(UNTRACED, 0, name, 0)
        self._stores: dict[int, Callable[[int], None]] = {
            EduRegister.LIVENESS: self._store_liveness,
            EduRegister.FACTORIAL: self._store_factorial,
            EduRegister.STATUS: self._store_status,
            EduRegister.IRQ_RAISE: self._raise,
            EduRegister.IRQ_ACKNOWLEDGE: self._acknowledge,
            EduRegister.DMA_SOURCE: lambda value: self._store_dma("source", value),
            EduRegister.DMA_DESTINATION: lambda value: self._store_dma("destination", value),
            EduRegister.DMA_COUNT: lambda value: self._store_dma("count", value),
            EduRegister.DMA_COMMAND: self._store_command,
        }

    # Registers.

    def load(self, offset: int, size_bytes: int) -> int:
        """A load from BAR 0."""
        ones = (1 << size_bytes * 8) - 1
        if not _takes(offset, size_bytes):
            return ones
        if offset == EduRegister.IDENTIFICATION:
            return IDENTIFICATION
        if offset not in _FIELDS:
            return ones
        return int(getattr(self.state, _FIELDS[EduRegister(offset)])) & ones

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        """A store to BAR 0."""
        field = self._stores.get(offset)
        if field is not None and _takes(offset, size_bytes) and not self._resetting:
            field(value)

    def _store_liveness(self, value: int) -> None:
        self.state.liveness = ~value & _U32

    def _store_factorial(self, value: int) -> None:
        if not self.state.status & EduStatus.COMPUTING:
            self.state.factorial = value
            self.state.status |= EduStatus.COMPUTING
            self._work()

    def _store_status(self, value: int) -> None:
        self.state.status = self.state.status & EduStatus.COMPUTING | value & EduStatus.IRQ_WHEN_DONE

    def _store_dma(self, field: str, value: int) -> None:
        if not self.state.command & EduDma.RUN:
            setattr(self.state, field, value)

    def _store_command(self, value: int) -> None:
        if value & EduDma.RUN and not self.state.command & EduDma.RUN:
            self.state.command = value
            self._work()

    def _work(self) -> None:
        self._cause = CAUSE.get()
        self._wake.set()

    def _raise(self, causes: int) -> None:
        self.state.irq_status |= causes
        if self.state.irq_status and self.transport is not None:
            self.transport.interrupt()

    def _acknowledge(self, causes: int) -> None:
        self.state.irq_status &= ~causes
        if self.transport is not None:
            self.transport.acknowledged()

    # Life.

    @property
    def fault(self) -> str | None:
        """Why a transfer since the last reset was not made; the last of them."""
        return self.state.fault

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self._working or self._wake.is_set()

    def trace_to(self, tracer: Tracer, lpid: int) -> None:
        """Note each transfer, as one of VM `lpid`."""
        self._trace = RequestTrace(tracer, lpid, self.name, 0)

    async def run(self) -> None:
        """Serve what registers ask for until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self._working = True
            CAUSE.set(self._cause)
            try:
                await self._serve()
            finally:
                self._working = False
                self._settle()

    async def drained(self) -> None:
        """Return when everything that registers asked for is done."""
        while self.busy:
            await self._quiet.wait()

    async def reset(self) -> None:
        """Back to power-on, when the transfer under way has ended; one that has not begun is never made."""
        self._resetting = True
        while self._working:
            await self._quiet.wait()
        self.state = EduState()
        self._resetting = False
        self._settle()

    def save(self) -> EduState:
        """A copy of the state; the device is drained."""
        if self.busy or self._resetting:
            raise RuntimeError(f"{self.name} still has work to do")
        return msgspec.structs.replace(self.state)

    def load_state(self, state: EduState) -> None:
        """Go on from `state`; raises ValueError for one that has something to do or another buffer."""
        running = state.status & EduStatus.COMPUTING or state.command & EduDma.RUN
        if running or len(state.buffer) != BUFFER_BYTES:
            raise ValueError(f"the saved state is none of {self.name}")
        self.state = msgspec.structs.replace(state)

    # Inside.

    async def _serve(self) -> None:
        # A driver on another processor sees the device busy.
        await trio.lowlevel.checkpoint()
        if self.state.status & EduStatus.COMPUTING and not self._resetting:
            self._compute()
        if self.state.command & EduDma.RUN and not self._resetting:
            await self._transfer()

    def _compute(self) -> None:
        state = self.state
        result = 1
        for factor in range(2, min(state.factorial, _ZERO_FROM) + 1):
            result = result * factor & _U32
        state.factorial = result
        state.status &= ~EduStatus.COMPUTING
        if state.status & EduStatus.IRQ_WHEN_DONE:
            self._raise(EduIrq.FACTORIAL)

    async def _transfer(self) -> None:
        """At most the buffer's 4 KiB, whatever the count says."""
        state = self.state
        if self._trace.tracer.on:
            self._trace.moved(RequestStep.BEGUN, 0, state.count)
        try:
            await (self._to_ram() if state.command & EduDma.TO_RAM else self._from_ram())
        except PefboxError as error:
            self._note(f"DMA: {error}")
        if self._trace.tracer.on:
            self._trace.moved(RequestStep.ENDED, 0, state.count if state.command & EduDma.TO_RAM else 0)
        if self._resetting:
            return
        state.command &= ~EduDma.RUN
        if state.command & EduDma.IRQ_WHEN_DONE:
            self._raise(EduIrq.DMA)

    async def _from_ram(self) -> None:
        state = self.state
        at = _place_in_buffer(state.destination, state.count)
        self._check_bus_address(state.source, state.count)
        data = await self._dma.read(state.source, state.count)
        state.buffer = state.buffer[:at] + data + state.buffer[at + len(data) :]

    async def _to_ram(self) -> None:
        state = self.state
        at = _place_in_buffer(state.source, state.count)
        self._check_bus_address(state.destination, state.count)
        await self._dma.write(state.destination, state.buffer[at : at + state.count])

    def _check_bus_address(self, address: int, n_bytes: int) -> None:
        if self.transport is None or not self.transport.masters_bus:
            raise DmaFault("the command register does not let the function master the bus")
        if address + n_bytes > 1 << self._dma_bits:
            raise DmaFault(
                f"{n_bytes} bytes at ioba {address:#x} are beyond the device's {self._dma_bits} address bits"
            )

    def _note(self, reason: str) -> None:
        """A driver that tries the same again is not news."""
        told, self.state.fault = self.state.fault, reason
        if reason != told and self.on_fault is not None:
            self.on_fault(self.name, reason)

    def _settle(self) -> None:
        if not self.busy:
            self._quiet.set()
            self._quiet = trio.Event()


class EduPciState(msgspec.Struct, tag="edu"):
    """The function and its device."""

    config: bytes
    device: EduState


class EduFunction(DeviceFunction[EduPciState]):
    """The PCI function of `device`."""

    state_type = EduPciState

    def __init__(self, device: Edu) -> None:
        super().__init__(PciIdentity(VENDOR_ID, DEVICE_ID, PciClass.OTHER, REVISION, SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID))
        self.device: Edu = device
        device.transport = self
        self.messages = self.msi = Msi(self)
        self.add_bar(Bar(MMIO_BAR, OfSpace.MEM32, device))

    # Transport of the device.

    def interrupt(self) -> None:
        """The message, or the line."""
        self.msi.notify()
        self.acknowledged()

    def acknowledged(self) -> None:
        """Without messages the line is up while there is a cause."""
        self.set_intx(bool(self.device.state.irq_status) and not self.msi.enabled)

    @property
    def masters_bus(self) -> bool:
        """As the command register says."""
        return self.command(Command.MASTER)

    # The function.

    def config_written(self, offset: int, size_bytes: int) -> None:
        """The command register and the MSI capability decide where interrupts go."""
        self.acknowledged()

    async def reset_function(self) -> None:
        """Back to power-on."""
        await self.device.reset()
        self.reset()

    def save(self) -> EduPciState:
        """The state of function and device; the device is drained."""
        return EduPciState(self.config, self.device.save())

    def load_state(self, state: EduPciState) -> None:
        """Go on from `state`."""
        self.device.load_state(state.device)
        self.load_config(state.config)
        self.acknowledged()


def _takes(offset: int, size_bytes: int) -> bool:
    """Whether a register at `offset` takes accesses of this width."""
    return size_bytes == 4 or (size_bytes == 8 and offset >= FIRST_WIDE)


def _place_in_buffer(address: int, n_bytes: int) -> int:
    """The offset in the buffer; raises DmaFault unless the whole range lies in it."""
    at = address - BUFFER_ADDRESS
    if not 0 <= at <= BUFFER_BYTES - n_bytes:
        raise DmaFault(f"{n_bytes} bytes at device address {address:#x} are outside the device's buffer")
    return at
