"""Echo requests and replies in bare Ethernet frames, so that two kernels can talk without an IP stack.

| offset | field                                                              |
|--------|--------------------------------------------------------------------|
| 0      | destination, source (6 bytes each)                                 |
| 12     | EtherType 0x88B5                                                   |
| 14     | version 1, kind (u8 each)                                          |
| 16     | payload bytes (u16)                                                |
| 18     | sequence number (u64)                                              |
| 26     | payload; what follows it is padding                                |

All numbers are big-endian. Source: IEEE 802 (0x88B5 is the first EtherType for local experiments); the rest is this
project's own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from protocol.ethernet import MULTICAST

ETHER_TYPE = 0x88B5
VERSION = 1
_HEADER = struct.Struct(">6s6sHBBHQ")
ECHO_HEADER_BYTES = _HEADER.size
MAX_SEQUENCE = (1 << 64) - 1


class EchoKind(IntEnum):
    """What a message is."""

    REQUEST = 1
    REPLY = 2


@dataclass(frozen=True, slots=True)
class Echo:
    """One message, between stations: neither address is that of a group."""

    destination: bytes
    source: bytes
    kind: EchoKind
    sequence: int
    payload: bytes

    def pack(self) -> bytes:
        """The frame."""
        head = (self.destination, self.source, ETHER_TYPE, VERSION, self.kind, len(self.payload), self.sequence)
        return _HEADER.pack(*head) + self.payload

    def reply(self) -> Echo:
        """What answers a request: no longer than the request was."""
        return Echo(self.source, self.destination, EchoKind.REPLY, self.sequence, self.payload)


def parse_echo(frame: bytes) -> Echo | None:
    """The message in `frame`; None when there is none."""
    if len(frame) < ECHO_HEADER_BYTES:
        return None
    destination, source, ether_type, version, kind, n_bytes, sequence = _HEADER.unpack_from(frame)
    if ether_type != ETHER_TYPE or version != VERSION or kind not in list(EchoKind):
        return None
    if destination[0] & MULTICAST or source[0] & MULTICAST or destination == source:
        return None
    payload = frame[ECHO_HEADER_BYTES : ECHO_HEADER_BYTES + n_bytes]
    return Echo(destination, source, EchoKind(kind), sequence, payload) if len(payload) == n_bytes else None


def payload_of(sequence: int, n_bytes: int) -> bytes:
    """What request `sequence` carries."""
    word = sequence.to_bytes(8, "big")
    return (word * (n_bytes // len(word) + 1))[:n_bytes]
