"""Floor of `page_move`: what the cipher and the copies of a page cost, and nothing else.

A page goes out by an AES-128-GCM encryption and a copy into its frame, and in by a copy out of the frame and a
decryption. Both sides are touched memory, as large as what the figure moves.
"""

from __future__ import annotations

import mmap
import os
import time

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PAGE_BYTES = 1 << 16
TAG_BYTES = 16


class PageFloor:
    """`n_pages` secure pages and as many frames, all touched."""

    def __init__(self, n_pages: int) -> None:
        self._n_pages = n_pages
        self._secure = _touched(n_pages * PAGE_BYTES)
        self._frames = _touched(n_pages * PAGE_BYTES)
        self._aead = AESGCM(AESGCM.generate_key(128))

    def seconds(self) -> float:
        """How long all pages take out, and then in again."""
        secure, frames, aead = memoryview(self._secure), memoryview(self._frames), self._aead
        image = bytearray(PAGE_BYTES + TAG_BYTES)
        text = memoryview(image)[:PAGE_BYTES]
        tags = []
        started = time.perf_counter()
        for page in range(self._n_pages):
            place = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
            aead.encrypt_into(page.to_bytes(12, "big"), secure[place], None, image)
            tags.append(bytes(image[PAGE_BYTES:]))
            frames[place] = text
        for page in range(self._n_pages):
            place = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
            text[:] = frames[place]
            image[PAGE_BYTES:] = tags[page]
            aead.decrypt_into(page.to_bytes(12, "big"), image, None, secure[place])
        return time.perf_counter() - started


def _touched(n_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, n_bytes)
    block = os.urandom(1 << 20)
    for start in range(0, n_bytes, len(block)):
        memory[start : start + len(block)] = block
    return memory
