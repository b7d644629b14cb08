"""The virtio network device, without offloads.

What the guest transmits goes to the switch of its network at once. What comes from there waits in a bounded queue for
buffers of the driver. A frame is dropped and counted where it does not fit; the guest is never held up.

Source: VIRTIO 1.4, section 5.1.
"""

from __future__ import annotations

import trio

from protocol.errors import GuestFault
from protocol.startup import NO_OFFER, DmaOffer
from services.qemu.network import Drop, FairQueue, Port, Switch, Traffic
from services.qemu.segments import gather, scatter, split
from services.qemu.virtio_access import DeviceMemory
from services.qemu.virtio_device import CHAINS_BETWEEN_CHECKPOINTS, VirtioDevice
from services.qemu.virtqueue import Chain, Virtqueue
from shared.virtio import DeviceId, feature_mask, has_feature
from shared.virtio_net import (
    GSO_NONE,
    NET_CONFIG,
    NET_HEADER,
    NET_HEADER_BYTES,
    RECEIVE_QUEUE,
    STATUS_LINK_UP,
    TRANSMIT_QUEUE,
    NetFeature,
)

QUEUE_SIZE = 256
WAITING_FRAMES = 256
"""Received frames that wait for buffers."""
ANYONE = b"\xff" * 6
RARP_TYPE = 0x8035
MIN_FRAME_BYTES = 60


class VirtioNet(VirtioDevice):
    """A network card with address `mac` (6 bytes) on `switch`."""

    MAY_OFFER = feature_mask((NetFeature.MAC, NetFeature.STATUS, NetFeature.MTU, NetFeature.MRG_RXBUF))
    FEATURE_BITS = NetFeature

    def __init__(
        self, name: str, memory: DeviceMemory, switch: Switch, mac: bytes, *, offer: DmaOffer = NO_OFFER
    ) -> None:
        super().__init__(
            name,
            DeviceId.NET,
            memory,
            queue_sizes=(QUEUE_SIZE, QUEUE_SIZE),
            features=self.MAY_OFFER,
            offer=offer,
        )
        self.mac = mac
        self.traffic = Traffic()
        self._switch = switch
        self._config = NET_CONFIG.pack(mac, STATUS_LINK_UP, 1, switch.mtu)
        self._waiting = FairQueue(WAITING_FRAMES)
        switch.plug(self)

    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """Address, link status and MTU."""
        return self._config[offset : offset + n_bytes].ljust(n_bytes, b"\0")

    # Port of the switch.

    def put(self, frame: bytes, origin: Port) -> None:
        """A frame for the guest."""
        if not self._receives or not self._waiting.put(frame, origin):
            self.traffic.dropped[Drop.NO_BUFFER] += 1
        self.wake(self.queues[RECEIVE_QUEUE])

    def flush(self) -> None:
        """Nothing is gathered here."""

    def announce(self) -> None:
        """A reverse ARP request about itself, as a switch learns an address from (QEMU: `announce_self_create`)."""
        self._switch.from_device(announcement(self.mac), self)
        self._switch.flush()

    # Queues.

    def wants(self, queue: Virtqueue) -> bool:
        """A receive buffer is of use while frames wait, which a device that is held lets them do."""
        return queue.index == TRANSMIT_QUEUE or (bool(self._waiting) and not self.held)

    def served(self, queue: Virtqueue) -> None:
        """What was transmitted leaves."""
        if queue.index == TRANSMIT_QUEUE:
            self._switch.flush()

    async def handle(self, queue: Virtqueue, chain: Chain) -> int | None:
        """A packet to transmit, or buffers for one that waits; raises GuestFault when there is no room for a header."""
        if queue.index == TRANSMIT_QUEUE:
            await self._transmit(queue, chain)
            return 0
        await self._receive(queue, chain)
        return None

    def was_reset(self) -> None:
        """What waited for the former driver is dropped."""
        while self._waiting:
            self._waiting.take()
            self.traffic.dropped[Drop.NO_BUFFER] += 1

    # Inside.

    @property
    def _receives(self) -> bool:
        return self.serving and self.queues[RECEIVE_QUEUE].running

    async def _transmit(self, queue: Virtqueue, chain: Chain) -> None:
        n_bytes = chain.readable_bytes
        if n_bytes < NET_HEADER_BYTES:
            raise GuestFault(f"no packet: {n_bytes} readable bytes")
        if n_bytes > NET_HEADER_BYTES + self._switch.max_frame_bytes:
            self.traffic.dropped[Drop.MALFORMED] += 1
            return
        packet = await gather(queue.dma, chain.readable)
        flags, gso_type, *_ = NET_HEADER.unpack_from(packet)
        frame = packet[NET_HEADER_BYTES:]
        if flags or gso_type != GSO_NONE:
            self.traffic.dropped[Drop.OFFLOAD] += 1
        elif not self._switch.well_formed(frame):
            self.traffic.dropped[Drop.MALFORMED] += 1
        else:
            self.traffic.sent(frame)
            self._switch.from_device(frame, self)

    async def _receive(self, queue: Virtqueue, first: Chain) -> None:
        """Put the frame that waits longest into `first` and, with MRG_RXBUF, as many further buffers as it takes."""
        frame = self._waiting.take()
        wanted = NET_HEADER_BYTES + len(frame)
        chains, room = [first], first.writable_bytes
        if room < NET_HEADER_BYTES:
            raise GuestFault(f"no receive buffer: {room} writable bytes")
        while room < wanted:
            more = await queue.pop() if has_feature(self.state.driver_features, NetFeature.MRG_RXBUF) else None
            if more is None:
                # Not read: the next frame may fit.
                for chain in reversed(chains):
                    queue.unpop(chain)
                self.traffic.dropped[Drop.NO_BUFFER] += 1
                return
            chains.append(more)
            room += more.writable_bytes
            if len(chains) % CHAINS_BETWEEN_CHECKPOINTS == 0:
                await trio.lowlevel.checkpoint()
        await self._fill(queue, chains, NET_HEADER.pack(0, GSO_NONE, 0, 0, 0, 0, len(chains)) + frame)
        self.traffic.received(frame)

    async def _fill(self, queue: Virtqueue, chains: list[Chain], packet: bytes) -> None:
        used, done = [], 0
        for chain in chains:
            part = packet[done : done + chain.writable_bytes]
            await scatter(queue.dma, split(chain.writable, len(part))[0], part)
            used.append((chain.head, len(part)))
            done += len(part)
        await queue.push_together(used)


def announcement(mac: bytes) -> bytes:
    """A RARP request frame of `mac` (RFC 903), as long as Ethernet wants at least."""
    header = ANYONE + mac + RARP_TYPE.to_bytes(2, "big")
    hardware_ethernet, protocol_ip, request_reverse = b"\0\1", b"\x08\0", b"\0\3"
    packet = hardware_ethernet + protocol_ip + b"\6\4" + request_reverse + mac + bytes(4) + mac + bytes(4)
    return (header + packet).ljust(MIN_FRAME_BYTES, b"\0")
