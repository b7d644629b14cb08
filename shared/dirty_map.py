"""Dirty maps: a byte a GFN, set by whoever writes to a page (before it does), cleared by whoever wants to know.

The writer makes the file and goes on writing to it; the reader takes the marks and clears them:

    1 take(gfns)              the marked GFNs; their marks are cleared
    2 have the writer let go  an invalidation, acknowledged: no store that was marked before 1 is under way any more,
                              and the next one sets its mark again
    3 read the pages

Without step 2 a store that was marked before the mark was cleared could land after the page was read, and nobody would
look again. A writer that does not acknowledge gets its marks back (`put_back`): a page too many is read, none is lost.
A mark is any byte but 0. A hostile writer can call its own pages dirty or clean, and do nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

from shared.memfd import map_sealed


class DirtyMap:
    """Somebody else's dirty map of `n_pages`. Takes `fd`; raises HostFault for a file of another size or unsealed."""

    def __init__(self, fd: int, n_pages: int) -> None:
        self._mapping = map_sealed(fd, n_pages, writable=True)
        self.marks = memoryview(self._mapping)

    def take(self, gfns: range) -> list[int]:
        """The marked ones of `gfns`, ascending; they are clear now."""
        return take_marks(self.marks, gfns)

    def put_back(self, gfns: Iterable[int]) -> None:
        """Mark `gfns` again: what was taken could not be used."""
        put_marks(self.marks, gfns)

    def close(self) -> None:
        """Release the mapping."""
        self.marks.release()
        self._mapping.close()


def take_marks(marks: memoryview, gfns: range) -> list[int]:
    """As `DirtyMap.take`, for marks of one's own."""
    found = list(compress(gfns, bytes(marks[gfns.start : gfns.stop])))
    for gfn in found:
        marks[gfn] = 0
    return found


def put_marks(marks: memoryview, gfns: Iterable[int]) -> None:
    """As `DirtyMap.put_back`, for marks of one's own."""
    for gfn in gfns:
        marks[gfn] = 1
