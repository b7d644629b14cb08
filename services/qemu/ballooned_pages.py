"""Which 4 KiB pages are in a balloon, and which 64 KiB frames are in it whole.

A frame can be given back to the host only as a whole, while the driver names its pages one by one and in any order
(QEMU: `PartiallyBalloonedPage` in `hw/virtio/virtio-balloon.c`). Two bytes a frame, whatever the driver does.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT
from shared.virtio_balloon import PFN_SHIFT

_SHIFT = PAGE_SHIFT - PFN_SHIFT
PAGES_PER_FRAME = 1 << _SHIFT
_WHOLE = (1 << PAGES_PER_FRAME) - 1


class BalloonedPages:
    """The pages of `n_frames` frames that are in the balloon; none at first."""

    def __init__(self, n_frames: int) -> None:
        self._pages = array("H", bytes(2 * n_frames))
        """A bit a page, a word a frame."""

    def put(self, pfns: Sequence[int]) -> list[int]:
        """These pages are in the balloon. Returns the frames that one of them belongs to and that are in it whole.

        Raises GuestFault, and takes none, when one lies outside RAM.
        """
        self._check(pfns)
        whole = set()
        for pfn in pfns:
            gfn = pfn >> _SHIFT
            self._pages[gfn] |= 1 << pfn % PAGES_PER_FRAME
            if self._pages[gfn] == _WHOLE:
                whole.add(gfn)
        return sorted(whole)

    def take(self, pfns: Sequence[int]) -> None:
        """These pages are in the balloon no more, whether they were or not; raises GuestFault as `put`."""
        self._check(pfns)
        for pfn in pfns:
            self._pages[pfn >> _SHIFT] &= ~(1 << pfn % PAGES_PER_FRAME)

    def is_whole(self, gfn: int) -> bool:
        """Whether all pages of a frame are in the balloon."""
        return self._pages[gfn] == _WHOLE

    def clear(self) -> None:
        """The balloon is empty."""
        self._pages = array("H", bytes(2 * len(self._pages)))

    def save(self) -> bytes:
        """A copy."""
        return self._pages.tobytes()

    def load(self, saved: bytes) -> None:
        """Go on from a copy; raises ValueError for one of another amount of RAM."""
        if len(saved) != 2 * len(self._pages):
            raise ValueError(f"the saved balloon is of {len(saved) // 2} frames, this VM has {len(self._pages)}")
        self._pages = array("H", saved)

    def _check(self, pfns: Sequence[int]) -> None:
        if pfns and max(pfns) >> _SHIFT >= len(self._pages):
            raise GuestFault(f"page {max(pfns):#x} of 4 KiB is outside RAM")
