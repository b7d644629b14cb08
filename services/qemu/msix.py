"""The MSI-X table and pending bits of one PCI function, as one BAR.

Source: PCI Local Bus 3.0, section 6.8.2.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

import msgspec

from shared.pci import MSIX_ENTRY_MASKED, Capability, MsixEntry

PBA_OFFSET = 0x800
BAR_BYTES = 0x1000
MAX_VECTORS = PBA_OFFSET // MsixEntry.LENGTH

_MESSAGE = Struct("<QII")
"""Address, data, control."""


class MsixState(msgspec.Struct):
    """Table bytes, pending bits by vector, and the two bits of the capability's control word."""

    table: bytes
    pending: int = 0
    enabled: bool = False
    function_masked: bool = False


class MsixTable:
    """The vectors of one function; `deliver(address, data)` is the memory write that a message is."""

    size_bytes = BAR_BYTES
    capability = Capability.MSIX

    def __init__(self, n_vectors: int, deliver: Callable[[int, int], None]) -> None:
        if not 0 < n_vectors <= MAX_VECTORS:
            raise ValueError(f"{n_vectors} MSI-X vectors; 1 to {MAX_VECTORS} fit the BAR")
        self.n_vectors = n_vectors
        self.enabled = False
        self._function_masked = False
        self._deliver = deliver
        self._table = bytearray()
        self._pending = 0
        self.reset()

    def reset(self) -> None:
        """All vectors masked, nothing pending, disabled."""
        self.enabled = self._function_masked = False
        self._pending = 0
        self._table = bytearray(_MESSAGE.pack(0, 0, MSIX_ENTRY_MASKED) * self.n_vectors)

    def set_control(self, *, enabled: bool, function_masked: bool) -> None:
        """The capability's control word was written."""
        self.enabled, self._function_masked = enabled, function_masked
        self._deliver_pending()

    def set_message(self, vector: int, address: int, data: int) -> None:
        """Program and unmask `vector`, as the platform does for ibm,change-msi."""
        _MESSAGE.pack_into(self._table, vector * MsixEntry.LENGTH, address, data, 0)
        self._deliver_pending()

    def message(self, vector: int) -> tuple[int, int]:
        """Address and data of `vector`."""
        address, data, _ = _MESSAGE.unpack_from(self._table, vector * MsixEntry.LENGTH)
        return address, data

    def notify(self, vector: int) -> None:
        """Send the message of `vector`, or keep it pending while it is masked; nothing for an unknown vector."""
        if not self.enabled or vector >= self.n_vectors:
            return
        if self._masked(vector):
            self._pending |= 1 << vector
            return
        self._deliver(*self.message(vector))

    def load(self, offset: int, size_bytes: int) -> int:
        """A load from the BAR."""
        if offset >= PBA_OFFSET:
            return self._pending >> (offset - PBA_OFFSET) * 8 & (1 << size_bytes * 8) - 1
        return int.from_bytes(self._table[offset : offset + size_bytes], "little")

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        """A store to the BAR: only whole dwords or qwords of the table; pending bits are read-only."""
        if size_bytes not in (4, 8) or offset % size_bytes or offset + size_bytes > len(self._table):
            return
        self._table[offset : offset + size_bytes] = value.to_bytes(size_bytes, "little")
        self._deliver_pending()

    def save(self) -> MsixState:
        """A copy of the state."""
        return MsixState(bytes(self._table), self._pending, self.enabled, self._function_masked)

    def load_state(self, state: MsixState) -> None:
        """Go on from `state`, of a table of the same size."""
        if len(state.table) != len(self._table):
            raise ValueError("the saved MSI-X table has another size")
        self._table = bytearray(state.table)
        self._pending = state.pending
        self.enabled, self._function_masked = state.enabled, state.function_masked

    def _masked(self, vector: int) -> bool:
        control = self._table[vector * MsixEntry.LENGTH + MsixEntry.CONTROL]
        return self._function_masked or bool(control & MSIX_ENTRY_MASKED)

    def _deliver_pending(self) -> None:
        if not self._pending or not self.enabled:
            return
        for vector in range(self.n_vectors):
            if self._pending >> vector & 1 and not self._masked(vector):
                self._pending &= ~(1 << vector)
                self._deliver(*self.message(vector))
