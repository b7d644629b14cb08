"""The cryptography of the ESM blob: the wrapped key, sealed parts, key fingerprints.

Source: open-power/svm-tools `svm_tool/esm/esm.py`: RSA-OAEP with SHA-256 for hash and mask, AES-256-GCM without
associated data, fingerprints over the bytes of the PEM file.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.errors import ImageRefused
from shared.esm_blob import IV_BYTES, MAC_BYTES, Sealed

SYMKEY_BYTES = 32
WRAPPING_KEY_BITS = 2048

_OAEP = padding.OAEP(mgf=padding.MGF1(algorithm=hashes.SHA256()), algorithm=hashes.SHA256(), label=None)


def new_symkey() -> bytes:
    """A fresh key of a blob."""
    return os.urandom(SYMKEY_BYTES)


def seal(symkey: bytes, plain: bytes, comment: str = "") -> Sealed:
    """`plain` encrypted and authenticated under a fresh iv."""
    iv = os.urandom(IV_BYTES)
    out = AESGCM(symkey).encrypt(iv, plain, None)
    return Sealed(iv, out[-MAC_BYTES:], out[:-MAC_BYTES], comment)


def unseal(symkey: bytes, sealed: Sealed, what: str) -> bytes:
    """The plain bytes; raises ImageRefused naming `what` when key, iv, mac and ciphertext do not fit together."""
    try:
        return AESGCM(symkey).decrypt(sealed.iv, sealed.ciphertext + sealed.mac, None)
    except (InvalidTag, ValueError):
        raise ImageRefused(f"{what}: the authentication tag does not fit") from None


def wrap(public_key: rsa.RSAPublicKey, symkey: bytes) -> bytes:
    """`symkey` for the holder of the private key."""
    return public_key.encrypt(symkey, _OAEP)


def unwrap(private_key: rsa.RSAPrivateKey, encrypted: bytes) -> bytes | None:
    """The key in a lockbox, or None when it is not for this private key. Every failure looks the same."""
    if len(encrypted) * 8 != private_key.key_size:
        return None
    try:
        symkey = private_key.decrypt(encrypted, _OAEP)
    except ValueError:
        return None
    return symkey if len(symkey) == SYMKEY_BYTES else None


def fingerprint(public_pem: bytes) -> bytes:
    """What a lockbox names its key by: SHA-256 of the PEM file's bytes."""
    return hashlib.sha256(public_pem).digest()


def public_pem(key: rsa.RSAPrivateKey | rsa.RSAPublicKey) -> bytes:
    """The public key as svm-tool takes and fingerprints it: SubjectPublicKeyInfo PEM, one newline at the end."""
    public = key.public_key() if isinstance(key, rsa.RSAPrivateKey) else key
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public_key(pem: bytes) -> rsa.RSAPublicKey:
    """An RSA-2048 public key; raises ValueError with the reason for anything else."""
    if b"PRIVATE KEY" in pem:
        raise ValueError("is a private key; the public one is wanted")
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is no public key in PEM form") from None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != WRAPPING_KEY_BITS:
        raise ValueError(f"is no RSA key of {WRAPPING_KEY_BITS} bits")
    return key


def load_private_key(pem: bytes, passphrase: bytes | None = None) -> rsa.RSAPrivateKey:
    """An RSA-2048 private key; raises PassphraseNeeded, or ValueError with the reason for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError:
        if passphrase is None:
            raise PassphraseNeeded("is protected by a passphrase") from None
        return load_private_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        if passphrase is not None:
            raise ValueError("is no private key in PEM form, or the passphrase is wrong") from None
        raise ValueError("is no private key in PEM form") from None
    return _wrapping_key(key)


def load_machine_key(pem: bytes) -> rsa.RSAPrivateKey:
    """As `load_private_key`, of a machine's own key file.

    Its primes are not tested, which takes as long as a tenth of a process's start: who could alter the file could as
    well replace it, and a damaged key opens no lockbox.
    """
    try:
        key = serialization.load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        raise ValueError("is no private key in PEM form") from None
    return _wrapping_key(key)


def _wrapping_key(key: object) -> rsa.RSAPrivateKey:
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size != WRAPPING_KEY_BITS:
        raise ValueError(f"is no RSA key of {WRAPPING_KEY_BITS} bits")
    return key


class PassphraseNeeded(ValueError):
    """The private key is encrypted and no passphrase was given."""
