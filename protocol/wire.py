"""The one frame format of every link.

Frame 1 is a MessagePack array `[version, kind, number, correlation, cause, body]`. A second frame exists only
where the message declares one, at most `MAX_PAYLOAD_BYTES`. No field names the sender: the socket, its CURVE keys
and its ZAP domain fix peer, role and VM.

`correlation` pairs a reply with its call and is chosen by the caller. `cause` (protocol.causes) is chosen by the
guest's processor for each of its calls and repeated in everything that is done because of it, to the device and back.

Where the kind of link allows it, messages that leave together may share one ZeroMQ frame, a bundle: the byte 0xC1, with
which no MessagePack value begins, then each message behind its length as a little-endian u16. At most MAX_BUNDLED.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage

VERSION = 1
MAX_MESSAGE_BYTES = 128 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024
HIGH_WATER_MARK = 256
MAX_BUNDLED = 64
MAX_OPEN_CALLS = 64
"""A link end serves at most this many calls of its peer at once; the next gets H_BUSY or U_BUSY."""


class MessageKind(IntEnum):
    """What a frame is."""

    CALL = 0
    REPLY = 1
    EVENT = 2


class Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """A decoded frame; `body` stays encoded until its number says what it is."""

    version: int
    kind: MessageKind
    number: int
    correlation: int
    cause: int
    body: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(kind: MessageKind, number: int, correlation: int, cause: int, body: Any) -> bytes:  # noqa: ANN401
    """One frame. `body` is a Struct, a list of registers, or None."""
    return _encoder.encode((VERSION, int(kind), number, correlation, cause, body))


def decode(frame: bytes | memoryview) -> Envelope:
    """The envelope of `frame`; raises MalformedMessage for anything else."""
    try:
        envelope = _decoder.decode(frame)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None
    if envelope.version != VERSION:
        raise MalformedMessage(f"version {envelope.version}, this side speaks {VERSION}")
    return envelope


_BUNDLE_MARK = b"\xc1"
_LENGTH_BYTES = 2


def bundle(frames: Sequence[bytes]) -> bytes:
    """One frame with all of `frames` (1 to MAX_BUNDLED, each below 64 KiB)."""
    parts = [_BUNDLE_MARK]
    for frame in frames:
        parts += (len(frame).to_bytes(_LENGTH_BYTES, "little"), frame)
    return b"".join(parts)


def is_bundle(frame: bytes) -> bool:
    """Whether `frame` is a bundle, well-formed or not."""
    return frame[:1] == _BUNDLE_MARK


def unbundle(frame: bytes) -> list[bytes]:
    """The messages of a bundle; raises MalformedMessage when its lengths do not add up, and for too many."""
    frames: list[bytes] = []
    at, end = 1, len(frame)
    while at < end:
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(frame[at:start], "little")
        if start > end or at > end or len(frames) == MAX_BUNDLED:
            raise MalformedMessage(f"a bundle of {end} bytes whose lengths do not add up, or of too many messages")
        frames.append(frame[start:at])
    return frames
