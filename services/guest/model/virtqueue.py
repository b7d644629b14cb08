"""The driver's side of a split virtqueue, written as if the device were hostile.

Everything the driver relies on (which descriptors a chain has, how much the device may write to it) is kept in the
queue's private state; of shared memory only `used` and the notification words are read, each value once and checked.
The first lie of the device breaks the queue for good, with the name of the lie.
"""

from __future__ import annotations

from enum import StrEnum

from protocol.errors import PefboxError
from services.guest.model.cpu import Cpu
from services.guest.model.state import Queue
from shared.vring import (
    AVAIL_NO_INTERRUPT,
    DESC,
    DESC_BYTES,
    RING_IDX,
    USED_ELEM,
    USED_ELEM_BYTES,
    DescFlag,
    avail_bytes,
    avail_entry,
    avail_event,
    desc_bytes,
    need_event,
    used_bytes,
    used_entry,
    used_event,
)

INDEX_MASK = 0xFFFF
ANSWER_LIMIT_NS = 2_000_000_000
"""A device that has not answered a request after this long is given up."""


class QueueError(StrEnum):
    """Why a queue is broken."""

    BAD_ID = "used id out of range"
    NOT_A_HEAD = "used id is not the head of a request"
    USED_LENGTH = "used length is larger than the writable part of the request"
    INDEX_JUMP = "used index moved past what was made available"
    PACKET_PARTS = "a received packet claims more buffers than the queue has, or none"
    NO_ANSWER = "no answer within 2 s"
    NO_DEVICE = "the device is gone"


class QueueBroken(PefboxError):
    """The device broke the rules of its queue."""

    def __init__(self, error: QueueError) -> None:
        self.error = error
        super().__init__(error.value)


Segment = tuple[int, int, bool]
"""Device address, bytes, whether the device writes it."""


class Virtqueue:
    """One split queue in memory that the device can reach."""

    def __init__(self, cpu: Cpu, state: Queue) -> None:
        self._cpu = cpu
        self.state = state

    @staticmethod
    def bytes_for(size: int) -> int:
        """Bytes of a queue's three parts, one after another, from a 16-byte boundary."""
        return _align(desc_bytes(size) + avail_bytes(size), 4) + used_bytes(size)

    def set_up(self, size: int, gpa: int, addr: int, *, indirect: bool, event_idx: bool) -> None:
        """Lay an empty queue out at `gpa` (zeroed), which the device knows as `addr`."""
        state = self.state
        avail = desc_bytes(size)
        used = _align(avail + avail_bytes(size), 4)
        state.size, state.indirect, state.event_idx = size, indirect, event_idx
        state.desc, state.avail, state.used = gpa, gpa + avail, gpa + used
        state.desc_addr, state.avail_addr, state.used_addr = addr, addr + avail, addr + used
        state.avail_idx = state.kicked_idx = state.last_used = 0
        state.free, state.chains, state.writable = list(range(size - 1, -1, -1)), {}, {}
        state.armed = True
        state.broken = ""

    # -- driver to device -----------------------------------------------------------------------------------------

    def room_for(self, n_segments: int) -> bool:
        """Whether a request of so many segments fits now."""
        return len(self.state.free) >= (1 if self.state.indirect else n_segments)

    def add(self, segments: list[Segment], table: int = 0, table_addr: int = 0) -> int:
        """Make a request available and return its head. `table` (gpa) and `table_addr` (what the device knows it as)
        are memory for an indirect table, used when the queue has indirect descriptors. Needs `room_for`."""
        state = self.state
        if state.broken:
            raise QueueBroken(QueueError(state.broken))
        head = self._add_indirect(segments, table, table_addr) if state.indirect else self._add_direct(segments)
        state.writable[head] = sum(n_bytes for _, n_bytes, writes in segments if writes)
        self._cpu.memory.store_u16(state.avail + avail_entry(state.avail_idx % state.size), head)
        state.avail_idx = state.avail_idx + 1 & INDEX_MASK
        self._cpu.memory.store_u16(state.avail + RING_IDX, state.avail_idx)
        return head

    def _add_indirect(self, segments: list[Segment], table: int, table_addr: int) -> int:
        last = len(segments) - 1
        entries = b"".join(
            DESC.pack(addr, n_bytes, writes * DescFlag.WRITE | (n < last) * DescFlag.NEXT, n + 1 if n < last else 0)
            for n, (addr, n_bytes, writes) in enumerate(segments)
        )
        self._cpu.store(table, entries)
        head = self.state.free.pop()
        self.state.chains[head] = [head]
        self._store_desc(head, table_addr, len(entries), DescFlag.INDIRECT, 0)
        return head

    def _add_direct(self, segments: list[Segment]) -> int:
        chain = [self.state.free.pop() for _ in segments]
        for n, (addr, n_bytes, writes) in enumerate(segments):
            flags, following = writes * DescFlag.WRITE, 0
            if n + 1 < len(chain):
                flags, following = flags | DescFlag.NEXT, chain[n + 1]
            self._store_desc(chain[n], addr, n_bytes, flags, following)
        self.state.chains[chain[0]] = chain
        return chain[0]

    def _store_desc(self, index: int, addr: int, n_bytes: int, flags: int, following: int) -> None:
        self._cpu.store(self.state.desc + DESC_BYTES * index, DESC.pack(addr, n_bytes, flags, following))

    @property
    def has_news(self) -> bool:
        """Whether something was added since the last `must_kick`."""
        return self.state.kicked_idx != self.state.avail_idx

    def must_kick(self) -> bool:
        """Whether the device wants to be told of what was added since the last time; counts as told."""
        state = self.state
        old, state.kicked_idx = state.kicked_idx, state.avail_idx
        if old == state.avail_idx:
            return False
        if state.event_idx:
            event = self._cpu.memory.load_u16(state.used + avail_event(state.size))
            return need_event(event, state.avail_idx, old)
        return not self._cpu.memory.load_u16(state.used) & 1

    # -- device to driver -----------------------------------------------------------------------------------------

    def has_used(self) -> bool:
        """Whether the used index moved."""
        state = self.state
        return self._cpu.memory.load_u16(state.used + RING_IDX) != state.last_used

    def take_used(self) -> tuple[int, int] | None:
        """The next finished request (head, bytes written), or None; raises QueueBroken."""
        state = self.state
        idx = self._cpu.memory.load_u16(state.used + RING_IDX)
        n_new = idx - state.last_used & INDEX_MASK
        if not n_new:
            return None
        if n_new > len(state.chains):
            self.break_with(QueueError.INDEX_JUMP)
        entry = self._cpu.load(state.used + used_entry(state.last_used % state.size), USED_ELEM_BYTES)
        head, written_bytes = USED_ELEM.unpack(entry)
        if head >= state.size:
            self.break_with(QueueError.BAD_ID)
        chain = state.chains.get(head)
        if chain is None:
            self.break_with(QueueError.NOT_A_HEAD)
        assert chain is not None
        if written_bytes > state.writable[head]:
            self.break_with(QueueError.USED_LENGTH)
        del state.chains[head], state.writable[head]
        state.free.extend(reversed(chain))
        state.last_used = state.last_used + 1 & INDEX_MASK
        return head, written_bytes

    def ask_for_interrupt(self) -> bool:
        """Ask to be told of the next used entry; True when one has come meanwhile."""
        state = self.state
        state.armed = True
        if state.event_idx:
            self._cpu.memory.store_u16(state.avail + used_event(state.size), state.last_used)
        else:
            self._cpu.memory.store_u16(state.avail, 0)
        return self.has_used()

    def do_without_interrupts(self) -> None:
        """The driver looks at the ring itself: with the event index the entry it asked for lies behind already."""
        state = self.state
        if state.armed and not state.event_idx:
            self._cpu.memory.store_u16(state.avail, AVAIL_NO_INTERRUPT)
        state.armed = False

    def break_with(self, error: QueueError) -> None:
        """End the queue; raises QueueBroken."""
        self.state.broken = error.value
        raise QueueBroken(error)


def _align(value: int, unit: int) -> int:
    return (value + unit - 1) // unit * unit
