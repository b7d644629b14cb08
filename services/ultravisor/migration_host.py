"""What this ultravisor is to others: its identity with the certificate that its root signed, whom it trusts, its code.

The launcher hands over certificate and roots with the identity key (`deploy.identity_files`); the root's own key goes
to no process.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.decoding import DECODE_ERRORS
from protocol.errors import HostFault
from services.ultravisor.esm_files import EsmFiles
from services.ultravisor.identity import CERTIFICATE, REVOKED, ROOTS
from services.ultravisor.migration.certificates import PUBLIC_KEY_BYTES, HostCertificate, Trust
from services.ultravisor.migration.handshake import Host
from services.ultravisor.migration.policy import MigrationPolicy
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from shared.migration_policy import POLICY_FILE, PolicyFile

_SOURCES = Path(__file__).resolve().parent.parent.parent
_TRUSTED_CODE = ("services/ultravisor", "services/runtime", "shared", "protocol")


def policy_of(files: EsmFiles | None) -> MigrationPolicy:
    """Where the VM of these files may go: nowhere unless they say so. Raises MigrationRefused for unreadable ones."""
    raw = None if files is None else files.peek(POLICY_FILE)
    if raw is None:
        return MigrationPolicy()
    try:
        return _policy(msgspec.json.decode(raw, type=PolicyFile))
    except (*DECODE_ERRORS, ValueError) as error:
        raise MigrationRefused(Reason.POLICY, f"the file {POLICY_FILE} of its ESM blob: {error}") from None


def host_of(identity: Ed25519PrivateKey, pems: Mapping[str, str], *, debuggable: bool) -> Host | None:
    """This host for handshakes; None when the launcher gave no certificate. Raises HostFault for a damaged one."""
    if CERTIFICATE not in pems:
        return None
    try:
        certificate = msgspec.msgpack.decode(bytes.fromhex(pems[CERTIFICATE]), type=HostCertificate)
        trust = Trust(_keys(pems.get(ROOTS, "")), _keys(pems.get(REVOKED, "")))
    except (*DECODE_ERRORS, ValueError) as error:
        raise HostFault(f"the ultravisor's certificate or its trusted roots are damaged: {error}") from None
    if certificate.identity != identity.public_key().public_bytes_raw():
        raise HostFault("the ultravisor's certificate is for another key")
    return Host(identity, certificate, measurement(), trust, time.time, debuggable)


@functools.cache
def measurement() -> bytes:
    """SHA-256 over the sources of the ultravisor and of all that runs in its process; read while it starts."""
    digest = hashlib.sha256()
    for folder in _TRUSTED_CODE:
        for path in sorted((_SOURCES / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_SOURCES)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def _policy(file: PolicyFile) -> MigrationPolicy:
    """With raw keys; raises ValueError for what is no key."""
    roots = [bytes.fromhex(root) for root in file.roots]
    return msgspec.convert([file.may_migrate, roots, file.hosts, file.to_debuggable], MigrationPolicy)


def _keys(text: str) -> frozenset[bytes]:
    keys = frozenset(bytes.fromhex(part) for part in text.split(",") if part)
    if any(len(key) != PUBLIC_KEY_BYTES for key in keys):
        raise ValueError("a public key of another length")
    return keys
