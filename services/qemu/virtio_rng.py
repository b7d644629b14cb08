"""The virtio entropy device: the host kernel's random numbers.

Source: VIRTIO 1.4, section 5.4.
"""

from __future__ import annotations

import os

from protocol.errors import GuestFault
from protocol.startup import NO_OFFER, DmaOffer
from services.qemu.segments import scatter, split
from services.qemu.virtio_access import DeviceMemory
from services.qemu.virtio_device import VirtioDevice
from services.qemu.virtqueue import Chain, Virtqueue
from shared.virtio import DeviceId

QUEUE_SIZE = 8
MAX_REQUEST_BYTES = 4096
"""A longer buffer is filled in part, as a device may; so a request takes a few microseconds at most."""


class VirtioRng(VirtioDevice):
    """A source of random bytes."""

    def __init__(self, name: str, memory: DeviceMemory, *, offer: DmaOffer = NO_OFFER) -> None:
        super().__init__(name, DeviceId.RNG, memory, queue_sizes=(QUEUE_SIZE,), offer=offer)

    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """There is no configuration."""
        return bytes(n_bytes)

    async def handle(self, queue: Virtqueue, chain: Chain) -> int:
        """Fill the buffer, or the beginning of a large one; raises GuestFault when there is none."""
        n_bytes = min(chain.writable_bytes, MAX_REQUEST_BYTES)
        if n_bytes == 0:
            raise GuestFault("a request for random bytes without room for any")
        await scatter(queue.dma, split(chain.writable, n_bytes)[0], os.urandom(n_bytes))
        return n_bytes
