"""Records: what is sealed under the keys of one migration, one after the other.

A record is a header of 20 bytes (little-endian: kind u8, reserved 3 bytes, epoch u32, sequence u64, length u32 of what
follows) and the ciphertext with its tag of 16 bytes. The nonce is stream (0; u32, room for parallel streams) and
sequence; session, direction and header are associated data. So a record that was altered, dropped, repeated,
reordered, or taken from another migration or the other direction is refused at the first look.

Source: NIST SP 800-38D (AES-GCM); the bundle of the Intel TDX migration specification has the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.ultravisor.migration.handshake import Session
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from shared.room import Room

HEADER = Struct("<B3xIQI")
TAG_BYTES = 16
MAX_PAYLOAD_BYTES = 1 << 20
"""Of pages or state; what says which they are comes on top."""
MAX_SEALED_BYTES = MAX_PAYLOAD_BYTES + (64 << 10)
MAX_RECORD_BYTES = HEADER.size + MAX_SEALED_BYTES
_NONCE = Struct("<IQ")
_STREAM = 0


class RecordKind(IntEnum):
    """What a record holds."""

    PAGES = 1
    EPOCH_END = 2
    STATE = 3
    FINAL = 4
    READY = 16


class Direction(IntEnum):
    """Which way a record goes."""

    TO_DESTINATION = 1
    TO_SOURCE = 2


class Record(NamedTuple):
    """An opened record; `payload` is good until the next one is opened."""

    kind: RecordKind
    epoch: int
    payload: memoryview


class Aead(Protocol):
    """An authenticated cipher under one key (AESGCM; a test brings a symbolic one)."""

    def encrypt_into(self, nonce: bytes, data: memoryview, associated_data: bytes | None, into: memoryview, /) -> int:
        """Put ciphertext and tag into all of `into`."""

    def decrypt_into(self, nonce: bytes, data: memoryview, associated_data: bytes | None, into: memoryview, /) -> int:
        """Put what was encrypted into all of `into`; raises InvalidTag."""


MakeAead = Callable[[bytes], Aead]
"""From a key of 32 bytes."""


class RecordSealer:
    """The sending end of one direction."""

    def __init__(self, key: bytes, session_id: bytes, direction: Direction, *, aead: MakeAead = AESGCM) -> None:
        self._aead = aead(key)
        self._bound = session_id + bytes([direction])
        self._sequence = 0
        self._plain, self._sealed = Room(), Room()

    def seal(self, kind: RecordKind, epoch: int, *parts: bytes | memoryview) -> memoryview:
        """The next record, whose payload is all `parts`; good until the one after it.

        Raises MigrationRefused when the payload is longer than a record may be.
        """
        n_bytes = sum(map(len, parts))
        if n_bytes > MAX_SEALED_BYTES - TAG_BYTES:
            raise MigrationRefused(Reason.MALFORMED, f"{n_bytes} bytes for one record")
        plain, record = self._plain.of(n_bytes), self._sealed.of(HEADER.size + n_bytes + TAG_BYTES)
        at = 0
        for part in parts:
            plain[at : at + len(part)] = part
            at += len(part)
        header = HEADER.pack(kind, epoch, self._sequence, n_bytes + TAG_BYTES)
        record[: HEADER.size] = header
        nonce = _NONCE.pack(_STREAM, self._sequence)
        self._aead.encrypt_into(nonce, plain, self._bound + header, record[HEADER.size :])
        self._sequence += 1
        return record


class RecordOpener:
    """The receiving end of one direction."""

    def __init__(self, key: bytes, session_id: bytes, direction: Direction, *, aead: MakeAead = AESGCM) -> None:
        self._aead = aead(key)
        self._bound = session_id + bytes([direction])
        self._sequence = 0
        self._plain = Room()

    def open(self, raw: bytes | memoryview) -> Record:
        """The record, which must be the next one; raises MigrationRefused, after which the direction is of no use."""
        if not HEADER.size + TAG_BYTES <= len(raw) <= MAX_RECORD_BYTES:
            raise MigrationRefused(Reason.MALFORMED, f"a record of {len(raw)} bytes")
        header = bytes(raw[: HEADER.size])
        kind, epoch, sequence, n_bytes = HEADER.unpack(header)
        if n_bytes != len(raw) - HEADER.size:
            raise MigrationRefused(Reason.MALFORMED, "a record of another length than it says")
        if sequence != self._sequence:
            raise MigrationRefused(Reason.NOT_NEXT, f"record {sequence}, expected {self._sequence}")
        payload = self._plain.of(n_bytes - TAG_BYTES)
        nonce, sealed = _NONCE.pack(_STREAM, sequence), memoryview(raw)[HEADER.size :]
        try:
            self._aead.decrypt_into(nonce, sealed, self._bound + header, payload)
        except InvalidTag:
            raise MigrationRefused(Reason.NOT_GENUINE, f"record {sequence}") from None
        if kind not in _KINDS:
            raise MigrationRefused(Reason.MALFORMED, f"a record of kind {kind}")
        self._sequence += 1
        return Record(RecordKind(kind), epoch, payload)


def ends_at_source(session: Session, *, aead: MakeAead = AESGCM) -> tuple[RecordSealer, RecordOpener]:
    """What the source sends with and receives with."""
    return (
        RecordSealer(session.send_key, session.session_id, Direction.TO_DESTINATION, aead=aead),
        RecordOpener(session.receive_key, session.session_id, Direction.TO_SOURCE, aead=aead),
    )


def ends_at_destination(session: Session, *, aead: MakeAead = AESGCM) -> tuple[RecordSealer, RecordOpener]:
    """What the destination sends with and receives with."""
    return (
        RecordSealer(session.send_key, session.session_id, Direction.TO_SOURCE, aead=aead),
        RecordOpener(session.receive_key, session.session_id, Direction.TO_DESTINATION, aead=aead),
    )


_KINDS = frozenset(RecordKind)
