"""Framing of GDB's remote serial protocol: `$data#checksum`, acknowledgements, and the interrupt byte.

A decoder is fed what the socket gives and yields what it was; nothing here waits or knows a command. What comes is
hostile: a packet is bounded, and bytes that belong to none are dropped.
Source: GDB manual, appendix E.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

MAX_PACKET_BYTES = 0x4000
"""Between `$` and `#`, as qSupported announces it: a read of memory is at most half of it."""
_START, _END, _ESCAPE, _INTERRUPT, _RUN = b"$#}\x03*"
_ESCAPE_MASK = 0x20
_ESCAPED = frozenset(b"$#}*")
_CHECKSUM_CHARS = 2


@dataclass(frozen=True, slots=True)
class Packet:
    """The data of one packet, unescaped."""

    data: bytes


class Mark(Enum):
    """What is no packet."""

    ACK = "+"
    NAK = "-"
    INTERRUPT = "interrupt"
    BAD = "bad"
    """A packet whose checksum does not fit, or one that is too long."""


Event = Packet | Mark


class Decoder:
    """Of one connection. With `checked` off the checksums are not looked at, as QStartNoAckMode has it."""

    def __init__(self) -> None:
        self.checked = True
        self._data: bytearray | None = None
        self._checksum: bytearray | None = None
        self._too_long = False

    def feed(self, received: bytes) -> Iterator[Event]:
        """What `received` completes, in order."""
        for byte in received:
            event = self._take(byte)
            if event is not None:
                yield event

    def _take(self, byte: int) -> Event | None:
        if self._checksum is not None:
            self._checksum.append(byte)
            return self._end() if len(self._checksum) == _CHECKSUM_CHARS else None
        if self._data is None:
            return self._between(byte)
        if byte == _END:
            self._checksum = bytearray()
        elif byte == _START:
            # The packet before was cut off.
            self._data, self._too_long = bytearray(), False
        elif len(self._data) < MAX_PACKET_BYTES:
            self._data.append(byte)
        else:
            self._too_long = True
        return None

    def _between(self, byte: int) -> Event | None:
        if byte == _START:
            self._data = bytearray()
            return None
        if byte == _INTERRUPT:
            return Mark.INTERRUPT
        return {ord("+"): Mark.ACK, ord("-"): Mark.NAK}.get(byte)

    def _end(self) -> Event:
        assert self._data is not None
        assert self._checksum is not None
        data, checksum, too_long = bytes(self._data), bytes(self._checksum), self._too_long
        self._data, self._checksum, self._too_long = None, None, False
        if too_long or (self.checked and checksum.lower() != b"%02x" % (sum(data) & 0xFF)):
            return Mark.BAD
        return Packet(unescape(data))


def encode(data: bytes) -> bytes:
    """One packet that holds `data`."""
    escaped = escape(data)
    return b"$%b#%02x" % (escaped, sum(escaped) & 0xFF)


def escape(data: bytes) -> bytes:
    """`data` without the bytes that framing uses."""
    if not _ESCAPED.intersection(data):
        return data
    return b"".join(bytes((_ESCAPE, byte ^ _ESCAPE_MASK)) if byte in _ESCAPED else bytes((byte,)) for byte in data)


def unescape(data: bytes) -> bytes:
    """The inverse of `escape`; an escape at the very end is nothing."""
    if _ESCAPE not in data:
        return data
    parts = data.split(bytes((_ESCAPE,)))
    return parts[0] + b"".join(bytes((part[0] ^ _ESCAPE_MASK,)) + part[1:] for part in parts[1:] if part)
