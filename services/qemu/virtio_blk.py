"""The virtio block device over a raw image.

A request that the page cache can answer is served on the spot; any other runs in a task of its own, so requests end
in whatever order the host finishes them. What the host refuses is IOERR to the guest and a line for the operator;
a chain that is no request at all makes the device need a reset.

Source: VIRTIO 1.4, section 5.2.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from protocol.errors import GuestFault
from protocol.startup import NO_OFFER, DmaOffer
from services.qemu.disk_file import DiskFile
from services.qemu.dma import DmaSpace
from services.qemu.segments import gather, pieces, scatter, split, total_bytes, views_now
from services.qemu.virtio_access import DeviceMemory
from services.qemu.virtio_device import VirtioDevice
from services.qemu.virtqueue import Chain, Segment, Virtqueue
from shared.virtio import DeviceId, feature_mask, has_feature
from shared.virtio_blk import (
    BARRIER,
    BLK_CONFIG,
    ID_BYTES,
    RANGE,
    RANGE_BYTES,
    RANGE_UNMAP,
    REQUEST_HEADER,
    REQUEST_HEADER_BYTES,
    SECTOR_BYTES,
    SECTOR_SHIFT,
    STATUS_BYTES,
    BlkFeature,
    BlkRequest,
    BlkStatus,
)

QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2
"""Header and status take two descriptors of the queue."""
MAX_RANGE_SECTORS = 1 << 22
MAX_RANGES = 16
PIECE_BYTES = 1 << 20
"""What is moved at once: more is cut, so that neither the loop nor memory is taken for long."""
OPEN_REQUESTS = 16
"""Requests that hold a piece in memory at the same time."""


@dataclass(frozen=True, slots=True)
class _Request:
    """One chain, understood: the data areas exclude header and status."""

    chain: Chain
    dma: DmaSpace
    kind: int
    sector: int
    data_out: list[Segment]
    data_in: list[Segment]
    status: Segment


_OFFERED = (BlkFeature.SEG_MAX, BlkFeature.BLK_SIZE, BlkFeature.FLUSH)
_OFFERED_WRITABLE = (BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES)
_OFFERED_READONLY = (BlkFeature.RO,)


class VirtioBlk(VirtioDevice):
    """A disk. `serial` is what GET_ID answers (at most 20 ASCII characters count)."""

    MAY_OFFER = feature_mask((*_OFFERED, *_OFFERED_WRITABLE, *_OFFERED_READONLY))
    FEATURE_BITS = BlkFeature

    def __init__(
        self,
        name: str,
        memory: DeviceMemory,
        disk: DiskFile,
        *,
        serial: str = "",
        offer: DmaOffer = NO_OFFER,
    ) -> None:
        super().__init__(
            name,
            DeviceId.BLOCK,
            memory,
            queue_sizes=(QUEUE_SIZE,),
            features=_features(disk),
            offer=offer,
        )
        self.disk = disk
        self.on_io_error: Callable[[str, str], None] | None = None
        self._serial = serial.encode("ascii", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._capacity = disk.size_bytes >> SECTOR_SHIFT
        self._config = _config(self._capacity, readonly=disk.readonly)
        self._slots = trio.Semaphore(OPEN_REQUESTS)

    @property
    def capacity_sectors(self) -> int:
        """Size of the disk; a part of a sector at the end of the image is not reachable."""
        return self._capacity

    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """The block configuration space."""
        return self._config[offset : offset + n_bytes].ljust(n_bytes, b"\0")

    async def handle(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Serve one request; raises GuestFault when header or status have no room."""
        request = await _parse(queue.dma, chain)
        if request.kind == BlkRequest.IN and self._readable(request):
            if self._read_now(request):
                return await _finish(request, BlkStatus.OK)
            self._start(queue, request, partial(self._read, request))
            return None
        if request.kind == BlkRequest.GET_ID and total_bytes(request.data_in) <= PIECE_BYTES:
            await scatter(request.dma, request.data_in, self._serial.ljust(total_bytes(request.data_in), b"\0"))
            return await _finish(request, BlkStatus.OK)
        work = self._work_of(request)
        if isinstance(work, BlkStatus):
            self.later(queue, chain, partial(_refuse, request, work))
        else:
            self._start(queue, request, work)
        return None

    def _readable(self, request: _Request) -> bool:
        return self._in_range(request.sector, total_bytes(request.data_in))

    def _work_of(self, request: _Request) -> Callable[[], Awaitable[None]] | BlkStatus:
        """What serves the request, or the status that refuses it."""
        if request.kind == BlkRequest.IN:
            return BlkStatus.IOERR
        if request.kind == BlkRequest.FLUSH:
            return self.disk.flush
        if request.kind == BlkRequest.OUT:
            writable = self._in_range(request.sector, total_bytes(request.data_out)) and not self.disk.readonly
            return partial(self._write, request) if writable else BlkStatus.IOERR
        if request.kind in (BlkRequest.DISCARD, BlkRequest.WRITE_ZEROES) and not self.disk.readonly:
            return partial(self._ranges, request)
        return BlkStatus.UNSUPP

    def _in_range(self, sector: int, n_bytes: int) -> bool:
        return n_bytes % SECTOR_BYTES == 0 and sector + (n_bytes >> SECTOR_SHIFT) <= self._capacity

    def _start(self, queue: Virtqueue, request: _Request, work: Callable[[], Awaitable[None]]) -> None:
        self.later(queue, request.chain, partial(self._serve_later, request, work))

    async def _serve_later(self, request: _Request, work: Callable[[], Awaitable[None]]) -> int:
        try:
            async with self._slots:
                await work()
        except _Refused as refused:
            return await _refuse(request, refused.status)
        except OSError as error:
            if self.on_io_error is not None:
                kind = BlkRequest(request.kind).name
                self.on_io_error(self.name, f"{kind} at sector {request.sector}: {error.strerror}")
            return await _refuse(request, BlkStatus.IOERR)
        return await _finish(request, BlkStatus.OK)

    def _read_now(self, request: _Request) -> bool:
        n_bytes = total_bytes(request.data_in)
        return n_bytes <= PIECE_BYTES and self._piece_now(request, request.data_in, request.sector << SECTOR_SHIFT)

    def _piece_now(self, request: _Request, piece: list[Segment], offset: int) -> bool:
        views = views_now(request.dma, piece, writing=True)
        return views is not None and self.disk.read_now(views, offset)

    async def _read(self, request: _Request) -> None:
        offset = request.sector << SECTOR_SHIFT
        for piece in pieces(request.data_in, PIECE_BYTES):
            n_bytes = total_bytes(piece)
            if self._piece_now(request, piece, offset):
                await trio.lowlevel.checkpoint()
            else:
                # Through memory of our own: a view of guest RAM does not outlive a wait.
                await scatter(request.dma, piece, await self.disk.read(offset, n_bytes))
            offset += n_bytes

    async def _write(self, request: _Request) -> None:
        offset = request.sector << SECTOR_SHIFT
        for piece in pieces(request.data_out, PIECE_BYTES):
            data = await gather(request.dma, piece)
            await self.disk.write(offset, data)
            offset += len(data)
        await self._write_through()

    async def _write_through(self) -> None:
        """A driver that took no FLUSH may rely on a finished write being stable (VIRTIO 5.2.6.2)."""
        if not has_feature(self.state.driver_features, BlkFeature.FLUSH):
            await self.disk.flush()

    async def _ranges(self, request: _Request) -> None:
        n_bytes = total_bytes(request.data_out)
        if n_bytes % RANGE_BYTES or not 0 < n_bytes <= MAX_RANGES * RANGE_BYTES:
            raise _Refused(BlkStatus.IOERR)
        discard = request.kind == BlkRequest.DISCARD
        ranges = list(RANGE.iter_unpack(await gather(request.dma, request.data_out)))
        for sector, n_sectors, flags in ranges:
            if flags & ~(0 if discard else RANGE_UNMAP):
                raise _Refused(BlkStatus.UNSUPP)
            if n_sectors > MAX_RANGE_SECTORS or sector + n_sectors > self._capacity:
                raise _Refused(BlkStatus.IOERR)
        for sector, n_sectors, flags in ranges:
            await self._range(sector << SECTOR_SHIFT, n_sectors << SECTOR_SHIFT, discard=discard, flags=flags)
        if not discard:
            await self._write_through()

    async def _range(self, offset: int, n_bytes: int, *, discard: bool, flags: int) -> None:
        if n_bytes == 0:
            return
        if discard:
            await self.disk.discard(offset, n_bytes)
        else:
            await self.disk.write_zeroes(offset, n_bytes, unmap=bool(flags & RANGE_UNMAP))


class _Refused(Exception):
    """A request that its content forbids."""

    def __init__(self, status: BlkStatus) -> None:
        self.status = status
        super().__init__(status.name)


async def _parse(dma: DmaSpace, chain: Chain) -> _Request:
    readable, writable = chain.readable_bytes, chain.writable_bytes
    if readable < REQUEST_HEADER_BYTES or writable < STATUS_BYTES:
        raise GuestFault(f"no block request: {readable} readable and {writable} writable bytes")
    header, data_out = split(chain.readable, REQUEST_HEADER_BYTES)
    data_in, status = split(chain.writable, writable - STATUS_BYTES)
    kind, _, sector = REQUEST_HEADER.unpack(await gather(dma, header))
    return _Request(chain, dma, kind & ~BARRIER, sector, data_out, data_in, status[0])


async def _finish(request: _Request, status: BlkStatus) -> int:
    """Write the status byte; the whole writable part has then been written."""
    await request.dma.write(request.status[0], bytes((status,)))
    return total_bytes(request.data_in) + STATUS_BYTES


async def _refuse(request: _Request, status: BlkStatus) -> int:
    """The status byte comes last, so what stands before it is zeroed to be reported as written (VIRTIO 2.7.8.2)."""
    for piece in pieces(request.data_in, PIECE_BYTES):
        await scatter(request.dma, piece, bytes(total_bytes(piece)))
        await trio.lowlevel.checkpoint()
    return await _finish(request, status)


def _features(disk: DiskFile) -> int:
    return feature_mask((*_OFFERED, *(_OFFERED_READONLY if disk.readonly else _OFFERED_WRITABLE)))


def _config(capacity_sectors: int, *, readonly: bool) -> bytes:
    """Fields of features that are not offered are 0."""
    no_geometry, no_topology = (0, 0, 0), (0, 0, 0, 0)
    writeback, n_queues = 1, 1
    ranges = (0, 0, 0, 0, 0, 0) if readonly else (MAX_RANGE_SECTORS, MAX_RANGES, 1, MAX_RANGE_SECTORS, MAX_RANGES, 1)
    return BLK_CONFIG.pack(
        capacity_sectors, 0, SEG_MAX, *no_geometry, SECTOR_BYTES, *no_topology, writeback, n_queues, *ranges
    )
