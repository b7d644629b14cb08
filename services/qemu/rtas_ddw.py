"""RTAS services for dynamic DMA windows: a second, 64-bit window, as large as a guest's RAM.

Linux maps all of RAM one to one through it and is done with H_PUT_TCE: bus address is guest physical address plus
DMA64_BASE. A domain has at most two windows. When the last one goes and was not the default 32-bit window, that is
back; a guest that gives up the default window while it is the only one gets its next one in its place.

The services name a device and mean the windows that it translates through: those of the bus, or those of its own
domain, as for a device that has a partitionable endpoint for itself. So neither can use up, remove or see the other's.

Source: PAPR 7.3.11; QEMU `hw/ppc/spapr_rtas_ddw.c`; Linux `arch/powerpc/platforms/pseries/iommu.c` (enable_ddw).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from protocol.codes import RtasStatus
from protocol.messages import TceWindowBody
from services.qemu.dma_domain import DEFAULT_BASE, DmaDomain
from services.qemu.phb import PciHostBridge
from services.qemu.rtas_pci import PciRtas, RtasError
from shared.tce import WINDOWS_PER_DOMAIN

DMA64_BASE = 1 << 59
MAX_WINDOW_TCES = 1 << 24
PAGE_SIZE_BITS = {12: 1 << 0, 16: 1 << 1, 24: 1 << 2, 21: 1 << 8}
"""Page shift to its bit in the mask of ibm,query-pe-dma-window."""
NO_MIGRATION = 0


class WindowPort(Protocol):
    """Who makes TCE tables: kvm, asked by the process."""

    async def create_window(self, window: TceWindowBody) -> bool:
        """Make an empty table and have devices translate through it; False when kvm makes none."""

    async def remove_window(self, liobn: int) -> None:
        """Devices reach nothing through the window any more, and its table is gone."""


class DdwRtas:
    """The services over one bridge of a machine with `memory_bytes` of RAM."""

    def __init__(self, phb: PciHostBridge, pci: PciRtas, port: WindowPort, memory_bytes: int) -> None:
        self._phb = phb
        self._pci = pci
        self._port = port
        # The last page of a window must lie wholly in RAM, or kvm refuses its TCE.
        self.page_shifts = [shift for shift in PAGE_SIZE_BITS if memory_bytes % (1 << shift) == 0]

    async def query(self, args: Sequence[int]) -> list[int]:
        """ibm,query-pe-dma-window: windows left, largest block in TCEs, page sizes, migration."""
        domain = self._domain(args)
        mask = sum(PAGE_SIZE_BITS[shift] for shift in self.page_shifts)
        return [WINDOWS_PER_DOMAIN - len(domain.windows), MAX_WINDOW_TCES, mask, NO_MIGRATION]

    async def create(self, args: Sequence[int]) -> list[int]:
        """ibm,create-pe-dma-window: liobn and bus address of an empty window of `1 << window_shift` bytes."""
        *device, page_shift, window_shift = args
        domain = self._domain(device)
        if page_shift not in self.page_shifts or not page_shift <= window_shift < DMA64_BASE.bit_length():
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        liobn = domain.free_liobn
        if liobn is None or window_shift - page_shift >= MAX_WINDOW_TCES.bit_length():
            raise RtasError(RtasStatus.HARDWARE_ERROR)
        base = DMA64_BASE if domain.windows else DEFAULT_BASE
        window = TceWindowBody(liobn, page_shift, base, 1 << window_shift - page_shift)
        if not await self._port.create_window(window):
            raise RtasError(RtasStatus.HARDWARE_ERROR)
        return [liobn, base >> 32, base & 0xFFFFFFFF]

    async def remove(self, args: Sequence[int]) -> list[int]:
        """ibm,remove-pe-dma-window."""
        (liobn,) = args
        domain = self._phb.domain_with(liobn)
        if domain is None or liobn not in domain.liobns_in_use:
            raise RtasError(RtasStatus.PARAMETER_ERROR)
        was_default = domain.default_window in domain.windows_in_use
        await self._port.remove_window(liobn)
        if not domain.windows and not was_default:
            await self._make_default(domain)
        return []

    async def reset(self, args: Sequence[int]) -> list[int]:
        """ibm,reset-pe-dma-window: the default window alone, and empty."""
        domain = self._domain(args)
        await self._remake(domain)
        return []

    async def to_default(self) -> None:
        """All domains as at power-on."""
        for domain in self._phb.domains:
            await self._to_default(domain)

    async def _to_default(self, domain: DmaDomain) -> None:
        """A domain for which no other window was made keeps its table, which kvm empties at a reset."""
        if domain.windows_in_use != [domain.default_window]:
            await self._remake(domain)

    async def _remake(self, domain: DmaDomain) -> None:
        for liobn in domain.liobns_in_use:
            await self._port.remove_window(liobn)
        await self._make_default(domain)

    async def _make_default(self, domain: DmaDomain) -> None:
        if not await self._port.create_window(domain.default_window):
            raise RtasError(RtasStatus.HARDWARE_ERROR)

    def _domain(self, device: Sequence[int]) -> DmaDomain:
        return self._phb.domain_of(self._pci.function(*device).devfn)
