"""Who a host is: an identity key, signed for by a root that its owner or vendor keeps.

A certificate is MessagePack, and what is signed is the certificate without its signature behind a fixed prefix, so no
signature made for another purpose fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from services.ultravisor.migration.refusals import MigrationRefused, Reason

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
DIGEST_BYTES = 32
MAX_NAME_CHARS = 64
NEVER = 0
"""`expires` of a certificate that does not expire."""

PublicKey = Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]

_PREFIX = b"pefbox host certificate 1\0"


class HostCertificate(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """`root` says that `identity` is the key of `host`; `expires` in seconds since the epoch, or NEVER."""

    host: Name
    identity: PublicKey
    root: PublicKey
    expires: Annotated[int, Meta(ge=0, lt=1 << 62)]
    signature: Signature

    def signed(self) -> bytes:
        """What the root signs."""
        return _PREFIX + msgspec.msgpack.encode([self.host, self.identity, self.root, self.expires])


def issue(root: Ed25519PrivateKey, host: str, identity: bytes, expires: int = NEVER) -> HostCertificate:
    """A certificate for the public key `identity` of `host`."""
    unsigned = HostCertificate(host, identity, root.public_key().public_bytes_raw(), expires, bytes(SIGNATURE_BYTES))
    return msgspec.structs.replace(unsigned, signature=root.sign(unsigned.signed()))


@dataclass(frozen=True, slots=True)
class Trust:
    """What a host believes: public keys of roots, revoked identities, measurements (empty: any) of ultravisors."""

    roots: frozenset[bytes]
    revoked: frozenset[bytes] = frozenset()
    measurements: frozenset[bytes] = frozenset()

    def check(self, certificate: HostCertificate, measurement: bytes, now: float) -> None:
        """Raise MigrationRefused unless `certificate` holds at `now` (seconds since the epoch)."""
        host = certificate.host
        if certificate.root not in self.roots:
            raise MigrationRefused(Reason.UNTRUSTED_ROOT, host)
        if not verifies(certificate.root, certificate.signature, certificate.signed()):
            raise MigrationRefused(Reason.BAD_CERTIFICATE, host)
        if certificate.identity in self.revoked:
            raise MigrationRefused(Reason.REVOKED, host)
        if certificate.expires != NEVER and certificate.expires <= now:
            raise MigrationRefused(Reason.EXPIRED, host)
        if self.measurements and measurement not in self.measurements:
            raise MigrationRefused(Reason.UNKNOWN_MEASUREMENT, f"{host}: {measurement.hex()}")


def verifies(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is of the Ed25519 key `public_key` over `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
