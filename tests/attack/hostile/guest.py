"""A guest whose block driver makes the requests of `OddRequest`, one for each `write` at its prompt.

Started by the launcher in place of `services.guest`.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from enum import Enum

from services.guest.model import parts
from services.guest.model.state import Mapping
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
        page, addr = self.state.commands.gpa + at, self.state.commands.addr + at
        number = _UNKNOWN_TYPE if odd is OddRequest.TYPE else kind
        first = self.state.sectors if odd is OddRequest.SECTOR else sector
        self._cpu.store(page, REQUEST_HEADER.pack(number, 0, first).ljust(_STATUS_AT, b"\0") + b"\xff")
        data_bytes = n_bytes - 1 if odd is OddRequest.LENGTH else n_bytes
        segments: list[Segment] = [(addr, REQUEST_HEADER_BYTES, False), (mapping.addr, data_bytes, False)]
        if odd is not OddRequest.NO_STATUS:
            segments.append((addr + _STATUS_AT, STATUS_BYTES, True))
        return self._queue.add(segments, page + _TABLE_AT, addr + _TABLE_AT)


if __name__ == "__main__":
    vars(parts)["BlkDriver"] = OddDriver
    runpy.run_module("services.guest", run_name="__main__")
