"""A guest with a broken driver. The environment variable PEFBOX_BROKEN_DRIVER says which:

- `requests` (default): its block driver makes the requests of `OddRequest`, one for each `write` at its prompt;
- `private-tce`: it maps its private buffers themselves into the DMA window, as Linux does for a device with a 32-bit
  mask in a secure VM.

Started by the launcher in place of `services.guest`.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from enum import Enum

from services.guest.model import parts
from services.guest.model.cpu import Step
from services.guest.model.dma import Dma
from services.guest.model.state import Mapping
from services.guest.model.swiotlb import Direction
from services.guest.model.virtio_blk import BlkDriver
from services.guest.model.virtqueue import Segment
from shared.virtio_blk import REQUEST_HEADER, REQUEST_HEADER_BYTES, STATUS_BYTES, BlkRequest

_COMMAND_BYTES = 128
_STATUS_AT, _TABLE_AT = 48, 64
_UNKNOWN_TYPE = 99


class OddRequest(Enum):
    """What is wrong with a request."""

    TYPE = "a type that no device knows"
    SECTOR = "a sector behind the end of the disk"
    LENGTH = "a part of a sector"
    NO_STATUS = "no room for the status"


_odd: Iterator[OddRequest] = iter(OddRequest)


class OddDriver(BlkDriver):
    """Breaks the rules with each write."""

    def _make_available(self, kind: BlkRequest, sector: int, n_bytes: int, mapping: Mapping | None) -> int:
        odd = next(_odd, None) if kind is BlkRequest.OUT else None
        if odd is None or mapping is None:
            return super()._make_available(kind, sector, n_bytes, mapping)
        at = _COMMAND_BYTES * self.state.queue.free[-1]
        page, addr = self.state.command_page + at, self.state.command_addr + at
        number = _UNKNOWN_TYPE if odd is OddRequest.TYPE else kind
        first = self.state.sectors if odd is OddRequest.SECTOR else sector
        self._cpu.store(page, REQUEST_HEADER.pack(number, 0, first).ljust(_STATUS_AT, b"\0") + b"\xff")
        data_bytes = n_bytes - 1 if odd is OddRequest.LENGTH else n_bytes
        segments: list[Segment] = [(addr, REQUEST_HEADER_BYTES, False), (mapping.addr, data_bytes, False)]
        if odd is not OddRequest.NO_STATUS:
            segments.append((addr + _STATUS_AT, STATUS_BYTES, True))
        return self._queue.add(segments, page + _TABLE_AT, addr + _TABLE_AT)


class UnbouncedDma(Dma):
    """Shares its rings, and gives the device its private buffers."""

    def map(self, gpa: int, n_bytes: int, direction: Direction, *, translated: bool) -> Step[Mapping | None]:
        """Map the buffer itself."""
        assert translated
        ioba = yield from self._window.map(gpa, n_bytes, direction)
        assert ioba is not None
        n_io_pages = self._window.n_io_pages(gpa, n_bytes)
        return Mapping(addr=ioba, orig=gpa, n_bytes=n_bytes, direction=direction, n_io_pages=n_io_pages)


_BROKEN = {"requests": ("BlkDriver", OddDriver), "private-tce": ("Dma", UnbouncedDma)}

if __name__ == "__main__":
    name, replacement = _BROKEN[os.environ.get("PEFBOX_BROKEN_DRIVER", "requests")]
    vars(parts)[name] = replacement
    runpy.run_module("services.guest", run_name="__main__")
