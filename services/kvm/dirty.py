"""Which frames of a VM were written: by its processor, by its devices, by kvm for it.

The guest marks its stores in a map of its own, qemu those of its devices in another; kvm reads and clears both. Of a
secure VM it has only what the host wrote: the marks of a secure VM's processor go to the ultravisor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import compress, islice

import trio

from protocol.codes import HCode
from protocol.errors import HostFault, PefboxError
from protocol.messages import MAP_INVALIDATE, MAX_INVALIDATION_RANGES, InvalidateBody, Range
from services.runtime.link import Link
from shared.dirty_map import DirtyMap, put_marks
from shared.gfn_bitmap import bitmap_of_marks

GUEST_MAP, DEVICE_MAP = "guest-dirty-map", "device-dirty-map"
_ACKNOWLEDGE_SECONDS = 1.0
_PART_PAGES = 256
_TO_ONE = bytes([0]) + bytes([1]) * 255
"""A mark is any byte but 0."""
_MARKED_RUN = re.compile(rb"\x01+")


class DirtyPages:
    """The dirty maps of one VM of `n_pages`. `is_secure` says whether its processor's marks are the ultravisor's."""

    def __init__(self, n_pages: int, guest: Link, qemu: Link, is_secure: Callable[[], bool]) -> None:
        self.own = memoryview(bytearray(n_pages))
        """Marks of what kvm writes into the VM's RAM."""
        self._shown = memoryview(bytearray(n_pages))
        """What `collect` told since the last `collect_bitmap`."""
        self._n_pages = n_pages
        self._writers = {GUEST_MAP: guest, DEVICE_MAP: qemu}
        self._maps: dict[str, DirtyMap] = {}
        self._is_secure = is_secure

    def take_map(self, tag: str, fd: int) -> bool:
        """A map that its writer gave; False for another tag, or one that is here already. Raises HostFault."""
        if tag not in self._writers or tag in self._maps:
            return False
        self._maps[tag] = DirtyMap(fd, self._n_pages)
        return True

    async def collect(self, gfns: range, cause: int = 0) -> list[int]:
        """Those of `gfns` that were written since they were last collected, ascending.

        Raises HostFault when a writer does not acknowledge within a second or has given no map; nothing is lost then.
        """
        written = list(compress(gfns, await self._collect(gfns, cause)))
        put_marks(self._shown, written)
        return written

    async def collect_bitmap(self, gfns: range, cause: int = 0) -> bytes:
        """As `collect`, as a bitmap of `gfns`.

        What `collect` has told meanwhile counts too: a migration reads by this, and must miss nothing.
        """
        written = await self._collect(gfns, cause)
        return bitmap_of_marks(_merged([written, _take(self._shown, gfns)]))

    async def _collect(self, gfns: range, cause: int) -> bytes:
        """As `collect`: a byte a GFN, 1 for one that was written."""
        tags = [DEVICE_MAP] if self._is_secure() else [GUEST_MAP, DEVICE_MAP]
        missing = [tag for tag in tags if tag not in self._maps]
        if missing:
            raise HostFault(f"no {missing[0]} has come yet")
        all_marks = [*(self._maps[tag].marks for tag in tags), self.own]
        taken = [_take(marks, gfns) for marks in all_marks]
        written = _merged(taken)
        settled = False
        try:
            settled = await self._settled([self._writers[tag] for tag in tags], gfns, written, cause)
        finally:
            if not settled:
                for marks, found in zip(all_marks, taken, strict=True):
                    put_marks(marks, compress(gfns, found))
        if not settled:
            raise HostFault("a writer of the VM's memory does not acknowledge")
        return written

    async def _settled(self, writers: list[Link], gfns: range, written: bytes, cause: int) -> bool:
        """Whether every writer said that no store to what was `written` is under way from before any more."""
        body = _invalidation(gfns, written)
        if body is None:
            return True
        try:
            with trio.fail_after(_ACKNOWLEDGE_SECONDS):
                for writer in writers:
                    if (await writer.call(MAP_INVALIDATE, body, cause)).code != HCode.H_SUCCESS:
                        return False
        except (trio.TooSlowError, PefboxError):
            return False
        return True

    def close(self) -> None:
        """Release the maps."""
        for dirty in self._maps.values():
            dirty.close()
        self._maps.clear()


def _take(marks: memoryview, gfns: range) -> bytes:
    """The marks of `gfns`, 1 or 0; those that were found are clear now.

    A mark that is set meanwhile on a frame that was found clear must stay: only a part that is all marked is cleared by
    one store.
    """
    found = bytes(marks[gfns.start : gfns.stop]).translate(_TO_ONE)
    for first in range(0, len(found), _PART_PAGES):
        part = found[first : first + _PART_PAGES]
        n_marked = part.count(1)
        at = gfns.start + first
        if n_marked == len(part):
            marks[at : at + len(part)] = bytes(len(part))
        elif n_marked:
            for gfn in compress(range(at, at + len(part)), part):
                marks[gfn] = 0
    return found


def _merged(taken: list[bytes]) -> bytes:
    """What is marked in any of them."""
    merged = 0
    for found in taken:
        merged |= int.from_bytes(found, "little")
    return merged.to_bytes(len(taken[0]), "little")


def _invalidation(gfns: range, written: bytes) -> InvalidateBody | None:
    """Names what was written, or all between its ends: a translation that is forgotten in vain costs one fault."""
    runs = [run.span() for run in islice(_MARKED_RUN.finditer(written), MAX_INVALIDATION_RANGES + 1)]
    if not runs:
        return None
    if len(runs) > MAX_INVALIDATION_RANGES:
        runs = [(runs[0][0], written.rindex(1) + 1)]
    return InvalidateBody([Range(gfns.start + first, end - first) for first, end in runs])
