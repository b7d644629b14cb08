"""What an ESM blob measures: SHA-512 of RTAS, kernel, initial RAM disk and boot arguments.

Source: open-power/svm-tools `svm_tool/esm_digest/esm_digest.py`; open-power/ultravisor `svm/svm-esm.c` (RTAS).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from shared.esm_blob import Digests

Buffer = bytes | bytearray | memoryview
Image = Buffer | Iterable[Buffer]
"""A measured part: whole, or in pieces (pages) in order."""

RTAS_TEXT = bytes.fromhex("7c641b78 3c600000 6063f000 44000022 4e800020")
"""The RTAS code of SLOF: move the argument aside, load H_RTAS, `sc 1`, return."""


@dataclass(frozen=True, slots=True)
class SecureImage:
    """The four measured parts. `bootargs` is the value of /chosen/bootargs, with or without its final NUL."""

    rtas: Image
    kernel: Image
    initrd: Image
    bootargs: bytes


def digests_of(image: SecureImage) -> Digests:
    """The digests of an image. Hashes everything: belongs in a worker thread when the parts are large."""
    kernel, kernel_size_bytes = sha512_of(image.kernel)
    return Digests(
        rtas=sha512_of(image.rtas)[0],
        kernel=kernel,
        kernel_size_bytes=kernel_size_bytes,
        initrd=sha512_of(image.initrd)[0],
        # The blob's maker hashes the bare string; the device tree adds the terminator.
        bootargs=sha512_of(image.bootargs.removesuffix(b"\0"))[0],
    )


def sha512_of(image: Image) -> tuple[bytes, int]:
    """The SHA-512 of `image` and its size in bytes."""
    digest = hashlib.sha512()
    n_bytes = 0
    pieces = (image,) if isinstance(image, (bytes, bytearray, memoryview)) else image
    for piece in pieces:
        digest.update(piece)
        n_bytes += memoryview(piece).nbytes
    return digest.digest(), n_bytes
