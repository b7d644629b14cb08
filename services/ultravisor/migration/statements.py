"""Decisions signed for the other side. They hold by themselves: anyone may carry them, at any time, more than once.

A statement names the migration, so that of another one proves nothing, and is signed by the identity key, so that an
ultravisor can repeat it after a crash that cost it the keys of the migration.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.decoding import DECODE_ERRORS
from services.ultravisor.migration.certificates import Digest, Signature, verifies
from services.ultravisor.migration.refusals import MigrationRefused, Reason

_PREFIX = b"pefbox migration statement 1\0"
MAX_STATEMENT_BYTES = 256


class Word(Enum):
    """What is said."""

    TOKEN = "token"
    """The source's: the destination may start the VM, and the source will not."""
    STARTED = "started"
    """The destination's: it has started the VM."""
    ABANDONED = "abandoned"
    """The destination's: it has not started the VM and never will."""


class Statement(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A word about one migration, signed."""

    word: Word
    session_id: Digest
    signature: Signature


def sign(identity: Ed25519PrivateKey, word: Word, session_id: bytes) -> bytes:
    """The statement as bytes."""
    return msgspec.msgpack.encode(Statement(word, session_id, identity.sign(_signed(word, session_id))))


def check(raw: bytes, session_id: bytes, peer: bytes) -> Word:
    """What the ultravisor of identity `peer` says of the migration; raises MigrationRefused when it does not say it."""
    statement = _decode(raw)
    if statement.session_id != session_id:
        raise MigrationRefused(Reason.OTHER_MIGRATION, statement.session_id.hex())
    if not verifies(peer, statement.signature, _signed(statement.word, session_id)):
        raise MigrationRefused(Reason.NOT_GENUINE, "a statement")
    return statement.word


def session_of(raw: bytes) -> bytes:
    """Which migration a statement names; nobody has said that it is genuine. Raises MigrationRefused."""
    return _decode(raw).session_id


def _decode(raw: bytes) -> Statement:
    if len(raw) > MAX_STATEMENT_BYTES:
        raise MigrationRefused(Reason.MALFORMED, f"a statement of {len(raw)} bytes")
    try:
        return msgspec.msgpack.decode(raw, type=Statement)
    except DECODE_ERRORS as error:
        raise MigrationRefused(Reason.MALFORMED, f"a statement: {error}") from None


def _signed(word: Word, session_id: bytes) -> bytes:
    return _PREFIX + word.value.encode() + b"\0" + session_id
