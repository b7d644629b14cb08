"""The DMA layer: what a device is given instead of a buffer.

A `DmaPath`, settled when the device is started (`services.guest.model.designs`), says whether a buffer goes through a
slot of the swiotlb pool and which address the device gets for it. Rings and command blocks come from `alloc_coherent`;
`open_coherent` shares them with the host where the path says so. Whether a path leads anywhere is for the design to
say: here a private page is given to a device as readily as a shared one, as in the kernels that this models.
"""

from __future__ import annotations

from protocol.codes import UCode
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.ucalls import UV_SHARE_PAGE
from services.guest.model.cpu import Cpu, Panic, Step
from services.guest.model.iommu import IoWindow
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.state import Address, Bounce, DmaPath, Mapping
from services.guest.model.swiotlb import SEGMENT_BYTES, Direction, Swiotlb

MAX_PLAIN_BYTES = 1 << 20
"""Largest mapping that is not bounced: 256 TCEs by one H_STUFF_TCE would be 512 at most."""
MAX_IOMMU_BYTES = SEGMENT_BYTES
"""Keeps a step below 100 exits."""


class Dma:
    """Mappings for the devices behind one DMA window."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, pool: Swiotlb, window: IoWindow) -> None:
        self._cpu = cpu
        self._pages = pages
        self._pool = pool
        self._window = window

    def through(self, window: IoWindow) -> Dma:
        """The same for the devices behind another window."""
        return Dma(self._cpu, self._pages, self._pool, window)

    @property
    def liobn(self) -> int:
        """The window's table."""
        return self._window.liobn

    @staticmethod
    def max_bytes(path: DmaPath) -> int:
        """The largest streaming mapping."""
        if path.bounce is not Bounce.NEVER:
            return SEGMENT_BYTES
        return MAX_IOMMU_BYTES if path.address is Address.WINDOW else MAX_PLAIN_BYTES

    def map(self, path: DmaPath, gpa: int, n_bytes: int, direction: Direction) -> Step[Mapping | None]:
        """Give a buffer to the device; None when the pool or the window is full (mapping error: requeue)."""
        mapping = Mapping(addr=gpa, orig=gpa, n_bytes=n_bytes, direction=direction)
        if _is_bounced(path, gpa, n_bytes):
            slot = self._pool.map(gpa, n_bytes, direction)
            if slot is None:
                return None
            mapping.addr = mapping.slot = slot
        if path.address is not Address.WINDOW:
            mapping.addr += path.offset
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

    def alloc_coherent_apart(self) -> int:
        """As `alloc_coherent`, apart from what a kernel allocates first."""
        return self._pages.must_alloc_apart(1, PageUse.SHARED)

    def open_coherent(self, path: DmaPath, gpa: int) -> Step[int]:
        """Share and map a page of `alloc_coherent`, fill it with zeros and give its device address."""
        if path.shares:
            code, *_ = yield from self._cpu.ucall(UV_SHARE_PAGE, gpa >> PAGE_SHIFT, 1)
            if code != UCode.U_SUCCESS:
                raise Panic(f"UV_SHARE_PAGE of {gpa:#x} gave {code}")
        self._cpu.fill(gpa, PAGE_BYTES)
        if path.address is not Address.WINDOW:
            return gpa + path.offset
        ioba = yield from self._window.map(gpa, PAGE_BYTES, Direction.BIDIRECTIONAL)
        if ioba is None:
            raise Panic("the DMA window is full")
        return ioba

    def close_coherent(self, path: DmaPath, addr: int) -> Step[None]:
        """Take back the way to a page that `open_coherent` gave the address `addr`; a shared page stays shared."""
        if path.address is Address.WINDOW:
            yield from self._window.unmap(addr, self._window.n_io_pages(addr, PAGE_BYTES))


def _is_bounced(path: DmaPath, gpa: int, n_bytes: int) -> bool:
    if path.bounce is Bounce.ABOVE_LIMIT:
        return gpa + n_bytes > path.limit
    return path.bounce is Bounce.ALWAYS
