"""Which frames of a VM were written: by its processor, by its devices, by kvm for it.

The guest marks its stores in a map of its own, qemu those of its devices in another; kvm reads and clears both. Of a
secure VM it has only what the host wrote: the marks of a secure VM's processor go to the ultravisor.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from protocol.codes import HCode
from protocol.errors import HostFault, PefboxError
from protocol.messages import MAP_INVALIDATE
from services.runtime.link import Link
from shared.dirty_map import DirtyMap, put_marks, take_marks
from shared.gfn_ranges import invalidations_of

GUEST_MAP, DEVICE_MAP = "guest-dirty-map", "device-dirty-map"
_ACKNOWLEDGE_SECONDS = 1.0


class DirtyPages:
    """The dirty maps of one VM of `n_pages`. `is_secure` says whether its processor's marks are the ultravisor's."""

    def __init__(self, n_pages: int, guest: Link, qemu: Link, is_secure: Callable[[], bool]) -> None:
        self.own = memoryview(bytearray(n_pages))
        """Marks of what kvm writes into the VM's RAM."""
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
        tags = [DEVICE_MAP] if self._is_secure() else [GUEST_MAP, DEVICE_MAP]
        missing = [tag for tag in tags if tag not in self._maps]
        if missing:
            raise HostFault(f"no {missing[0]} has come yet")
        taken = [(self._maps[tag].marks, self._maps[tag].take(gfns)) for tag in tags]
        taken.append((self.own, take_marks(self.own, gfns)))
        written = sorted({gfn for _, found in taken for gfn in found})
        settled = False
        try:
            settled = await self._settled([self._writers[tag] for tag in tags], written, cause)
        finally:
            if not settled:
                for marks, found in taken:
                    put_marks(marks, found)
        if not settled:
            raise HostFault("a writer of the VM's memory does not acknowledge")
        return written

    async def _settled(self, writers: list[Link], gfns: list[int], cause: int) -> bool:
        """Whether every writer said that no store to `gfns` from before is under way any more."""
        try:
            with trio.fail_after(_ACKNOWLEDGE_SECONDS):
                for body in invalidations_of(gfns):
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
