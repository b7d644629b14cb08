"""The virtio console device with one port, whose text is kept as a terminal's is.

What the guest prints is always taken: when the buffer is full the oldest text goes. What a person types waits in a
bounded buffer until the driver gives room.

Source: VIRTIO 1.4, section 5.3.
"""

from __future__ import annotations

import trio

from protocol.errors import GuestFault
from protocol.startup import NO_OFFER, DmaOffer
from services.qemu.segments import gather, pieces, scatter, split
from services.qemu.virtio_access import DeviceMemory
from services.qemu.virtio_device import VirtioDevice
from services.qemu.virtqueue import Chain, Virtqueue
from services.runtime.text_buffers import OUTPUT_BYTES, TextBuffers
from shared.typed_text import Offer
from shared.virtio import DeviceId
from shared.virtio_console import RECEIVE_QUEUE, TRANSMIT_QUEUE

QUEUE_SIZE = 128


class VirtioConsole(VirtioDevice):
    """A console; `text` is its both directions."""

    def __init__(self, name: str, memory: DeviceMemory, *, offer: DmaOffer = NO_OFFER) -> None:
        super().__init__(name, DeviceId.CONSOLE, memory, queue_sizes=(QUEUE_SIZE, QUEUE_SIZE), offer=offer)
        self.text = TextBuffers()

    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """All of it belongs to features that are not offered."""
        return bytes(n_bytes)

    def type_in(self, offer: Offer) -> int:
        """Text typed at the console; how many bytes were taken."""
        taken = self.text.type_in(offer)
        self.wake(self.queues[RECEIVE_QUEUE])
        return taken

    def wants(self, queue: Virtqueue) -> bool:
        """A buffer for typed text is of use while there is some."""
        return queue.index == TRANSMIT_QUEUE or self.text.has_typed

    async def handle(self, queue: Virtqueue, chain: Chain) -> int:
        """Printed text, or room for typed text; raises GuestFault for room for none."""
        if queue.index == TRANSMIT_QUEUE:
            for piece in pieces(chain.readable, OUTPUT_BYTES):
                self.text.put(await gather(queue.dma, piece))
                await trio.lowlevel.checkpoint()
            return 0
        if chain.writable_bytes == 0:
            raise GuestFault("a buffer for typed text without room for any")
        data = self.text.take_typed(chain.writable_bytes)
        await scatter(queue.dma, split(chain.writable, len(data))[0], data)
        return len(data)

    def was_reset(self) -> None:
        """Typed text is forgotten, printed text stays."""
        self.text.reset()
