"""Images of secure pages that leave for normal memory: AES-128-GCM under a key of the VM.

The image is exactly as long as the page; initialisation vector and tag stay here, per GFN, and only for the newest
image. VM and GFN are associated data. So an image that was altered, moved to another GFN or VM, or replaced by an
older one is refused (S3). The vector is 4 random bytes and a 64-bit counter, so it never repeats under a key.

Source: open-power/ultravisor `svm/svm-crypto.c` (which binds no associated data; ours does, on purpose).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.geometry import PAGE_BYTES

_TAG_BYTES = 16
_KEY_BITS = 128
_ZEROS = bytes(PAGE_BYTES)


class _Proof(NamedTuple):
    vector: bytes
    tag: bytes


class PageSealer:
    """Makes and checks page images of one secure VM; the key never leaves this object."""

    def __init__(self, lpid: int, incarnation: int) -> None:
        self._aead = AESGCM(AESGCM.generate_key(_KEY_BITS))
        self._fixed = os.urandom(4)
        self._counter = 0
        self._identity = lpid.to_bytes(8, "big") + incarnation.to_bytes(8, "big")
        self._proofs: dict[int, _Proof] = {}
        self._scratch = bytearray(PAGE_BYTES + _TAG_BYTES)
        self._scratch_page = memoryview(self._scratch)[:PAGE_BYTES]

    def seal(self, gfn: int, page: memoryview) -> memoryview:
        """The image of `page` (64 KiB). It stays valid until the next call; older images of `gfn` do not."""
        self._counter += 1
        vector = self._fixed + self._counter.to_bytes(8, "big")
        self._aead.encrypt_into(vector, page, self._associated(gfn), self._scratch)
        self._proofs[gfn] = _Proof(vector, bytes(self._scratch[PAGE_BYTES:]))
        return self._scratch_page

    def open(self, gfn: int, image: bytearray, page: memoryview) -> bool:
        """Put the content of `image` (PAGE_BYTES, with room for a tag behind) into `page`; False when refused.

        The cipher writes before it has checked, so nobody else may reach `page` meanwhile. A refused image leaves it
        zeroed, and what is known of `gfn` as it was: the right image may come yet.
        """
        proof = self._proofs.get(gfn)
        if proof is None:
            return False
        image[PAGE_BYTES:] = proof.tag
        try:
            self._aead.decrypt_into(proof.vector, image, self._associated(gfn), page)
        except InvalidTag:
            page[:] = _ZEROS
            return False
        del self._proofs[gfn]
        return True

    def forget(self, gfn: int) -> None:
        """No image of `gfn` is good any more."""
        self._proofs.pop(gfn, None)

    def _associated(self, gfn: int) -> bytes:
        return self._identity + gfn.to_bytes(8, "big")
