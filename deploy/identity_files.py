"""What the ultravisor of a host is given to be known by others: its keys, its certificate, and whom it believes.

Roots sign for identity keys. Their own keys stay in the state directory: the launcher reads one at a start, to issue
the certificates, and gives it to no process.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from deploy.cluster_file import Cluster
from protocol.errors import UserError
from services.ultravisor.identity import CERTIFICATE, REVOKED, ROOTS, ensure_identity, ensure_keys, ensure_root
from services.ultravisor.migration.certificates import issue


def identity_of(cluster: Cluster, state_dir: Path, host: str) -> dict[str, str]:
    """`Keys.identity` of the ultravisor of `host`; keys that are missing are made. Raises UserError."""
    spec = cluster.host(host)
    assert spec is not None
    keys = ensure_keys(state_dir, host)
    identity = ensure_identity(state_dir, host).public_key().public_bytes_raw()
    certificate = issue(ensure_root(state_dir, spec.migration_root), host, identity)
    roots = [ensure_root(state_dir, name).public_key() for name in spec.trusted_roots]
    revoked = [ensure_identity(state_dir, name).public_key() for name in spec.revoked]
    return {
        **keys,
        CERTIFICATE: msgspec.msgpack.encode(certificate).hex(),
        ROOTS: ",".join(key.public_bytes_raw().hex() for key in roots),
        REVOKED: ",".join(key.public_bytes_raw().hex() for key in revoked),
    }


def open_ledger(path: Path) -> int:
    """A descriptor for the ultravisor's ledger of migrations, readable by its owner alone; raises UserError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{path}: cannot open the ledger of migrations: {error.strerror}") from None
