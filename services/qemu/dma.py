"""Guest memory as a device reaches it: straight by guest physical address, or through TCE windows.

A device whose driver negotiated VIRTIO_F_ACCESS_PLATFORM uses bus addresses, which the PCI host bridge's TCE tables
translate page by page and check for permission; any other device uses guest physical addresses and bypasses them.
Whatever comes out is reached through `GuestRam` and nothing else.

Source: VIRTIO 1.4 section 6 (VIRTIO_F_ACCESS_PLATFORM); PAPR 14.5.4.1 (TCE: bit 0 device reads, bit 1 device writes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT, pages_spanned
from shared.guest_ram import GuestRam
from shared.tce import PERMISSION_MASK, TceTable, gpa_of_tce
from shared.words import words_u16

Span = tuple[int, int]
"""A guest physical address and the number of bytes from there."""


class DmaFault(GuestFault):
    """A device was given an address that it may not reach."""


class DmaSpace(ABC):
    """What the devices of one VM see as memory.

    Every operation raises GuestFault (DmaFault where no DMA window is) when any byte is out of reach; nothing is
    transferred then. Views obey the rule of `GuestRam.view`: drop them before the next wait.
    """

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram

    @abstractmethod
    def spans(self, address: int, n_bytes: int, *, writing: bool) -> list[Span]:
        """Where `n_bytes` at `address` lie in guest RAM, in order, adjacent pieces merged."""

    @abstractmethod
    def reach(self) -> frozenset[int]:
        """The GFNs that a device may read or write now, whatever it was asked to do."""

    async def read(self, address: int, n_bytes: int) -> bytes:
        """A copy of `n_bytes` at `address`."""
        view = self._view_now(address, n_bytes)
        if view is not None:
            return bytes(view)
        pieces = [await self.ram.read(gpa, n) for gpa, n in self.spans(address, n_bytes, writing=False)]
        return b"".join(pieces)

    async def write(self, address: int, data: bytes | memoryview) -> None:
        """Store `data` at `address`."""
        spans = self.spans(address, len(data), writing=True)
        if len(spans) == 1 and self.ram.write_now(spans[0][0], data):
            return
        for gpa, n in spans:
            self.ram.check(gpa, n)
        done = 0
        for gpa, n in spans:
            await self.ram.write(gpa, data[done : done + n])
            done += n

    async def load_u16(self, address: int) -> int:
        """The little-endian u16 at even `address`, by one load."""
        gpa = self._word_at(address, writing=False)
        view = self.ram.view_now(gpa, 2, writing=False)
        value: int = words_u16(view if view is not None else await self.ram.view(gpa, 2))[0]
        return value

    async def store_u16(self, address: int, value: int) -> None:
        """Set the little-endian u16 at even `address` by one store."""
        gpa = self._word_at(address, writing=True)
        if not self.ram.store_u16_now(gpa, value):
            await self.ram.store_u16(gpa, value)

    def views_now(self, address: int, n_bytes: int, *, writing: bool) -> list[memoryview] | None:
        """The frames behind `n_bytes` at `address`, for bulk transfer; None when one of them is absent."""
        views = []
        for gpa, n in self.spans(address, n_bytes, writing=writing):
            view = self.ram.view_now(gpa, n, writing=writing)
            if view is None:
                return None
            views.append(view)
        return views

    def check(self, address: int, n_bytes: int, *, writing: bool) -> None:
        """Raise GuestFault unless the device may reach every byte."""
        for gpa, n in self.spans(address, n_bytes, writing=writing):
            self.ram.check(gpa, n)

    def _view_now(self, address: int, n_bytes: int) -> memoryview | None:
        spans = self.spans(address, n_bytes, writing=False)
        if len(spans) != 1:
            return None
        return self.ram.view_now(spans[0][0], n_bytes, writing=False)

    def _word_at(self, address: int, *, writing: bool) -> int:
        """Where an aligned u16 lies: it never crosses a page, so it is one span."""
        return self.spans(address, 2, writing=writing)[0][0]


class BypassSpace(DmaSpace):
    """Bus address is guest physical address: no IOMMU in the way."""

    def spans(self, address: int, n_bytes: int, *, writing: bool) -> list[Span]:
        """The range itself."""
        return [(address, n_bytes)]

    def reach(self) -> frozenset[int]:
        """All of RAM."""
        return frozenset(range(self.ram.size_bytes >> PAGE_SHIFT))

    def _view_now(self, address: int, n_bytes: int) -> memoryview | None:
        return self.ram.view_now(address, n_bytes, writing=False)


class IommuSpace(DmaSpace):
    """Bus addresses of one domain, translated by its TCE windows.

    `windows` is read at each translation: whoever owns the list adds and removes windows.
    """

    def __init__(self, ram: GuestRam, windows: Sequence[TceTable]) -> None:
        super().__init__(ram)
        self.windows = windows
        self.n_lookups = 0
        """Ranges that devices had translated."""

    def maps_ram_to_itself(self) -> bool:
        """Whether every bus address up to the end of RAM is translated to the same guest address, for both ways."""
        window = next((window for window in self.windows if window.index_of(0) is not None), None)
        return window is not None and window.maps_to_itself(self.ram.size_bytes)

    def reach(self) -> frozenset[int]:
        """What an entry with a permission leads to."""
        gfns: set[int] = set()
        n_pages = self.ram.size_bytes >> PAGE_SHIFT
        for window in self.windows:
            for value in window.nonzero().values():
                if value & PERMISSION_MASK:
                    gfns.update(pages_spanned(gpa_of_tce(value), window.page_bytes))
        return frozenset(gfn for gfn in gfns if gfn < n_pages)

    def spans(self, address: int, n_bytes: int, *, writing: bool) -> list[Span]:
        """Translate page by page; raises GuestFault at the first page without a translation or the permission."""
        self.n_lookups += 1
        for window in self.windows:
            if window.index_of(address) is not None:
                return window.translate(address, n_bytes, writing)
        raise DmaFault(f"ioba {address:#x} is in no DMA window")
