"""The machine keys of a host's ultravisor.

Two keys a host, in the cluster's state directory: `HOST/machine-key.pem`, RSA-2048, for which blobs wrap their key
(on POWER9 the TPM holds it), and `HOST/identity-key.pem`, Ed25519, by which ultravisors know each other. The launcher
makes them at the first start and hands them over as PEM text; the ultravisor itself opens no file. The state directory
also holds the roots, Ed25519, that sign for identity keys: `migration-root.pem` of the owner, `migration-root-NAME.pem`
of others. A root's key goes to no process at all.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from protocol.errors import HostFault, UserError
from shared.esm_crypto import WRAPPING_KEY_BITS, fingerprint, load_machine_key, public_pem

MACHINE_KEY = "machine-key"
IDENTITY_KEY = "identity-key"
ROOT_KEY = "migration-root"
CERTIFICATE, ROOTS, REVOKED = "migration-certificate", "migration-roots", "migration-revoked"
"""Names in `Keys.identity` beside those of the keys: hex of MessagePack, and hex of public keys between commas."""
OWNER = "owner"
"""The root of every host that names no other."""


@dataclass(frozen=True, slots=True)
class MachineIdentity:
    """The loaded keys; `repr` shows neither."""

    machine_key: RSAPrivateKey = field(repr=False)
    identity_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def from_pems(cls, pems: Mapping[str, str]) -> MachineIdentity:
        """The keys from what `ensure_keys` returned; raises HostFault when one is missing or is no such key."""
        try:
            machine_key = load_machine_key(pems[MACHINE_KEY].encode())
            identity_key = serialization.load_pem_private_key(pems[IDENTITY_KEY].encode(), None)
        except (KeyError, ValueError, TypeError):
            raise HostFault("the ultravisor's machine keys are missing or damaged") from None
        if not isinstance(identity_key, Ed25519PrivateKey):
            raise HostFault("the ultravisor's identity key is no Ed25519 key")
        return cls(machine_key, identity_key)

    @property
    def public_pem(self) -> bytes:
        """The public machine key as svm-tool takes it."""
        return public_pem(self.machine_key)

    @property
    def fingerprint(self) -> str:
        """How lockboxes name the machine key, in hex."""
        return fingerprint(self.public_pem).hex()

    @property
    def identity_public(self) -> bytes:
        """The public identity key, 32 raw bytes."""
        return self.identity_key.public_key().public_bytes_raw()


def ensure_keys(state_dir: Path, host: str) -> dict[str, str]:
    """The host's keys as PEM text by name, made when the host has none yet (`Keys.identity` of its ultravisor).

    Two launchers that start at once get the same keys. Raises UserError when a file cannot be made or read, is no
    key, or others may read it.
    """
    directory = _make_dir(_host_dir(state_dir, host))
    return {
        MACHINE_KEY: _ensure(directory / f"{MACHINE_KEY}.pem", _new_machine_key),
        IDENTITY_KEY: _ensure(directory / f"{IDENTITY_KEY}.pem", _new_identity_key),
    }


def ensure_identity(state_dir: Path, host: str) -> Ed25519PrivateKey:
    """The host's identity key, made when it has none yet; raises UserError."""
    path = _make_dir(_host_dir(state_dir, host)) / f"{IDENTITY_KEY}.pem"
    return _ed25519(path, _ensure(path, _new_identity_key))


def ensure_root(state_dir: Path, name: str) -> Ed25519PrivateKey:
    """The key of the root `name`, made when there is none yet; raises UserError."""
    path = root_path(state_dir, name)
    _make_dir(path.parent)
    return _ed25519(path, _ensure(path, _new_identity_key))


def root_path(state_dir: Path, name: str) -> Path:
    """Where the key of a root lies; raises UserError for what cannot name one."""
    if not name or "/" in name or "\0" in name:
        raise UserError(f"{name!r} is no name of a root")
    return state_dir / (f"{ROOT_KEY}.pem" if name == OWNER else f"{ROOT_KEY}-{name}.pem")


def read_machine_key(path: Path) -> RSAPrivateKey:
    """The machine key in a file; raises UserError."""
    text = _read_private(path)
    try:
        return load_machine_key(text.encode())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def public_key_of(state_dir: Path, host: str) -> bytes:
    """The public machine key of a host as PEM; raises UserError when the host has none."""
    return public_pem(read_machine_key(_existing(state_dir, host, MACHINE_KEY)))


def identity_public_of(state_dir: Path, host: str) -> bytes:
    """The public identity key of a host, 32 raw bytes; raises UserError when the host has none."""
    path = _existing(state_dir, host, IDENTITY_KEY)
    return _ed25519(path, _read_private(path)).public_key().public_bytes_raw()


def _existing(state_dir: Path, host: str, key: str) -> Path:
    path = _host_dir(state_dir, host) / f"{key}.pem"
    if not path.exists():
        known = sorted(found.parent.name for found in state_dir.glob(f"*/{key}.pem"))
        hint = f"hosts with one: {', '.join(known)}" if known else "keys are made when a cluster first starts"
        raise UserError(f"{state_dir}: no {key.replace('-', ' ')} of host {host!r}; {hint}")
    return path


def _make_dir(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot make the directory for the machine keys: {error.strerror}") from None
    return directory


def _ed25519(path: Path, pem: str) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError):
        raise UserError(f"{path}: is no private key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path}: is no Ed25519 key")
    return key


def _host_dir(state_dir: Path, host: str) -> Path:
    if not host or host.startswith(".") or "/" in host or "\0" in host:
        raise UserError(f"{host!r} is no name of a host")
    return state_dir / host


def _ensure(path: Path, make: Callable[[], bytes]) -> str:
    if not path.exists():
        try:
            _write_once(path, make())
        except OSError as error:
            raise UserError(f"{path}: cannot write the key: {error.strerror}") from None
    return _read_private(path)


def _write_once(path: Path, content: bytes) -> None:
    # Written whole beside its place, then linked: a link never replaces a key that another launcher just made,
    # and a crash leaves no half key.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary)


def _read_private(path: Path) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{path}: cannot read the key: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
        raise UserError(f"{path}: others may read this key; make it `chmod 600`")
    return content.decode("ascii", "replace")


def _new_machine_key() -> bytes:
    return _private_pem(generate_private_key(public_exponent=65537, key_size=WRAPPING_KEY_BITS))


def _new_identity_key() -> bytes:
    return _private_pem(Ed25519PrivateKey.generate())


def _private_pem(key: RSAPrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
