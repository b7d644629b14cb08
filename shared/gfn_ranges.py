"""Guest frame numbers as ranges, the form in which an invalidation names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from protocol.messages import MAX_INVALIDATION_RANGES, InvalidateBody, Range


def ranges_of(gfns: Iterable[int]) -> list[Range]:
    """The GFNs as ascending ranges without overlap."""
    ranges: list[Range] = []
    start = length = 0
    for gfn in sorted(set(gfns)):
        if length and gfn == start + length:
            length += 1
            continue
        if length:
            ranges.append(Range(start, length))
        start, length = gfn, 1
    if length:
        ranges.append(Range(start, length))
    return ranges


def runs_of(gfns: Iterable[int], longest: int) -> list[range]:
    """As `ranges_of`, each of at most `longest`."""
    return [
        range(first, min(first + longest, whole.gfn + whole.n))
        for whole in ranges_of(gfns)
        for first in range(whole.gfn, whole.gfn + whole.n, longest)
    ]


def invalidations_of(gfns: Iterable[int]) -> Iterator[InvalidateBody]:
    """The MAP_INVALIDATEs that name all `gfns`, each within its limit of ranges."""
    ranges = ranges_of(gfns)
    for first in range(0, len(ranges), MAX_INVALIDATION_RANGES):
        yield InvalidateBody(ranges[first : first + MAX_INVALIDATION_RANGES])
