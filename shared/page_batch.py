"""Pages as a migration sends them, plain or before they are sealed: which GFNs, which of them are zero, the contents.

Layout, little-endian: count u16, for each page its GFN u32 and PageKind u8, then the content of those that are not
zero, in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from enum import IntEnum
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from protocol.errors import MalformedMessage

MAX_PAGES = 4096
"""In one batch."""
_COUNT = Struct("<H")
_ENTRY = Struct("<IB")
_FIRST_BYTES = 64


class PageKind(IntEnum):
    """How a page comes."""

    ZERO = 0
    DATA = 1


class Page(NamedTuple):
    """A page of a batch; `content` is empty for a page of zeros."""

    gfn: int
    content: bytes | memoryview

    @classmethod
    def of(cls, gfn: int, content: memoryview) -> Page:
        """The page with this content, all of it; `content` is not copied."""
        return cls(gfn, b"" if _is_zero(content) else content)


def encode_pages(pages: Sequence[Page]) -> list[bytes | memoryview]:
    """The batch of at most MAX_PAGES pages, in parts: who sends them copies each page once, when it joins them."""
    head = [_COUNT.pack(len(pages))]
    head += [_ENTRY.pack(page.gfn, PageKind.DATA if page.content else PageKind.ZERO) for page in pages]
    return [b"".join(head), *(page.content for page in pages if page.content)]


def decode_pages(payload: bytes | memoryview, page_bytes: int) -> Iterator[Page]:
    """The pages of a batch; raises MalformedMessage when it is none. GFNs may be any."""
    try:
        (n_pages,) = _COUNT.unpack_from(payload)
        entries = [_ENTRY.unpack_from(payload, _COUNT.size + i * _ENTRY.size) for i in range(n_pages)]
    except StructError as error:
        raise MalformedMessage(f"a batch of pages: {error}") from None
    at = _COUNT.size + n_pages * _ENTRY.size
    n_data = sum(kind == PageKind.DATA for _, kind in entries)
    known = all(kind in (PageKind.DATA, PageKind.ZERO) for _, kind in entries)
    if not known or len(payload) != at + n_data * page_bytes:
        raise MalformedMessage("a batch of pages of another length than it says")
    whole = memoryview(payload)
    for gfn, kind in entries:
        n_bytes = page_bytes if kind == PageKind.DATA else 0
        yield Page(gfn, whole[at : at + n_bytes])
        at += n_bytes


def _is_zero(content: memoryview) -> bool:
    # Two comparisons of memory, the first of which nearly all other pages fail; `any` would look at each byte alone.
    first = bytes(content[:_FIRST_BYTES])
    return first == _zeros(len(first)) and bytes(content) == _zeros(len(content))


@functools.cache
def _zeros(n_bytes: int) -> bytes:
    return bytes(n_bytes)
