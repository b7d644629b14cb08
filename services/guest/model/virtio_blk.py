"""The virtio block driver: start in three steps, requests with one data segment, errors by name.

Each request slot has a command block in memory that the device can reach: header, range, status, indirect table. Data
is mapped through the DMA layer for each request. A status is read once.

Source: VIRTIO 1.4, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from services.guest.model.cpu import Busy, Cpu, NoDevice, Step
from services.guest.model.designs import Rules
from services.guest.model.dma import Dma
from services.guest.model.pci import Bus, Function
from services.guest.model.state import Address, Blk, Mapping, Owner, Request
from services.guest.model.swiotlb import Direction
from services.guest.model.virtio_driver import COMMON_FEATURES, VirtioDriver
from services.guest.model.virtqueue import ANSWER_LIMIT_NS, QueueBroken, QueueError, Segment, Virtqueue
from shared.virtio import feature_mask, has_feature
from shared.virtio_blk import (
    RANGE,
    RANGE_BYTES,
    REQUEST_HEADER,
    REQUEST_HEADER_BYTES,
    SECTOR_BYTES,
    STATUS_BYTES,
    BlkConfig,
    BlkFeature,
    BlkRequest,
    BlkStatus,
)

QUEUE_SIZE = 64
REQUEST_COST = 2_000
COLLECT_AT_ONCE = 2
"""Then the kernel may issue requests, so that the device does not run out of work."""
POLL_NS = 1_000_000
"""So long after a kick or a finished request the driver looks at the ring itself: about what an interrupt costs."""
_COMMAND_BYTES = 128
_RANGE_AT, _STATUS_AT, _TABLE_AT = 16, 48, 64
_NO_STATUS = 0xFF
_WANTED = COMMON_FEATURES | feature_mask(
    (
        BlkFeature.RO,
        BlkFeature.SIZE_MAX,
        BlkFeature.FLUSH,
        BlkFeature.DISCARD,
        BlkFeature.WRITE_ZEROES,
    )
)


class Look(Enum):
    """What a driver that waits for its device should do."""

    TAKE = "something has finished"
    AGAIN = "look again soon"
    SLEEP = "an interrupt will tell"


class NoRoom(Busy):
    """A request found no room although none is in flight that could make some; `fail` ends what made it."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        super().__init__("the DMA pool")
        self.fail = fail


@dataclass(frozen=True, slots=True)
class Finished:
    """The outcome of a request: `error` is empty when it succeeded."""

    owner: Owner
    cookie: int
    error: str = ""


class BlkDriver:
    """One disk over the driver state `state`."""

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, state: Blk, rules: Rules) -> None:
        self._cpu = cpu
        self._dma = dma
        self.state = state
        self._driver = VirtioDriver(cpu, bus, dma, rules, state.pci)
        self._transport = self._driver.transport
        self._queue = Virtqueue(cpu, state.queue)

    @property
    def translated(self) -> bool:
        """Whether each mapping costs hypercalls."""
        return self.state.pci.path.address is Address.WINDOW

    @property
    def max_bytes(self) -> int:
        """The largest data transfer of one request."""
        return min(self._dma.max_bytes(self.state.pci.path), self.state.max_segment_bytes)

    # -- start ----------------------------------------------------------------------------------------------------

    def find(self, function: Function) -> Step[None]:
        """Take `function`; raises NoDevice."""
        yield from self._transport.find(function)
        self.state.present = True

    def start(self) -> Step[None]:
        """Reset, negotiate, lay out the queue, take an interrupt, go; raises NoDevice with the reason."""
        state = self.state
        state.ready, state.error, state.requests = False, "", {}
        yield from self._driver.negotiate(_WANTED)
        yield from self._read_config()
        for page in (state.ring, state.commands):
            yield from self._driver.open_page(page)
        yield from self._driver.set_up_queue(self._queue, 0, QUEUE_SIZE, state.ring.gpa, state.ring.addr)
        yield from self._driver.enable_interrupt()
        yield from self._transport.enable_queue(state.queue, vector=0)
        yield from self._transport.start()
        state.ready = True

    def _read_config(self) -> Step[None]:
        state, features = self.state, self.state.pci.features
        state.sectors = yield from self._transport.device_config(BlkConfig.CAPACITY, 8)
        state.max_segment_bytes = 1 << 32
        if has_feature(features, BlkFeature.SIZE_MAX):
            size_max = yield from self._transport.device_config(BlkConfig.SIZE_MAX, 4)
            state.max_segment_bytes = max(SECTOR_BYTES, size_max // SECTOR_BYTES * SECTOR_BYTES)
        state.read_only = has_feature(features, BlkFeature.RO)
        state.flush = has_feature(features, BlkFeature.FLUSH)
        state.discard = has_feature(features, BlkFeature.DISCARD)
        state.write_zeroes = has_feature(features, BlkFeature.WRITE_ZEROES)

    def quiesce(self) -> Step[None]:
        """Reset the device so that it touches no memory any more; Busy until then, NoDevice when it never does."""
        self.state.ready = False
        yield from self._driver.stop([self.state.ring, self.state.commands])

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, kind: BlkRequest, sector: int, gpa: int, n_bytes: int, owner: Owner, cookie: int) -> Step[bool]:
        """Make a request available; `kick` follows after the last of a batch. False: no room now, try again when one
        has finished. Raises QueueBroken when the queue is broken, Busy, NoDevice."""
        state = self.state
        if not state.ready or state.queue.broken:
            raise QueueBroken(QueueError(state.queue.broken or QueueError.NO_DEVICE))
        self._cpu.clock.charge(REQUEST_COST)
        if not self._queue.room_for(3):
            return False
        mapping: Mapping | None = None
        if kind in (BlkRequest.IN, BlkRequest.OUT, BlkRequest.GET_ID):
            direction = Direction.TO_DEVICE if kind == BlkRequest.OUT else Direction.FROM_DEVICE
            mapping = yield from self._dma.map(state.pci.path, gpa, n_bytes, direction)
            if mapping is None:
                state.requeued += 1
                return False
        state.no_room_ns = 0
        head = self._make_available(kind, sector, n_bytes, mapping)
        state.requests[head] = Request(owner, cookie, kind, mapping, self._cpu.clock.now_ns())
        return True

    def _make_available(self, kind: BlkRequest, sector: int, n_bytes: int, mapping: Mapping | None) -> int:
        # The next head is the one on top of the free list: its command block is free too.
        at = _COMMAND_BYTES * self.state.queue.free[-1]
        page, addr = self.state.commands.gpa + at, self.state.commands.addr + at
        is_range = kind in (BlkRequest.DISCARD, BlkRequest.WRITE_ZEROES)
        block = REQUEST_HEADER.pack(kind, 0, 0 if is_range else sector)
        block += RANGE.pack(sector, n_bytes // SECTOR_BYTES, 0) if is_range else bytes(RANGE_BYTES)
        self._cpu.store(page, block.ljust(_STATUS_AT, b"\0") + bytes([_NO_STATUS]))
        segments: list[Segment] = [(addr, REQUEST_HEADER_BYTES, False)]
        if is_range:
            segments.append((addr + _RANGE_AT, RANGE_BYTES, False))
        if mapping is not None:
            segments.append((mapping.addr, mapping.n_bytes, kind != BlkRequest.OUT))
        segments.append((addr + _STATUS_AT, STATUS_BYTES, True))
        return self._queue.add(segments, page + _TABLE_AT, addr + _TABLE_AT)

    def kick(self) -> Step[None]:
        """Tell the device of what was submitted, when it wants to know."""
        if self.state.ready and self._queue.must_kick():
            yield from self._transport.kick(self.state.queue)
            self._watch()

    # -- outcomes ---------------------------------------------------------------------------------------------------

    def collect(self) -> Step[list[Finished]]:
        """Some of what has finished; more is looked for before the driver asks for an interrupt (`look`).

        A broken queue ends all requests with its error.
        """
        finished: list[Finished] = []
        if not self.state.ready or self.state.queue.broken:
            return finished
        try:
            while len(finished) < COLLECT_AT_ONCE and (used := self._queue.take_used()) is not None:
                finished.append((yield from self._finish(*used)))
            self._watch()
            return finished
        except QueueBroken as broken:
            finished += yield from self.give_up(broken.error)
            return finished

    def _watch(self) -> None:
        """For a while the driver looks at the ring itself."""
        self._queue.do_without_interrupts()
        self.state.poll_until_ns = self._cpu.clock.now_ns() + POLL_NS

    def look(self, now_ns: int) -> Look:
        """What the ring has to say; before the answer SLEEP the device was asked for an interrupt."""
        state = self.state
        if not state.requests or not state.ready or state.queue.broken:
            return Look.SLEEP
        if self._queue.has_used():
            return Look.TAKE
        if now_ns < state.poll_until_ns:
            return Look.AGAIN
        if not state.queue.armed and self._queue.ask_for_interrupt():
            return Look.TAKE
        return Look.SLEEP

    def has_finished(self) -> bool:
        """Whether a request waits to be collected."""
        state = self.state
        return bool(state.requests) and state.ready and not state.queue.broken and self._queue.has_used()

    def _finish(self, head: int, written_bytes: int) -> Step[Finished]:
        request = self.state.requests.pop(head)
        status = self._cpu.load(self.state.commands.gpa + _COMMAND_BYTES * head + _STATUS_AT, 1)[0]
        error = "" if status == BlkStatus.OK else _status_name(status)
        mapping = request.mapping
        if mapping is not None:
            data_bytes = max(0, written_bytes - STATUS_BYTES)
            if request.kind == BlkRequest.IN and not error and data_bytes < mapping.n_bytes:
                error = f"the device wrote {data_bytes} of {mapping.n_bytes} bytes"
            yield from self._dma.unmap(mapping, data_bytes)
        return Finished(Owner(request.owner), request.cookie, error)

    def give_up(self, error: QueueError) -> Step[list[Finished]]:
        """End the queue and all its requests by name; the device is told, should it listen."""
        state = self.state
        state.queue.broken, state.error = error.value, f"queue 0: {error.value}"
        state.ready = False
        try:
            yield from self._transport.fail()
            yield from self._transport.reset()
        except (NoDevice, Busy):
            state.error += "; the device does not answer"
        ended = [Finished(Owner(request.owner), request.cookie, state.error) for request in state.requests.values()]
        # The slots stay taken: a device that lied may still write to them.
        state.requests = {}
        return ended

    def deadline_ns(self) -> int | None:
        """When the oldest request counts as unanswered."""
        if not self.state.requests:
            return None
        return min(request.submitted_ns for request in self.state.requests.values()) + ANSWER_LIMIT_NS


def _status_name(status: int) -> str:
    try:
        return BlkStatus(status).name
    except ValueError:
        return f"status {status:#x}"
