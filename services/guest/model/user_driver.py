"""A process that drives a virtio-rng from user space, through memory that VFIO mapped for it.

It holds the device's registers and its own pages, and nothing checks what it does with them: it takes the way to memory
that leaves it the most freedom, and gives the device whatever address it likes.
"""

from __future__ import annotations

from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.designs import NO_TRANSLATION, PLATFORM
from services.guest.model.state import Queue
from services.guest.model.virtio_pci import Transport
from services.guest.model.virtqueue import Virtqueue
from shared.virtio import Feature
from shared.virtio_pci import NO_VECTOR

QUEUE_SIZE = 4
VERSION_1 = 1 << Feature.VERSION_1


class UserDriver:
    """Polls; no interrupt is delivered to the process."""

    def __init__(self, cpu: Cpu, transport: Transport, queue: Queue) -> None:
        self._transport = transport
        self._queue = Virtqueue(cpu, queue)

    def negotiate(self) -> Step[int]:
        """The least translation that the device puts up with: the bits taken; raises NoDevice when it takes none."""
        for bits in (0, NO_TRANSLATION, PLATFORM):
            if (yield from try_features(self._transport, bits)):
                return bits
        raise NoDevice("the device serves no driver")

    def start(self, ring: int) -> Step[None]:
        """Lay out the queue at `ring`, which must be its address for process and device; go."""
        transport = self._transport
        largest = yield from transport.queue_size(0)
        if largest < QUEUE_SIZE:
            raise NoDevice("the device has no queue 0")
        self._queue.set_up(QUEUE_SIZE, ring, ring, indirect=False, event_idx=False)
        yield from transport.enable_queue(self._queue.state, NO_VECTOR)
        yield from transport.start()

    def ask(self, addr: int, n_bytes: int) -> Step[None]:
        """Have the device fill `n_bytes` at whatever address."""
        self._queue.add([(addr, n_bytes, True)])
        yield from self._transport.kick(self._queue.state)

    def answer(self) -> Step[int | None]:
        """How many bytes the device says it wrote, -1 when it gave up, None while it works; raises QueueBroken."""
        used = self._queue.take_used()
        if used is None:
            if not (yield from self._transport.needs_reset()):
                return None
            # What the device did to the ring before it gave up may have come after the look above.
            used = self._queue.take_used()
        return used[1] if used is not None else -1


def try_features(transport: Transport, bits: int) -> Step[bool]:
    """Reset the device and settle on `bits` about access to memory; whether it offers and accepts that."""
    offered = yield from transport.read_features()
    if bits & ~offered:
        return False
    try:
        yield from transport.accept_features(VERSION_1 | bits)
    except NoDevice:
        return False
    return True
