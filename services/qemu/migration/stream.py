"""Frames between two qemus: what each is, so that a reader knows whether it can go on.

A frame is a header of 8 bytes (little-endian: kind u8, stream u8, flags u16, length u32) and its payload. The first
frame is HELLO. A reader refuses a kind that it does not know unless the frame is marked OPTIONAL, which it skips; so a
later version adds frames that an earlier one may leave out, and none that it must not. `stream` is 0; others are for
parallel channels. What carries the frames protects them; here every byte is a peer's and may be anything (S5).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage

HEADER = Struct("<BBHI")
MAX_PAYLOAD_BYTES = (1 << 20) + (128 << 10)
"""A record of an ultravisor, or as many normal pages, with what says which they are."""
STATE_PART_BYTES = 1 << 20
MAX_STATE_BYTES = 64 << 20
"""Of all parts of one name."""
VERSION = 2
MAGIC = "pefbox-migration"


class FrameKind(IntEnum):
    """What a frame holds."""

    HELLO = 1
    """Who sends: a Hello."""
    HANDSHAKE = 2
    """A message of the ultravisors' handshake; opaque here."""
    RECORD = 3
    """A sealed record of an ultravisor; opaque here."""
    STATEMENT = 4
    """A signed word of an ultravisor; opaque here."""
    PAGES = 5
    """Pages that the host may read: of a normal VM, or shared ones."""
    ROUND_END = 6
    """All pages of a round have gone."""
    STATE = 7
    """A part of what is no page: a StatePart."""
    READY = 8
    """The destination has loaded everything (of a normal VM; of a secure one its ultravisor says so in a record)."""
    START = 9
    """The destination may run a normal VM; the source will not."""
    STARTED = 11
    """It does."""
    FAILED = 10
    """Why one side gives up, for the operator of the other."""


class FrameFlag(IntFlag):
    """What a reader needs to know of a frame that it does not know."""

    OPTIONAL = 1


class Frame(NamedTuple):
    """One frame."""

    kind: FrameKind
    payload: memoryview


Text = Annotated[str, Meta(max_length=256)]


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first frame of either side, as JSON. The machine type must be the same, capabilities those of both."""

    magic: Text = MAGIC
    version: Annotated[int, Meta(ge=1, lt=1 << 16)] = VERSION
    machine: Text
    vm: Text
    page_bytes: Annotated[int, Meta(ge=1, le=1 << 30)]
    n_pages: Annotated[int, Meta(ge=1, le=1 << 40)]
    secure: bool
    capabilities: Annotated[list[Text], Meta(max_length=64)] = []

    def encode(self) -> bytes:
        """Its payload."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Hello:
        """Of a payload; raises MalformedMessage."""
        try:
            hello = msgspec.json.decode(payload, type=cls)
        except DECODE_ERRORS as error:
            raise MalformedMessage(f"no hello of a migration: {error}") from None
        if hello.magic != MAGIC:
            raise MalformedMessage("no hello of a migration")
        return hello


class StatePart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Some bytes of the state called `name`; `last` when it is whole with them."""

    name: Text
    last: bool
    data: bytes

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> StatePart:
        """Of a payload; raises MalformedMessage."""
        try:
            return msgspec.msgpack.decode(payload, type=cls)
        except DECODE_ERRORS as error:
            raise MalformedMessage(f"no part of a state: {error}") from None


def parts_of(name: str, data: bytes) -> list[bytes]:
    """The payloads by which `data` travels as the state called `name`."""
    starts = range(0, len(data), STATE_PART_BYTES) or range(1)
    parts = [StatePart(name, at + STATE_PART_BYTES >= len(data), data[at : at + STATE_PART_BYTES]) for at in starts]
    return [msgspec.msgpack.encode(part) for part in parts]


def header_of(kind: FrameKind, n_bytes: int, flags: int = 0) -> bytes:
    """What goes before a payload of `n_bytes`, with a FrameFlag or none; raises ValueError when that is too long."""
    if n_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {n_bytes} bytes in a frame of at most {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(kind, 0, flags, n_bytes)


def record_bytes_behind(frame: memoryview) -> int:
    """How long the record is whose frame has come as far as its header; 0 when it is no such frame, or too long."""
    if len(frame) != HEADER.size:
        return 0
    kind, _, _, n_bytes = HEADER.unpack(frame)
    is_readable = kind == FrameKind.RECORD and n_bytes <= MAX_PAYLOAD_BYTES
    return int(n_bytes) if is_readable else 0


class FrameReader:
    """Takes whole frames as they come."""

    def __init__(self) -> None:
        self._began = False

    def read(self, chunk: bytes | memoryview) -> Frame | None:
        """The frame of a chunk, None for one that is to be skipped; raises MalformedMessage, which ends the stream.

        The payload is a view of `chunk`.
        """
        if len(chunk) < HEADER.size:
            raise MalformedMessage(f"a frame of {len(chunk)} bytes")
        kind, stream, flags, n_bytes = HEADER.unpack_from(chunk)
        self._check(kind, stream, flags, n_bytes)
        if len(chunk) != HEADER.size + n_bytes:
            raise MalformedMessage(f"{len(chunk) - HEADER.size} bytes where a frame says {n_bytes}")
        self._began = True
        return Frame(FrameKind(kind), memoryview(chunk)[HEADER.size :]) if kind in _KINDS else None

    def _check(self, kind: int, stream: int, flags: int, n_bytes: int) -> None:
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise MalformedMessage(f"a frame of {n_bytes} bytes, at most {MAX_PAYLOAD_BYTES}")
        if flags not in (0, FrameFlag.OPTIONAL) or stream:
            raise MalformedMessage(f"a frame with flags {flags:#x} of stream {stream}")
        if not self._began and kind != FrameKind.HELLO:
            raise MalformedMessage("the stream does not begin with a hello")
        if kind not in _KINDS and not flags & FrameFlag.OPTIONAL:
            raise MalformedMessage(f"a frame of kind {kind}, which this version does not know")


_KINDS = frozenset(FrameKind)
