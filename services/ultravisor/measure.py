"""The verification of a secure image at UV_ESM.

Pure functions over bytes: hashing 256 MiB and the RSA operations take long, so call them from a worker thread.
Every refusal is ImageRefused with the true reason, which is for the operator alone.

Departures from the public ultravisor, on purpose: every lockbox is tried, not only `lockbox-1`; a failed check
always refuses; all files are authenticated now and not when they are first read.
Source: open-power/ultravisor `svm/svm-esmb.c`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol.errors import ImageRefused
from services.ultravisor.esm_files import EsmFiles
from shared.esm_blob import Digests, EsmBlob, Lockbox, Sealed, parse_blob, parse_digests
from shared.esm_crypto import fingerprint, public_pem, unseal, unwrap
from shared.esm_digest import Buffer, SecureImage, digests_of


@dataclass(frozen=True, slots=True)
class OpenedBlob:
    """A blob that this machine could open and whose digests and files are authentic.

    `lockbox` names the lockbox that fitted. `digests.kernel_size_bytes` says how much from kernel base to measure.
    """

    lockbox: str
    digests: Digests
    file_names: tuple[str, ...]
    _symkey: bytes = field(repr=False)
    _files: dict[str, Sealed] = field(repr=False)

    def files(self) -> EsmFiles:
        """The files for UV_ESMB_GET_FILE, none of them read."""
        return EsmFiles.of_blob(self._symkey, self._files)


def open_blob(blob: Buffer, machine_key: RSAPrivateKey) -> OpenedBlob:
    """Open a blob with the machine's key and authenticate all that is sealed in it; raises ImageRefused."""
    parsed = parse_blob(blob)
    box, symkey, plain = _unlock(parsed, machine_key)
    digests = parse_digests(plain)
    if digests.kernel_size_bytes == 0:
        raise ImageRefused("digests: kernel-size is 0")
    for name, sealed in parsed.files.items():
        unseal(symkey, sealed, f"file {name}")
    return OpenedBlob(box.name, digests, tuple(parsed.files), symkey, dict(parsed.files))


def check_image(expected: Digests, image: SecureImage) -> None:
    """Compare what was found in the VM with the digests; raises ImageRefused naming every part that differs.

    `image.kernel` is exactly `expected.kernel_size_bytes` from kernel base, `image.initrd` what follows the blob's
    archive.
    """
    found = digests_of(image)
    reasons = [f"{part} digest differs" for part in _PARTS if getattr(found, part) != getattr(expected, part)]
    if found.kernel_size_bytes != expected.kernel_size_bytes:
        reasons.append(f"kernel size differs ({found.kernel_size_bytes}, not {expected.kernel_size_bytes} bytes)")
    if reasons:
        raise ImageRefused("; ".join(reasons))


def measure(blob: Buffer, machine_key: RSAPrivateKey, image: SecureImage) -> OpenedBlob:
    """Open the blob and check the image against it; raises ImageRefused."""
    opened = open_blob(blob, machine_key)
    check_image(opened.digests, image)
    return opened


_PARTS = ("rtas", "kernel", "initrd", "bootargs")


def _unlock(blob: EsmBlob, machine_key: RSAPrivateKey) -> tuple[Lockbox, bytes, bytes]:
    # A lockbox is not authenticated: anyone may add one that this machine can open, with a key of their own.
    # So the one that counts is the first whose key also opens the digests.
    opened_by: list[str] = []
    for box in _likely_first(blob.lockboxes, machine_key):
        symkey = unwrap(machine_key, box.encrypted_symkey)
        if symkey is None:
            continue
        opened_by.append(box.name)
        try:
            return box, symkey, unseal(symkey, blob.digests, "digests")
        except ImageRefused:
            continue
    if not opened_by:
        raise ImageRefused("no lockbox for this machine")
    raise ImageRefused(f"digests: the authentication tag does not fit the key in {', '.join(opened_by)}")


def _likely_first(lockboxes: tuple[Lockbox, ...], machine_key: RSAPrivateKey) -> Iterator[Lockbox]:
    # The fingerprint covers the bytes of a PEM file, which may differ for one key, so it only decides the order.
    mine = fingerprint(public_pem(machine_key))
    yield from (box for box in lockboxes if box.fingerprint == mine)
    yield from (box for box in lockboxes if box.fingerprint != mine)
