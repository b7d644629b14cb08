"""What translates alike: the DMA windows of a bridge's bus, or those of a slot that has a domain of its own.

Each of these is what PAPR calls a partitionable endpoint: its windows are its own, and a bus address of one means
nothing in another.

Source: PAPR 7.3.11, B.6 (ibm,dma-window); QEMU `include/hw/pci-host/spapr.h`.
"""

from __future__ import annotations

from protocol.messages import TceWindowBody
from shared.tce import WINDOWS_PER_DOMAIN, TceTable, pci_liobn

DEFAULT_BASE = 0
DEFAULT_BYTES = 0x40000000
DEFAULT_SHIFT = 12


class DmaDomain:
    """Domain number `domain` of bridge number `bridge`. `windows` are the TCE tables in use, at most two."""

    def __init__(self, bridge: int, domain: int) -> None:
        self.liobns = tuple(pci_liobn(bridge, domain, window) for window in range(WINDOWS_PER_DOMAIN))
        self.windows: list[TceTable] = []

    @property
    def default_window(self) -> TceWindowBody:
        """The 32-bit window that it starts with."""
        return TceWindowBody(self.liobns[0], DEFAULT_SHIFT, DEFAULT_BASE, DEFAULT_BYTES >> DEFAULT_SHIFT)

    @property
    def free_liobn(self) -> int | None:
        """The lowest that names no window yet; None when there are two."""
        taken = self.liobns_in_use
        return next((liobn for liobn in self.liobns if liobn not in taken), None)

    @property
    def windows_in_use(self) -> list[TceWindowBody]:
        """What its windows are."""
        return [window.window for window in self.windows]

    @property
    def liobns_in_use(self) -> list[int]:
        """Those of its windows."""
        return [window.liobn for window in self.windows]

    def use(self, table: TceTable) -> None:
        """Devices translate through `table` from now on; it replaces one of the same liobn."""
        self.drop(table.liobn)
        self.windows.append(table)

    def drop(self, liobn: int) -> None:
        """Devices reach nothing through the window any more."""
        self.windows[:] = [window for window in self.windows if window.liobn != liobn]
