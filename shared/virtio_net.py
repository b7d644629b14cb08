"""The virtio network device: configuration space, the header of a packet.

Queue 0 receives, queue 1 transmits. Each packet is one Ethernet frame behind a header; with MRG_RXBUF a received packet
may lie in several buffers of the queue, whose number is in the header of the first.

Source: VIRTIO 1.4, section 5.1.
"""

from __future__ import annotations

import struct
from enum import IntEnum

RECEIVE_QUEUE = 0
TRANSMIT_QUEUE = 1


class NetFeature(IntEnum):
    """Bit numbers of the network device's features."""

    CSUM = 0
    GUEST_CSUM = 1
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    MQ = 22


class NetConfig(IntEnum):
    """Offsets in the device configuration space."""

    MAC = 0
    """6 bytes."""
    STATUS = 6
    """u16, STATUS_LINK_UP."""
    MAX_VIRTQUEUE_PAIRS = 8
    """u16, with MQ."""
    MTU = 10
    """u16."""


NET_CONFIG = struct.Struct("<6sHHH")
"""mac, status, max_virtqueue_pairs, mtu."""

STATUS_LINK_UP = 1

NET_HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers."""
NET_HEADER_BYTES = NET_HEADER.size
GSO_NONE = 0
