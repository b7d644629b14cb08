"""Bytes of a descriptor chain, apart from how the driver cut it into descriptors.

A device makes no assumption about framing (VIRTIO 2.7.4): a header may be spread over descriptors, and share one with
data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from services.qemu.dma import DmaSpace
from services.qemu.virtqueue import Segment


def total_bytes(segments: Iterable[Segment]) -> int:
    """Length of all segments."""
    return sum(n for _, n in segments)


def split(segments: list[Segment], n_bytes: int) -> tuple[list[Segment], list[Segment]]:
    """The first `n_bytes`, and the rest; both empty-safe. `segments` has at least that many."""
    head: list[Segment] = []
    for index, (address, length) in enumerate(segments):
        if n_bytes == 0:
            return head, segments[index:]
        if length > n_bytes:
            head.append((address, n_bytes))
            return head, [(address + n_bytes, length - n_bytes), *segments[index + 1 :]]
        head.append((address, length))
        n_bytes -= length
    return head, []


def pieces(segments: list[Segment], limit_bytes: int) -> Iterator[list[Segment]]:
    """The segments in runs of at most `limit_bytes`, none empty."""
    rest = segments
    while rest:
        piece, rest = split(rest, limit_bytes)
        yield piece


async def gather(dma: DmaSpace, segments: list[Segment]) -> bytes:
    """The content of all segments; raises GuestFault."""
    if len(segments) == 1:
        return await dma.read(*segments[0])
    return b"".join([await dma.read(address, n) for address, n in segments])


async def scatter(dma: DmaSpace, segments: list[Segment], data: bytes) -> None:
    """Store `data` from the first segment on; raises GuestFault."""
    rest = memoryview(data)
    for address, n in segments:
        await dma.write(address, rest[:n])
        rest = rest[n:]


def views_now(dma: DmaSpace, segments: list[Segment], *, writing: bool) -> list[memoryview] | None:
    """The frames of all segments, or None when one is absent; raises GuestFault."""
    if len(segments) == 1:
        return dma.views_now(*segments[0], writing=writing)
    views: list[memoryview] = []
    for address, n in segments:
        some = dma.views_now(address, n, writing=writing)
        if some is None:
            return None
        views += some
    return views
