"""What the records hold: pages, and at the end what makes sure that nothing is missing.

Pages are a batch as `shared.page_batch` lays it out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.geometry import MAX_VM_BYTES, PAGE_SHIFT
from services.ultravisor.migration.certificates import Digest
from services.ultravisor.migration.refusals import MigrationRefused, Reason
from services.ultravisor.page_state import GfnState
from shared.page_batch import Page, decode_pages

MAX_STATE_BYTES = 16 << 20
"""Of everything that is not a page."""
MAX_FINAL_PAGES = 1 << 20
"""The last record has a byte a frame: a VM of 64 GiB."""

ARRIVES_AS = {
    GfnState.SECURE: GfnState.SECURE,
    GfnState.PAGED_OUT: GfnState.SECURE,
    GfnState.SHARED: GfnState.SHARED_INV,
    GfnState.SHARED_INV: GfnState.SHARED_INV,
    GfnState.SHARED_IMPLICIT: GfnState.SHARED_IMPLICIT_INV,
    GfnState.SHARED_IMPLICIT_INV: GfnState.SHARED_IMPLICIT_INV,
    GfnState.PSEUDO_SHARED: GfnState.PSEUDO_SHARED_INV,
    GfnState.PSEUDO_SHARED_INV: GfnState.PSEUDO_SHARED_INV,
}
"""Of a frame in each state that is no transient one: its state where it arrives.

An image that the hypervisor holds is not needed, as the secure frame was kept. No hypervisor has given its frame there:
the first touch asks it, as after UV_PAGE_INVAL.
"""
ARRIVING = frozenset(ARRIVES_AS.values())
PRIVATE = frozenset({GfnState.SECURE, GfnState.PSEUDO_SHARED_INV})
"""Of these, those of a frame whose content is in secure memory and so comes in records."""


class Final(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The last record: `states`, a GfnState a frame, and what proves that pages and state came whole and newest."""

    states: Annotated[bytes, Meta(max_length=MAX_VM_BYTES >> PAGE_SHIFT)]
    versions: Digest
    n_state_bytes: Annotated[int, Meta(ge=0, le=MAX_STATE_BYTES)]
    state: Digest


def pages_of(payload: bytes | memoryview, page_bytes: int) -> Iterator[Page]:
    """The pages of a PAGES record; raises MigrationRefused when it is none."""
    try:
        yield from decode_pages(payload, page_bytes)
    except MalformedMessage as error:
        raise MigrationRefused(Reason.MALFORMED, str(error)) from None


def decode_final(payload: bytes | memoryview) -> Final:
    """The Final of a payload; raises MigrationRefused."""
    try:
        return msgspec.msgpack.decode(payload, type=Final)
    except DECODE_ERRORS as error:
        raise MigrationRefused(Reason.MALFORMED, f"the last record: {error}") from None


class PageVersions:
    """In which epoch each page was last in a record: the same on both sides, or a page is missing or old."""

    def __init__(self, n_pages: int) -> None:
        self._epochs = array("I", bytes(4 * n_pages))

    def __len__(self) -> int:
        return len(self._epochs)

    def came(self, gfn: int, epoch: int) -> None:
        """`gfn` was in a record of `epoch`."""
        self._epochs[gfn] = epoch + 1

    def missing(self, gfns: Iterable[int]) -> list[int]:
        """Those of `gfns` that never were in a record."""
        return [gfn for gfn in gfns if not self._epochs[gfn]]

    def digest(self, states: bytes) -> bytes:
        """SHA-256 over the epochs of the pages that `states` says are private; the others count as never sent."""
        epochs = array(
            "I", (epoch if state in _PRIVATE else 0 for epoch, state in zip(self._epochs, states, strict=True))
        )
        return hashlib.sha256(epochs.tobytes()).digest()


_PRIVATE = frozenset(int(state) for state in PRIVATE)
