"""Keys for one migration, agreed through a stream that neither side trusts.

    source       -> destination   offer    ephemeral X25519 key, certificate, what would come
    destination  -> source        answer   ephemeral X25519 key, certificate, signature over offer and answer
    source       -> destination   confirm  signature over offer and answer

Each signature is made by the identity key of the certificate, with the signer's side in what is signed. The keys of
both directions and the name of the migration are derived from the X25519 secret and the digest of offer and answer;
both ephemeral keys are new, so no two migrations have a key or a name in common. The source sends no page and no
state of the VM before it has checked the answer; the offer itself tells everybody its name, size and policy.

Source: Krawczyk, "SIGMA: the 'SIGn-and-MAc' approach" (2003); RFC 7748 (X25519), RFC 8032 (Ed25519), RFC 5869 (HKDF).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from protocol.geometry import MAX_VM_BYTES, PAGE_SHIFT
from services.ultravisor.migration.certificates import (
    Digest,
    HostCertificate,
    Name,
    PublicKey,
    Signature,
    Trust,
    verifies,
)
from services.ultravisor.migration.policy import MigrationPolicy
from services.ultravisor.migration.refusals import MigrationRefused, Reason

VERSION = 2
MAX_HANDSHAKE_BYTES = 16 << 10
KEY_BYTES = 16
"""AES-128: what X25519 agrees on withstands as much."""
_SIGNED = b"pefbox migration handshake 1\0"
_SOURCE, _DESTINATION = b"source\0", b"destination\0"

StructT = TypeVar("StructT", bound=msgspec.Struct)


class Subject(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The secure VM that would come: its name, partition, frames, and the policy that it brings."""

    vm: Name
    lpid: Annotated[int, Meta(ge=1, lt=1 << 32)]
    n_pages: Annotated[int, Meta(ge=1, le=MAX_VM_BYTES >> PAGE_SHIFT)]
    policy: MigrationPolicy


class Offer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The source's first word."""

    version: Annotated[int, Meta(ge=0, lt=1 << 16)]
    ephemeral: PublicKey
    certificate: HostCertificate
    measurement: Digest
    subject: Subject


class Answer(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The destination's. `signature` is over the digest of the offer and of this without the signature."""

    version: Annotated[int, Meta(ge=0, lt=1 << 16)]
    ephemeral: PublicKey
    certificate: HostCertificate
    measurement: Digest
    debuggable: bool
    signature: Signature


@dataclass(frozen=True, slots=True)
class Session:
    """One migration, as one side sees it. `send_key` and `receive_key` are secret."""

    session_id: bytes
    subject: Subject
    peer: HostCertificate
    send_key: bytes = field(repr=False)
    receive_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Host:
    """What one ultravisor brings to a handshake. `now` gives seconds since the epoch."""

    identity: Ed25519PrivateKey = field(repr=False)
    certificate: HostCertificate
    measurement: bytes
    trust: Trust
    now: Callable[[], float]
    debuggable: bool = False


class SourceHandshake:
    """The source's side: `offer`, then `take_answer`, once each."""

    def __init__(self, host: Host, subject: Subject) -> None:
        self._host, self._subject = host, subject
        self._ephemeral = X25519PrivateKey.generate()
        self._taken = False
        self.offer = msgspec.msgpack.encode(
            Offer(VERSION, _public(self._ephemeral), host.certificate, host.measurement, subject)
        )
        """The message to send."""

    def take_answer(self, raw: bytes) -> tuple[Session, bytes]:
        """The session, and the confirmation to send; raises MigrationRefused."""
        host = self._host
        answer = _decode(raw, Answer)
        _check_version(answer.version)
        host.trust.check(answer.certificate, answer.measurement, host.now())
        digest = _digest(self.offer, answer)
        _check_signature(answer.certificate, answer.signature, _DESTINATION + digest)
        self._subject.policy.check(answer.certificate, debuggable=answer.debuggable)
        # Keys of the same session twice would be the same nonces twice.
        if self._taken:
            raise MigrationRefused(Reason.WRONG_PHASE, "an answer was taken already")
        self._taken = True
        to_destination, to_source = _derive(self._ephemeral, answer.ephemeral, digest)
        session = Session(_session_id(digest), self._subject, answer.certificate, to_destination, to_source)
        return session, host.identity.sign(_SIGNED + _SOURCE + digest)


class DestinationHandshake:
    """The destination's side: made of an offer that was found good; `answer`, then `take_confirm`.

    Raises MigrationRefused.
    """

    def __init__(self, host: Host, raw_offer: bytes) -> None:
        offer = _decode(raw_offer, Offer)
        _check_version(offer.version)
        host.trust.check(offer.certificate, offer.measurement, host.now())
        offer.subject.policy.check(host.certificate, debuggable=host.debuggable)
        ephemeral = X25519PrivateKey.generate()
        unsigned = Answer(VERSION, _public(ephemeral), host.certificate, host.measurement, host.debuggable, bytes(64))
        digest = _digest(raw_offer, unsigned)
        to_destination, to_source = _derive(ephemeral, offer.ephemeral, digest)
        self._digest = digest
        self._taken = False
        self._session = Session(_session_id(digest), offer.subject, offer.certificate, to_source, to_destination)
        signature = host.identity.sign(_SIGNED + _DESTINATION + digest)
        self.answer = msgspec.msgpack.encode(msgspec.structs.replace(unsigned, signature=signature))
        """The message to send."""

    @property
    def session_id(self) -> bytes:
        """The name of the migration, which both sides know from the answer on."""
        return self._session.session_id

    @property
    def subject(self) -> Subject:
        """What the source says would come; nobody vouches for it before `take_confirm`."""
        return self._session.subject

    def take_confirm(self, raw: bytes) -> Session:
        """The session; raises MigrationRefused unless the offer was of the host that its certificate names."""
        _check_signature(self._session.peer, raw, _SOURCE + self._digest)
        if self._taken:
            raise MigrationRefused(Reason.WRONG_PHASE, "a confirmation was taken already")
        self._taken = True
        return self._session


def _decode(raw: bytes, kind: type[StructT]) -> StructT:
    if len(raw) > MAX_HANDSHAKE_BYTES:
        raise MigrationRefused(Reason.MALFORMED, f"{len(raw)} bytes of handshake")
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except DECODE_ERRORS as error:
        raise MigrationRefused(Reason.MALFORMED, str(error)) from None


def _check_version(version: int) -> None:
    if version != VERSION:
        raise MigrationRefused(Reason.OTHER_VERSION, f"{version}, here {VERSION}")


def _check_signature(certificate: HostCertificate, signature: bytes, what: bytes) -> None:
    if not verifies(certificate.identity, signature, _SIGNED + what):
        raise MigrationRefused(Reason.BAD_SIGNATURE, certificate.host)


def _digest(raw_offer: bytes, answer: Answer) -> bytes:
    """Of both messages as they are, the answer without its signature."""
    unsigned = msgspec.structs.replace(answer, signature=bytes(64))
    raw_answer = msgspec.msgpack.encode(unsigned)
    return hashlib.sha256(hashlib.sha256(raw_offer).digest() + hashlib.sha256(raw_answer).digest()).digest()


def _session_id(digest: bytes) -> bytes:
    return hashlib.sha256(b"pefbox migration session 1\0" + digest).digest()


def _derive(mine: X25519PrivateKey, peer: bytes, digest: bytes) -> tuple[bytes, bytes]:
    """The keys of what goes to the destination and of what goes to the source."""
    try:
        secret = mine.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise MigrationRefused(Reason.MALFORMED, "an ephemeral key that leads nowhere") from None
    both = HKDF(SHA256(), 2 * KEY_BYTES, salt=digest, info=b"pefbox migration keys 2").derive(secret)
    return both[:KEY_BYTES], both[KEY_BYTES:]


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()
