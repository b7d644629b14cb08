"""RTAS services of the PCI host bridge: configuration space and message interrupts.

Enhanced error handling is not among them: it exists for passed-through devices only, and there are none.

Each takes its argument words and returns the words after the status, or raises RtasError.

Source: PAPR 7.3.4 and 7.3.10.5; QEMU `hw/ppc/spapr_pci.c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from protocol.codes import RtasStatus
from services.qemu.pci_bus import MessageInterrupts, PciFunction
from services.qemu.phb import MSI_WINDOW, IrqPort, PciHostBridge
from shared.pci import CONFIG_BYTES, Capability

EDGE_TRIGGERED = 1
_TYPES = {Capability.MSI: 1, Capability.MSIX: 2}
"""What ibm,change-msi calls the kinds of messages."""


class ChangeMsi(IntEnum):
    """Function argument of ibm,change-msi."""

    QUERY = 0
    CHANGE = 1
    RESET = 2
    CHANGE_MSI = 3
    CHANGE_MSIX = 4


_CHANGES = {
    ChangeMsi.CHANGE: (Capability.MSI, Capability.MSIX),
    ChangeMsi.CHANGE_MSI: (Capability.MSI,),
    ChangeMsi.CHANGE_MSIX: (Capability.MSIX,),
}
"""The functions of ibm,change-msi that are served, and the messages that each may change."""


class RtasError(Exception):
    """A service ends with this status."""

    def __init__(self, status: RtasStatus) -> None:
        self.status = status
        super().__init__(status.name)


class PciRtas:
    """The services over one bridge."""

    def __init__(self, phb: PciHostBridge, irq: IrqPort) -> None:
        self._phb = phb
        self._irq = irq

    def read_first(self, config_addr: int, size_bytes: int) -> list[int]:
        """read-pci-config: of the first bridge."""
        function, offset = self._register(config_addr, size_bytes)
        return [function.read_config(offset, size_bytes)]

    def write_first(self, config_addr: int, size_bytes: int, value: int) -> list[int]:
        """write-pci-config: of the first bridge."""
        function, offset = self._register(config_addr, size_bytes)
        function.write_config(offset, size_bytes, value & (1 << size_bytes * 8) - 1)
        return []

    def read(self, config_addr: int, buid_high: int, buid_low: int, size_bytes: int) -> list[int]:
        """ibm,read-pci-config."""
        self._check_bridge(buid_high, buid_low)
        return self.read_first(config_addr, size_bytes)

    def write(self, config_addr: int, buid_high: int, buid_low: int, size_bytes: int, value: int) -> list[int]:
        """ibm,write-pci-config."""
        self._check_bridge(buid_high, buid_low)
        return self.write_first(config_addr, size_bytes, value)

    async def change_msi(self, args: Sequence[int]) -> list[int]:
        """ibm,change-msi: sources granted, next sequence number, type. Fewer may be granted than were asked for."""
        config_addr, buid_high, buid_low, function, n_asked, sequence = args
        self._check_bridge(buid_high, buid_low)
        target = self._function(config_addr)
        messages = _messages(target, function)
        kind, next_sequence = _TYPES[messages.capability], sequence + 1 & 0xFFFFFFFF
        if n_asked == 0:
            self._take_back(target, messages)
            return [0, next_sequence, kind]
        sources = self._phb.msis.allocate(target.devfn, min(n_asked, messages.n_vectors))
        if sources is None:
            raise RtasError(RtasStatus.HARDWARE_ERROR)
        for source in sources:
            await self._irq.define(source, level_triggered=False)
        for vector, source in enumerate(sources):
            messages.set_message(vector, MSI_WINDOW, source)
        return [len(sources), next_sequence, kind]

    def query_source(self, config_addr: int, buid_high: int, buid_low: int, vector: int) -> list[int]:
        """ibm,query-interrupt-source-number: source, and 1 for edge triggered."""
        self._check_bridge(buid_high, buid_low)
        sources = self._phb.msis.blocks.get(self._function(config_addr).devfn)
        if sources is None or vector >= len(sources):
            raise RtasError(RtasStatus.HARDWARE_ERROR)
        return [sources[vector], EDGE_TRIGGERED]

    def _take_back(self, target: PciFunction, messages: MessageInterrupts) -> None:
        self._phb.msis.release(target.devfn)
        for vector in range(messages.n_vectors):
            messages.set_message(vector, 0, 0)

    def function(self, config_addr: int, buid_high: int, buid_low: int) -> PciFunction:
        """The function at `config_addr`; raises RtasError unless it and the bridge exist."""
        self._check_bridge(buid_high, buid_low)
        return self._function(config_addr)

    def _check_bridge(self, buid_high: int, buid_low: int) -> None:
        if buid_high << 32 | buid_low != self._phb.buid:
            raise RtasError(RtasStatus.PARAMETER_ERROR)

    def _function(self, config_addr: int) -> PciFunction:
        function = self._phb.bus.functions.get(config_addr >> 8 & 0xFF)
        if config_addr >> 16 & 0xFF or function is None:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        return function

    def _register(self, config_addr: int, size_bytes: int) -> tuple[PciFunction, int]:
        # Bits 28-31 carry bits 8-11 of an extended register number.
        offset = config_addr >> 20 & 0xF00 | config_addr & 0xFF
        if size_bytes not in (1, 2, 4) or offset % size_bytes or offset >= CONFIG_BYTES:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        return self._function(config_addr), offset


def _messages(function: PciFunction, change: int) -> MessageInterrupts:
    messages = function.messages
    if messages is None or change not in _CHANGES or messages.capability not in _CHANGES[ChangeMsi(change)]:
        raise RtasError(RtasStatus.PARAMETER_ERROR)
    return messages
