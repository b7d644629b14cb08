"""The bulk channel between two qemus: frames in sealed chunks over a stream socket, both directions.

A chunk is a length (little-endian u32) and a frame under AES-128-GCM; the nonce is the chunk's number in its
direction, the associated data the length. The keys of both directions are derived from one that went over the CURVE
control link, so whoever sits on the socket can end it, and nothing else.

Of a record of an ultravisor the chunk has the header only, and the record follows as it is: its ultravisor has sealed
it for the other one, who refuses it when a bit of it is another on the way. To seal it once more would cost as much.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from enum import Enum
from struct import Struct

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import MalformedMessage, PefboxError
from services.qemu.migration.shaped_socket import ShapedSocket
from services.qemu.migration.stream import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameKind,
    FrameReader,
    header_of,
    record_bytes_behind,
)
from services.qemu.shaping import Shaper
from shared.link_shape import LinkShape

KEY_BYTES = 32
_SEALING_KEY_BYTES = 16
"""AES-128: the key that it comes from went over a link whose Curve25519 withstands as much."""
_LENGTH = Struct("<I")
_NONCE = Struct("<4xQ")
_TAG_BYTES = 16
_MAX_CHUNK_BYTES = HEADER.size + MAX_PAYLOAD_BYTES + _TAG_BYTES


class ChannelLost(PefboxError):
    """The other qemu is gone, or the link to it is cut."""


class End(Enum):
    """Which end of the channel this is; the value says what its sending key is derived for."""

    SOURCE = b"pefbox migration to destination 2"
    DESTINATION = b"pefbox migration to source 2"

    @property
    def other(self) -> End:
        """The peer's."""
        return End.DESTINATION if self is End.SOURCE else End.SOURCE


class BulkChannel:
    """One end. Takes `connection`; `key` is what both ends have."""

    def __init__(self, connection: socket.socket, key: bytes, end: End) -> None:
        self._socket = ShapedSocket(connection)
        self._sealer, self._opener = AESGCM(_derive(key, end)), AESGCM(_derive(key, end.other))
        self._n_sent = self._n_received = 0
        self._reader = FrameReader()
        self._sent_frame = memoryview(bytearray(HEADER.size + MAX_PAYLOAD_BYTES))
        self._sent_chunk = memoryview(bytearray(_LENGTH.size + _MAX_CHUNK_BYTES))
        self._received_frame = memoryview(bytearray(HEADER.size + MAX_PAYLOAD_BYTES))
        self._received_chunk = memoryview(bytearray(_MAX_CHUNK_BYTES))
        self.sent_bytes = 0
        """All that went out."""

    async def send(self, kind: FrameKind, *parts: bytes | memoryview) -> int:
        """Send one frame, whose payload is all `parts`; how many bytes that was. One at a time. Raises ChannelLost."""
        n_before = self.sent_bytes
        header = header_of(kind, sum(map(len, parts)))
        sealed, as_it_is = ((), parts) if kind is FrameKind.RECORD else (parts, ())
        await self._send_all(self._seal(header, sealed))
        for part in as_it_is:
            await self._send_all(memoryview(part))
        return self.sent_bytes - n_before

    async def receive(self) -> Frame:
        """The next frame that this version knows, good until the next one is received.

        Raises ChannelLost, MalformedMessage.
        """
        while True:
            frame = self._reader.read(await self._receive_frame())
            if frame is not None:
                return frame

    def set_shape(self, shape: LinkShape, shaper: Shaper, nursery: trio.Nursery) -> None:
        """The link to the other host has this shape from now on."""
        self._socket.set_shape(shape, shaper, nursery)

    def close(self) -> None:
        """Close; the peer finds the channel lost, behind what is on its way over a link that has a shape."""
        self._socket.close()

    def _seal(self, header: bytes, parts: Sequence[bytes | memoryview]) -> memoryview:
        """The chunk, good until the next one. Every byte of the parts is copied once: most are pages."""
        frame, at = self._sent_frame, HEADER.size
        frame[:at] = header
        for part in parts:
            frame[at : at + len(part)] = part
            at += len(part)
        chunk = self._sent_chunk[: _LENGTH.size + at + _TAG_BYTES]
        length = _LENGTH.pack(at + _TAG_BYTES)
        chunk[: _LENGTH.size] = length
        self._sealer.encrypt_into(_NONCE.pack(self._n_sent), frame[:at], length, chunk[_LENGTH.size :])
        self._n_sent += 1
        return chunk

    async def _receive_frame(self) -> memoryview:
        frame = self._received_frame
        n_opened = await self._receive_chunk(frame)
        n_bytes = n_opened + record_bytes_behind(frame[:n_opened])
        await self._receive_all(frame[n_opened:n_bytes])
        return frame[:n_bytes]

    async def _receive_chunk(self, into: memoryview) -> int:
        """How many bytes of a frame the next chunk has put at the beginning of `into`."""
        length = bytes(await self._receive_all(self._received_chunk[: _LENGTH.size]))
        (n_bytes,) = _LENGTH.unpack(length)
        if not _TAG_BYTES < n_bytes <= _MAX_CHUNK_BYTES:
            raise MalformedMessage(f"a chunk of {n_bytes} bytes")
        sealed = await self._receive_all(self._received_chunk[:n_bytes])
        n_opened: int = n_bytes - _TAG_BYTES
        try:
            self._opener.decrypt_into(_NONCE.pack(self._n_received), sealed, length, into[:n_opened])
        except InvalidTag:
            raise MalformedMessage("a chunk that is not the next one of this migration") from None
        self._n_received += 1
        return n_opened

    async def _send_all(self, data: memoryview) -> None:
        rest = data
        while rest:
            try:
                rest = rest[await self._socket.send(rest) :]
            except (OSError, trio.ClosedResourceError) as error:
                raise ChannelLost(f"the channel to the other host is lost: {error}") from None
        self.sent_bytes += len(data)

    async def _receive_all(self, into: memoryview) -> memoryview:
        """Fill `into` with the next bytes; returns it."""
        rest = into
        while rest:
            try:
                n_received = await self._socket.recv_into(rest)
            except (OSError, trio.ClosedResourceError) as error:
                raise ChannelLost(f"the channel to the other host is lost: {error}") from None
            if not n_received:
                raise ChannelLost("the other host closed the channel")
            rest = rest[n_received:]
        return into


def _derive(key: bytes, end: End) -> bytes:
    return HKDF(SHA256(), _SEALING_KEY_BYTES, salt=None, info=end.value).derive(key)
