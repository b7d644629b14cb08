"""The virtio network driver: frames in and out, through mappings that each buffer gets when the device is told of it.

The receive queue is kept full of buffers of 2 KiB; with MRG_RXBUF a packet may take several. A frame to send is put
into a slot and stays there until the device has taken it. What cannot be kept is dropped and counted. Nothing is
waited for: a device that takes or brings nothing costs the slots it holds, and whoever wants an answer has a time limit
of its own.

Interrupts come at the first packet after the kernel was idle; until it is idle again it looks at the rings itself. Of
what was sent the device need not tell, unless no slot is free. Source: VIRTIO 1.4, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from protocol.ethernet import DEFAULT_MTU, HEADER_BYTES, MAC_BYTES, MAX_FRAME_BYTES, MAX_MTU, MIN_MTU, MULTICAST
from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.designs import Rules
from services.guest.model.dma import Dma
from services.guest.model.pages import PageAllocator, PageUse, pages_for
from services.guest.model.pci import Bus
from services.guest.model.state import Net
from services.guest.model.swiotlb import SLOT_BYTES, Direction
from services.guest.model.virtio_driver import VirtioExtraDriver
from services.guest.model.virtqueue import QueueBroken, QueueError, Virtqueue
from shared.virtio import DeviceId, Feature, feature_mask, has_feature
from shared.virtio_net import (
    GSO_NONE,
    NET_HEADER,
    NET_HEADER_BYTES,
    RECEIVE_QUEUE,
    STATUS_LINK_UP,
    TRANSMIT_QUEUE,
    NetConfig,
    NetFeature,
)

N_BUFFERS = 64
BUFFER_BYTES = SLOT_BYTES
"""A receive buffer takes one slot of the pool and lies in one IO page."""
N_SLOTS = 64
A_STEP = 6
"""Buffers of each kind that one step moves: with the 32-bit window each costs hypercalls, up to 1 for a buffer taken
back and 3 for a frame of 9000 bytes given to the device."""
RETRY_NS = 5_000_000
"""When the pool or the window was full, mapping is tried again after so long."""
_TRANSMIT_RING_AT = 0x1000
_HEADER = NET_HEADER.pack(0, GSO_NONE, 0, 0, 0, 0, 0)
# No INDIRECT_DESC: every packet is one descriptor.
_WANTED = feature_mask(
    (
        Feature.VERSION_1,
        Feature.EVENT_IDX,
        NetFeature.MAC,
        NetFeature.MTU,
        NetFeature.STATUS,
        NetFeature.MRG_RXBUF,
    )
)


class NetDrop(StrEnum):
    """Why a frame was dropped."""

    MALFORMED = "malformed"
    """Shorter than a header."""
    OVERSIZED = "oversized"
    """Longer than the MTU allows."""
    FOREIGN = "foreign"
    """Not for this station, or of another protocol."""
    STRAY = "stray"
    """A reply that nobody waits for, or with another payload than its request."""
    NO_SLOT = "no-slot"
    """A frame to send, while the device has not taken the ones before."""


class NetDriver(VirtioExtraDriver):
    """One network card over `state`; received frames go to whoever called `hand_to`."""

    device = DeviceId.NET

    def __init__(self, cpu: Cpu, bus: Bus, dma: Dma, rules: Rules, pages: PageAllocator, state: Net) -> None:
        super().__init__(cpu, bus, dma, rules, state)
        self.state: Net = state
        self._pages = pages
        self._receive_queue = Virtqueue(cpu, state.receive)
        self._transmit_queue = Virtqueue(cpu, state.transmit)
        self._receiver: Callable[[bytes], None] | None = None

    def hand_to(self, receiver: Callable[[bytes], None]) -> None:
        """Who gets each received frame; it makes no calls."""
        self._receiver = receiver

    # -- start ----------------------------------------------------------------------------------------------------

    def bring_up(self) -> Step[None]:
        """As ExtraDriver. The receive queue is filled by the steps that follow."""
        state = self.state
        yield from self.negotiate(_WANTED)
        self._forget_mappings()
        yield from self._read_config()
        self._take_memory()
        yield from self.open_page(state.ring)
        yield from self.enable_interrupt()
        yield from self._start_queue(self._receive_queue, RECEIVE_QUEUE, N_BUFFERS, 0)
        yield from self._start_queue(self._transmit_queue, TRANSMIT_QUEUE, N_SLOTS, _TRANSMIT_RING_AT)
        self._transmit_queue.do_without_interrupts()
        yield from self.transport.start()

    def _forget_mappings(self) -> None:
        """Those of a former start: the device was reset since, and `work` takes them from it."""
        state = self.state
        state.stale += [mapping for _, mapping in (*state.receiving.values(), *state.sending.values())]
        state.receiving, state.sending, state.queued = {}, {}, []
        state.idle_buffers, state.free_slots = list(range(N_BUFFERS)), list(range(N_SLOTS))
        state.parts_left = state.part_bytes = state.retry_ns = 0

    def _read_config(self) -> Step[None]:
        state, features = self.state, self.state.pci.features
        if not has_feature(features, NetFeature.MAC):
            raise NoDevice("the device has no address")
        low = yield from self.transport.device_config(NetConfig.MAC, 4)
        high = yield from self.transport.device_config(NetConfig.MAC + 4, MAC_BYTES - 4)
        state.mac = (high << 32 | low).to_bytes(MAC_BYTES, "little")
        if state.mac[0] & MULTICAST or not any(state.mac):
            raise NoDevice(f"{format_mac(state.mac)} is no address of a station")
        mtu = DEFAULT_MTU
        if has_feature(features, NetFeature.MTU):
            mtu = yield from self.transport.device_config(NetConfig.MTU, 2)
        if mtu < MIN_MTU:
            raise NoDevice(f"an MTU of {mtu} bytes")
        state.mergeable = has_feature(features, NetFeature.MRG_RXBUF)
        largest = MAX_MTU if state.mergeable else BUFFER_BYTES - NET_HEADER_BYTES - HEADER_BYTES
        state.mtu = min(mtu, largest)

    def _take_memory(self) -> None:
        """Once, for the longest frame there is: the MTU may be another after a renegotiation."""
        state, alloc = self.state, self._pages.must_alloc
        if not state.buffers:
            state.slot_bytes = -(-(NET_HEADER_BYTES + MAX_FRAME_BYTES) // BUFFER_BYTES) * BUFFER_BYTES
            state.buffers = alloc(pages_for(N_BUFFERS * BUFFER_BYTES), PageUse.BUFFER)
            state.slots = alloc(pages_for(N_SLOTS * state.slot_bytes), PageUse.BUFFER)
            state.assembly = alloc(pages_for(MAX_FRAME_BYTES), PageUse.BUFFER)

    def _start_queue(self, queue: Virtqueue, index: int, size: int, at: int) -> Step[None]:
        state = self.state
        self._cpu.fill(state.ring.gpa + at, _TRANSMIT_RING_AT)
        yield from self.set_up_queue(queue, index, size, state.ring.gpa + at, state.ring.addr + at)
        yield from self.transport.enable_queue(queue.state, vector=0)

    # -- what there is to do ----------------------------------------------------------------------------------------

    def work(self) -> Step[None] | None:
        """As ExtraDriver."""
        state = self.state
        if state.stale:
            return self._release()
        if not state.ready:
            return None
        pending = (
            self._receive_queue.has_used()
            or self._transmit_queue.has_used()
            or self._receive_queue.has_news
            or self._transmit_queue.has_news
            or (not state.retry_ns and (self._may_fill or self._may_transmit))
        )
        return self._serve() if pending else None

    def rest(self) -> Step[None] | None:
        """As ExtraDriver."""
        state = self.state
        step = self.work()
        if step is not None or not state.ready:
            return step
        came = not state.receive.armed and self._receive_queue.ask_for_interrupt()
        if not state.transmit.armed and not state.free_slots:
            came = self._transmit_queue.ask_for_interrupt() or came
        return self._serve() if came else None

    def interrupted(self) -> Step[None]:
        """As ExtraDriver. It makes no call, so that no busy one comes before the end of the interrupt; `work` does."""
        if self.state.ready:
            self._receive_queue.do_without_interrupts()
            self._transmit_queue.do_without_interrupts()
        return
        yield

    def deadline_ns(self) -> int | None:
        """As ExtraDriver: when mapping is tried again."""
        return self.state.retry_ns or None if self.state.ready else None

    def overdue(self) -> Step[None]:
        """As ExtraDriver."""
        self.state.retry_ns = 0
        yield from self._serve()

    def link_up(self) -> Step[bool]:
        """Whether the card says that it is connected."""
        if not has_feature(self.state.pci.features, NetFeature.STATUS):
            return True
        return bool((yield from self.transport.device_config(NetConfig.STATUS, 2)) & STATUS_LINK_UP)

    @property
    def _may_fill(self) -> bool:
        return bool(self.state.idle_buffers) and self._receive_queue.room_for(1)

    @property
    def _may_transmit(self) -> bool:
        return bool(self.state.queued) and self._transmit_queue.room_for(1)

    def _serve(self) -> Step[None]:
        """A little of everything; a busy call ends it, and what was done stays done."""
        try:
            # First what was sent, since what is received may be answered.
            yield from self._take_back()
            yield from self._receive()
            yield from self._transmit()
            yield from self._kick(self._transmit_queue)
            yield from self._fill()
            yield from self._kick(self._receive_queue)
        except QueueBroken as broken:
            self.give_up(broken.error.value)

    def _kick(self, queue: Virtqueue) -> Step[None]:
        if queue.must_kick():
            yield from self.transport.kick(queue.state)

    def _release(self) -> Step[None]:
        stale = self.state.stale
        for _ in range(min(A_STEP, len(stale))):
            yield from self._dma.unmap(stale.pop(), 0)

    # -- frames from the device ---------------------------------------------------------------------------------------

    def _fill(self) -> Step[None]:
        state = self.state
        for _ in range(A_STEP):
            if not self._may_fill:
                return
            buffer = state.idle_buffers[-1]
            gpa = state.buffers + buffer * BUFFER_BYTES
            mapping = yield from self._dma.map(state.pci.path, gpa, BUFFER_BYTES, Direction.FROM_DEVICE)
            if mapping is None:
                self._try_later()
                return
            state.idle_buffers.pop()
            head = self._receive_queue.add([(mapping.addr, BUFFER_BYTES, True)])
            state.receiving[head] = (buffer, mapping)

    def _try_later(self) -> None:
        self.state.retry_ns = self._cpu.clock.now_ns() + RETRY_NS

    def _receive(self) -> Step[None]:
        state = self.state
        for _ in range(A_STEP):
            used = self._receive_queue.take_used()
            if used is None:
                return
            self._receive_queue.do_without_interrupts()
            head, written_bytes = used
            buffer, mapping = state.receiving.pop(head)
            yield from self._dma.unmap(mapping, written_bytes)
            state.idle_buffers.append(buffer)
            self._take_part(self._cpu.load(state.buffers + buffer * BUFFER_BYTES, written_bytes))

    def _take_part(self, part: bytes) -> None:
        """A buffer's content: a packet, or a part of one."""
        state = self.state
        if not state.parts_left:
            if len(part) < NET_HEADER_BYTES:
                self.drop(NetDrop.MALFORMED)
                return
            n_parts = NET_HEADER.unpack_from(part)[-1] if state.mergeable else 1
            if not 1 <= n_parts <= state.receive.size:
                self._receive_queue.break_with(QueueError.PACKET_PARTS)
            state.parts_left, state.part_bytes = n_parts, 0
            part = part[NET_HEADER_BYTES:]
        self._join(part)
        if not state.parts_left:
            self._received(self._cpu.load(state.assembly, min(state.part_bytes, MAX_FRAME_BYTES)))

    def _join(self, part: bytes) -> None:
        """Bytes beyond the longest frame are not kept, only counted."""
        state = self.state
        kept = part[: max(0, MAX_FRAME_BYTES - state.part_bytes)]
        if kept:
            self._cpu.store(state.assembly + state.part_bytes, kept)
        state.part_bytes += len(part)
        state.parts_left -= 1

    def _received(self, frame: bytes) -> None:
        state = self.state
        if state.part_bytes > HEADER_BYTES + state.mtu:
            self.drop(NetDrop.OVERSIZED)
        elif len(frame) < HEADER_BYTES:
            self.drop(NetDrop.MALFORMED)
        else:
            state.frames_in += 1
            state.bytes_in += len(frame)
            if self._receiver is not None:
                self._receiver(frame)

    def drop(self, reason: NetDrop) -> None:
        """Count a frame that goes nowhere."""
        self.state.dropped[reason] = self.state.dropped.get(reason, 0) + 1

    # -- frames to the device -----------------------------------------------------------------------------------------

    @property
    def has_slot(self) -> bool:
        """Whether a frame can be kept for sending."""
        return self.state.ready and bool(self.state.free_slots)

    def send(self, frame: bytes) -> bool:
        """Keep `frame`, at most the MTU and 14 bytes, for sending; False when it was dropped. Makes no calls."""
        state = self.state
        if not self.has_slot:
            self.drop(NetDrop.NO_SLOT)
            return False
        if len(frame) > HEADER_BYTES + state.mtu:
            self.drop(NetDrop.OVERSIZED)
            return False
        slot = state.free_slots.pop()
        self._cpu.store(state.slots + slot * state.slot_bytes, _HEADER + frame)
        state.queued.append((slot, NET_HEADER_BYTES + len(frame)))
        return True

    def _transmit(self) -> Step[None]:
        state = self.state
        for _ in range(A_STEP):
            if not self._may_transmit:
                return
            slot, n_bytes = state.queued[0]
            gpa = state.slots + slot * state.slot_bytes
            mapping = yield from self._dma.map(state.pci.path, gpa, n_bytes, Direction.TO_DEVICE)
            if mapping is None:
                self._try_later()
                return
            state.queued.pop(0)
            head = self._transmit_queue.add([(mapping.addr, n_bytes, False)])
            state.sending[head] = (slot, mapping)
            state.frames_out += 1
            state.bytes_out += n_bytes - NET_HEADER_BYTES

    def _take_back(self) -> Step[None]:
        """Slots whose frames the device has taken."""
        state = self.state
        for _ in range(A_STEP):
            used = self._transmit_queue.take_used()
            if used is None:
                return
            self._transmit_queue.do_without_interrupts()
            slot, mapping = state.sending.pop(used[0])
            yield from self._dma.unmap(mapping, 0)
            state.free_slots.append(slot)


def format_mac(mac: bytes) -> str:
    """As people write it."""
    return mac.hex(":")
