"""The machine keys of a host's ultravisor.

Two keys a host, in the cluster's state directory: `HOST/machine-key.pem`, RSA-2048, for which blobs wrap their key
(on POWER9 the TPM holds it), and `HOST/identity-key.pem`, Ed25519, by which ultravisors know each other. The launcher
makes them at the first start and hands them over as PEM text; the ultravisor itself opens no file.
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
from shared.esm_crypto import WRAPPING_KEY_BITS, fingerprint, load_private_key, public_pem

MACHINE_KEY = "machine-key"
IDENTITY_KEY = "identity-key"


@dataclass(frozen=True, slots=True)
class MachineIdentity:
    """The loaded keys; `repr` shows neither."""

    machine_key: RSAPrivateKey = field(repr=False)
    identity_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def from_pems(cls, pems: Mapping[str, str]) -> MachineIdentity:
        """The keys from what `ensure_keys` returned; raises HostFault when one is missing or is no such key."""
        try:
            machine_key = load_private_key(pems[MACHINE_KEY].encode())
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
    directory = _host_dir(state_dir, host)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot make the directory for the machine keys: {error.strerror}") from None
    return {
        MACHINE_KEY: _ensure(directory / f"{MACHINE_KEY}.pem", _new_machine_key),
        IDENTITY_KEY: _ensure(directory / f"{IDENTITY_KEY}.pem", _new_identity_key),
    }


def read_machine_key(path: Path) -> RSAPrivateKey:
    """The machine key in a file; raises UserError."""
    text = _read_private(path)
    try:
        return load_private_key(text.encode())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def public_key_of(state_dir: Path, host: str) -> bytes:
    """The public machine key of a host as PEM; raises UserError when the host has none."""
    path = _host_dir(state_dir, host) / f"{MACHINE_KEY}.pem"
    if not path.exists():
        known = sorted(found.parent.name for found in state_dir.glob(f"*/{MACHINE_KEY}.pem"))
        hint = f"hosts with one: {', '.join(known)}" if known else "keys are made when a cluster first starts"
        raise UserError(f"{state_dir}: no machine key of host {host!r}; {hint}")
    return public_pem(read_machine_key(path))


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
