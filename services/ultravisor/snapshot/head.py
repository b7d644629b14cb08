"""What names a snapshot, and its keys, which only the ultravisor that took it can derive.

The head is public and lies in front of the records. Its digest names the snapshot: in the ledger, and in the associated
data of every record. Keys come by HKDF from the identity key of the host, the snapshot's own random bytes and that
digest, so no two snapshots have a key in common, and under a head that was altered no record opens.

Source: RFC 5869 (HKDF).
"""

from __future__ import annotations

import hashlib
import os
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from services.ultravisor.migration.certificates import Digest, PublicKey
from services.ultravisor.migration.handshake import Host, Session, Subject
from services.ultravisor.migration.refusals import MigrationRefused, Reason

VERSION = 1
MAX_HEAD_BYTES = 16 << 10
_DIGEST_PREFIX = b"pefbox snapshot head 1\0"
_RECORDS, _ANSWERS = b"pefbox snapshot records 1\0", b"pefbox snapshot answers 1\0"
_RANDOM_BYTES = 32
_KEY_BYTES = 32
"""AES-256: a file may be attacked for longer than a stream is secret."""


class Head(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """`identity` is the key of the ultravisor that took it; `incarnation` and `debuggable` are of the VM then."""

    version: Annotated[int, Meta(ge=0, lt=1 << 16)]
    random: Digest
    identity: PublicKey
    subject: Subject
    incarnation: Annotated[int, Meta(ge=0, lt=1 << 32)]
    debuggable: bool


def new_head(host: Host, subject: Subject, incarnation: int, *, debuggable: bool) -> bytes:
    """The head of a new snapshot."""
    head = Head(VERSION, os.urandom(_RANDOM_BYTES), host.certificate.identity, subject, incarnation, debuggable)
    return msgspec.msgpack.encode(head)


def read_head(raw: bytes, host: Host) -> Head:
    """The head of a snapshot of this host; nobody has said that it is genuine. Raises MigrationRefused."""
    try:
        head = msgspec.msgpack.decode(raw, type=Head)
    except DECODE_ERRORS as error:
        raise MigrationRefused(Reason.MALFORMED, f"the head of the snapshot: {error}") from None
    if head.version != VERSION:
        raise MigrationRefused(Reason.SNAPSHOT_VERSION, f"{head.version}, here it is {VERSION}")
    if head.identity != host.certificate.identity:
        raise MigrationRefused(Reason.ELSEWHERE)
    return head


def session_to_save(raw: bytes, host: Host) -> Session:
    """What seals the records of the snapshot with this head."""
    head, session_id = read_head(raw, host), snapshot_id(raw)
    records, answers = (_key(host, head, session_id, purpose) for purpose in (_RECORDS, _ANSWERS))
    return Session(session_id, head.subject, host.certificate, records, answers)


def session_to_restore(raw: bytes, host: Host) -> Session:
    """What opens them. Raises MigrationRefused."""
    saved = session_to_save(raw, host)
    return Session(saved.session_id, saved.subject, saved.peer, saved.receive_key, saved.send_key)


def snapshot_id(raw: bytes) -> bytes:
    """How the snapshot with this head is called."""
    return hashlib.sha256(_DIGEST_PREFIX + raw).digest()


def _key(host: Host, head: Head, session_id: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), _KEY_BYTES, salt=head.random, info=purpose + session_id).derive(
        host.identity.private_bytes_raw()
    )
