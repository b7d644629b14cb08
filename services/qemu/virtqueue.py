"""The device's side of a split virtqueue, over memory that a guest controls.

The driver publishes descriptor chains in the available ring; `pop` takes one, `push` gives it back in the used ring.
Every descriptor is copied once and then judged, so a driver that changes it later changes nothing. What breaks the
ring's rules raises RingError with a `RingFault`; after that the queue is of no use until the device is reset.

Source: VIRTIO 1.4, section 2.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec

from protocol.errors import GuestFault
from protocol.trace import RequestStep
from services.qemu.dma import DmaSpace
from services.qemu.request_trace import RequestTrace
from shared.virtio import Feature, has_feature
from shared.vring import (
    AVAIL_ALIGN,
    AVAIL_NO_INTERRUPT,
    DESC,
    DESC_ALIGN,
    DESC_BYTES,
    MAX_CHAIN_BYTES,
    RING_FLAGS,
    RING_IDX,
    USED_ALIGN,
    USED_ELEM,
    USED_NO_NOTIFY,
    DescFlag,
    avail_bytes,
    avail_entry,
    avail_event,
    desc_bytes,
    need_event,
    used_bytes,
    used_entry,
    used_event,
    valid_queue_size,
)
from shared.words import full_fence

Segment = tuple[int, int]
"""Bus address and number of bytes, never 0."""

_NEXT = int(DescFlag.NEXT)
_WRITE = int(DescFlag.WRITE)
_INDIRECT = int(DescFlag.INDIRECT)


class RingFault(Enum):
    """Which rule of the split ring a driver broke; the value is what the operator reads."""

    BAD_QUEUE_SIZE = "queue size is not a power of two within the device's limit"
    MISALIGNED = "a ring is not aligned"
    INDEX_JUMP = "avail.idx runs more than the queue size ahead"
    HEAD_OUT_OF_RANGE = "an available entry names a descriptor outside the table"
    HEAD_IN_FLIGHT = "a descriptor was made available again before it was used"
    NEXT_OUT_OF_RANGE = "a descriptor's next lies outside its table"
    CHAIN_TOO_LONG = "a chain loops or has more descriptors than the queue"
    CHAIN_TOO_LARGE = "a chain describes 4 GiB or more"
    READABLE_AFTER_WRITABLE = "a readable descriptor follows a writable one"
    INDIRECT_NOT_NEGOTIATED = "an indirect descriptor without VIRTIO_F_INDIRECT_DESC"
    INDIRECT_NESTED = "an indirect descriptor inside an indirect table"
    INDIRECT_WITH_NEXT = "an indirect descriptor also has a next"
    INDIRECT_BAD_LENGTH = "an indirect table is empty, no multiple of 16 bytes, or longer than the queue"


class RingError(GuestFault):
    """The driver broke a rule of the ring; `fault` says which."""

    def __init__(self, fault: RingFault, detail: str = "") -> None:
        self.fault = fault
        super().__init__(f"{fault.value}{f' ({detail})' if detail else ''}")


@dataclass(slots=True)
class Chain:
    """One buffer of the driver: what the device may read, then what it may write, in order."""

    head: int
    readable: list[Segment]
    writable: list[Segment]

    @property
    def readable_bytes(self) -> int:
        """Total length of the readable part."""
        return sum(n for _, n in self.readable)

    @property
    def writable_bytes(self) -> int:
        """Total length of the writable part."""
        return sum(n for _, n in self.writable)


class QueueState(msgspec.Struct):
    """What the driver set and how far the device came; enough to go on elsewhere."""

    size: int
    enabled: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0
    msix_vector: int = 0xFFFF
    next_avail: int = 0
    next_used: int = 0
    signalled_used: int = 0
    """used.idx when it was last decided whether to tell the driver."""


class Virtqueue:
    """One queue of a device. `max_size` is what the device offers; the driver may choose less."""

    def __init__(self, index: int, max_size: int) -> None:
        if not valid_queue_size(max_size):
            raise ValueError(f"{max_size} is no size for a virtqueue")
        self.index = index
        self.max_size = max_size
        self.state = QueueState(max_size)
        self.in_flight: set[int] = set()
        self._dma: DmaSpace | None = None
        self._event_idx = False
        self._indirect = False
        self.trace: RequestTrace | None = None

    def reset(self) -> None:
        """Forget everything the driver set."""
        self.state = QueueState(self.max_size)
        self.in_flight.clear()
        self._dma = None

    def start(self, dma: DmaSpace, features: int) -> None:
        """Begin to serve the ring that `state` names; raises GuestFault when it cannot be one."""
        state = self.state
        if not valid_queue_size(state.size) or state.size > self.max_size:
            raise RingError(RingFault.BAD_QUEUE_SIZE, f"{state.size}")
        if state.desc % DESC_ALIGN or state.driver % AVAIL_ALIGN or state.device % USED_ALIGN:
            raise RingError(RingFault.MISALIGNED)
        dma.check(state.desc, desc_bytes(state.size), writing=False)
        dma.check(state.driver, avail_bytes(state.size), writing=False)
        dma.check(state.device, used_bytes(state.size), writing=True)
        self._dma = dma
        self._event_idx = has_feature(features, Feature.EVENT_IDX)
        self._indirect = has_feature(features, Feature.INDIRECT_DESC)

    @property
    def running(self) -> bool:
        """Whether `start` succeeded since the last reset."""
        return self._dma is not None

    @property
    def dma(self) -> DmaSpace:
        """The memory of the ring and of its buffers."""
        if self._dma is None:
            raise RuntimeError(f"queue {self.index} is not running")
        return self._dma

    async def pop(self) -> Chain | None:
        """The next available chain, or None; raises GuestFault when the ring or a chain does not hold."""
        state, dma = self.state, self.dma
        ahead = (await dma.load_u16(state.driver + RING_IDX) - state.next_avail) & 0xFFFF
        if ahead == 0:
            return None
        if ahead > state.size:
            raise RingError(RingFault.INDEX_JUMP, f"{ahead} of {state.size}")
        slot = state.next_avail & (state.size - 1)
        head = await dma.load_u16(state.driver + avail_entry(slot))
        if head >= state.size:
            raise RingError(RingFault.HEAD_OUT_OF_RANGE, f"{head} of {state.size}")
        if head in self.in_flight:
            raise RingError(RingFault.HEAD_IN_FLIGHT, f"{head}")
        chain = await self._read_chain(head)
        state.next_avail = (state.next_avail + 1) & 0xFFFF
        self.in_flight.add(head)
        if self.trace is not None and self.trace.tracer.on:
            self.trace.moved(RequestStep.BEGUN, head, chain.readable_bytes + chain.writable_bytes)
        return chain

    async def push(self, head: int, written_bytes: int) -> None:
        """Give chain `head` back with `written_bytes` written to it; ask `wants_interrupt` after the last of several.

        Only one task at a time pushes: the element must stand before the index that publishes it.
        """
        await self.push_together([(head, written_bytes)])

    async def push_together(self, used: Sequence[tuple[int, int]]) -> None:
        """As `push` for each (head, written_bytes); the driver sees all of them at once."""
        state, dma = self.state, self.dma
        for head, written_bytes in used:
            slot = state.next_used & (state.size - 1)
            await dma.write(state.device + used_entry(slot), USED_ELEM.pack(head, written_bytes))
            state.next_used = (state.next_used + 1) & 0xFFFF
            self.in_flight.discard(head)
            if self.trace is not None and self.trace.tracer.on:
                self.trace.moved(RequestStep.ENDED, head, written_bytes)
        await dma.store_u16(state.device + RING_IDX, state.next_used)

    def unpop(self, chain: Chain) -> None:
        """Leave the chain that was popped last, and not pushed, to the next `pop`."""
        self.state.next_avail = (self.state.next_avail - 1) & 0xFFFF
        self.in_flight.discard(chain.head)

    async def has_available(self) -> bool:
        """Whether the driver's index moved; `pop` says whether that holds."""
        return await self.dma.load_u16(self.state.driver + RING_IDX) != self.state.next_avail

    async def pause_notifications(self) -> None:
        """Tell the driver that kicks are not needed now; with the event index there is nothing to say."""
        if not self._event_idx:
            await self.dma.store_u16(self.state.device + RING_FLAGS, USED_NO_NOTIFY)

    async def resume_notifications(self) -> bool:
        """Ask for a kick at the next available chain; True when one came meanwhile and should be popped first."""
        state, dma = self.state, self.dma
        if self._event_idx:
            await dma.store_u16(state.device + avail_event(state.size), state.next_avail)
        else:
            await dma.store_u16(state.device + RING_FLAGS, 0)
        full_fence()
        return await self.has_available()

    async def wants_interrupt(self) -> bool:
        """Whether the driver is to be told of what was pushed since it was last told."""
        state, dma = self.state, self.dma
        if state.signalled_used == state.next_used:
            return False
        full_fence()
        told, state.signalled_used = state.signalled_used, state.next_used
        if not self._event_idx:
            return not await dma.load_u16(state.driver + RING_FLAGS) & AVAIL_NO_INTERRUPT
        event = await dma.load_u16(state.driver + used_event(state.size))
        return need_event(event, state.next_used, told)

    async def _read_chain(self, head: int) -> Chain:
        walk = _ChainWalk(head, self.state.size)
        index = head
        while True:
            raw = await self.dma.read(self.state.desc + index * DESC_BYTES, DESC_BYTES)
            address, n_bytes, flags, following = DESC.unpack(raw)
            if flags & _INDIRECT:
                await self._read_indirect(walk, address, n_bytes, flags)
                return walk.chain
            walk.add(address, n_bytes, flags)
            if not flags & _NEXT:
                return walk.chain
            if following >= self.state.size:
                raise RingError(RingFault.NEXT_OUT_OF_RANGE, f"{following} of {self.state.size}")
            index = following

    async def _read_indirect(self, walk: _ChainWalk, address: int, n_bytes: int, flags: int) -> None:
        """An indirect table longer than the queue is refused: no chain in it could be that long."""
        if not self._indirect:
            raise RingError(RingFault.INDIRECT_NOT_NEGOTIATED)
        if flags & _NEXT:
            raise RingError(RingFault.INDIRECT_WITH_NEXT)
        n_entries, odd = divmod(n_bytes, DESC_BYTES)
        if odd or not 0 < n_entries <= self.state.size:
            raise RingError(RingFault.INDIRECT_BAD_LENGTH, f"{n_bytes}")
        table = await self.dma.read(address, n_bytes)
        index = 0
        while True:
            buffer, length, flags, following = DESC.unpack_from(table, index * DESC_BYTES)
            if flags & _INDIRECT:
                raise RingError(RingFault.INDIRECT_NESTED)
            walk.add(buffer, length, flags)
            if not flags & _NEXT:
                return
            if following >= n_entries:
                raise RingError(RingFault.NEXT_OUT_OF_RANGE, f"{following} of {n_entries} in an indirect table")
            index = following


class _ChainWalk:
    """Collects the descriptors of one chain; a loop ends it, since a chain is no longer than the queue."""

    def __init__(self, head: int, limit: int) -> None:
        self.chain = Chain(head, [], [])
        self._segments = self.chain.readable
        self._left = limit
        self._bytes = 0

    def add(self, address: int, n_bytes: int, flags: int) -> None:
        if self._left == 0:
            raise RingError(RingFault.CHAIN_TOO_LONG)
        self._left -= 1
        self._bytes += n_bytes
        if self._bytes >= MAX_CHAIN_BYTES:
            raise RingError(RingFault.CHAIN_TOO_LARGE)
        if flags & _WRITE:
            self._segments = self.chain.writable
        elif self._segments is self.chain.writable:
            raise RingError(RingFault.READABLE_AFTER_WRITABLE)
        if n_bytes:
            self._segments.append((address, n_bytes))
