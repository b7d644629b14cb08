"""The DMA layer: what a device is given instead of a buffer.

| design                                | normal VM                  | secure VM                                    |
|---------------------------------------|----------------------------|----------------------------------------------|
| `quirk`, ACCESS_PLATFORM not offered  | the buffer's gpa           | gpa of a shared swiotlb slot                  |
| `quirk` or `iommu`, bit accepted      | bus address by H_PUT_TCE   | bus address of a shared swiotlb slot          |
| `plain` (bit never accepted)          | the buffer's gpa           | the buffer's gpa: the device reads ciphertext |

`quirk` takes ACCESS_PLATFORM when a device offers it, `iommu` refuses a device that does not, `plain` is a driver that
knows nothing of secure VMs, for comparison. A secure VM under the first two never gives a private page to a device.
Rings and command blocks come from `alloc_coherent`, which shares them.
"""

from __future__ import annotations

from protocol.codes import UCode
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.ucalls import UV_SHARE_PAGE
from services.guest.model.cpu import Cpu, Panic, Step
from services.guest.model.iommu import IoWindow
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.state import DmaDesign, KernelState, Mapping
from services.guest.model.swiotlb import SEGMENT_BYTES, Direction, Swiotlb

MAX_PLAIN_BYTES = 1 << 20
"""Largest mapping that is not bounced: 256 TCEs by one H_STUFF_TCE would be 512 at most."""
MAX_IOMMU_BYTES = SEGMENT_BYTES
"""Keeps a step below 100 exits."""


class Dma:
    """Mappings for one bus. `translated` says whether the driver accepted ACCESS_PLATFORM."""

    def __init__(self, cpu: Cpu, state: KernelState, pages: PageAllocator, pool: Swiotlb, window: IoWindow) -> None:
        self._cpu = cpu
        self._state = state
        self._pages = pages
        self._pool = pool
        self._window = window

    @property
    def bounces(self) -> bool:
        """Whether buffers go through swiotlb slots."""
        return self._state.secure and self._state.dma_design is not DmaDesign.PLAIN

    def max_bytes(self, *, translated: bool) -> int:
        """The largest streaming mapping."""
        if self.bounces:
            return SEGMENT_BYTES
        return MAX_IOMMU_BYTES if translated else MAX_PLAIN_BYTES

    def map(self, gpa: int, n_bytes: int, direction: Direction, *, translated: bool) -> Step[Mapping | None]:
        """Give a buffer to the device; None when the pool or the window is full (mapping error: requeue)."""
        mapping = Mapping(addr=gpa, orig=gpa, n_bytes=n_bytes, direction=direction)
        if self.bounces:
            slot = self._pool.map(gpa, n_bytes, direction)
            if slot is None:
                return None
            mapping.addr = mapping.slot = slot
        if not translated:
            return mapping
        try:
            ioba = yield from self._window.map(mapping.addr, n_bytes, direction)
        except BaseException:
            self._drop_slot(mapping)
            raise
        if ioba is None:
            self._drop_slot(mapping)
            return None
        mapping.n_io_pages = self._window.n_io_pages(mapping.addr, n_bytes)
        mapping.addr = ioba
        return mapping

    def unmap(self, mapping: Mapping, written_bytes: int) -> Step[None]:
        """Take a buffer back; of a bounced one the first `written_bytes` reach the original."""
        if mapping.n_io_pages:
            yield from self._window.unmap(mapping.addr, mapping.n_io_pages)
            mapping.n_io_pages = 0
        if mapping.slot:
            self._pool.unmap(mapping.slot, mapping.n_bytes, Direction(mapping.direction), written_bytes)

    def _drop_slot(self, mapping: Mapping) -> None:
        if mapping.slot:
            self._pool.unmap(mapping.slot, mapping.n_bytes, Direction(mapping.direction), 0)

    def alloc_coherent(self) -> int:
        """A page for rings and command blocks; raises Panic. `open_coherent` then lets the device reach it."""
        return self._pages.must_alloc(1, PageUse.SHARED)

    def open_coherent(self, gpa: int, *, translated: bool) -> Step[int]:
        """Share and map a page of `alloc_coherent`, fill it with zeros and give its device address."""
        if self.bounces:
            code, *_ = yield from self._cpu.ucall(UV_SHARE_PAGE, gpa >> PAGE_SHIFT, 1)
            if code != UCode.U_SUCCESS:
                raise Panic(f"UV_SHARE_PAGE of {gpa:#x} gave {code}")
        self._cpu.fill(gpa, PAGE_BYTES)
        if not translated:
            return gpa
        ioba = yield from self._window.map(gpa, PAGE_BYTES, Direction.BIDIRECTIONAL)
        if ioba is None:
            raise Panic("the DMA window is full")
        return ioba
