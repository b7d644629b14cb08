"""The one accessor through which device and kvm code reaches guest RAM.

It looks each GFN up in the host view and asks kvm for what is absent; kvm then has the ultravisor page it out, so
that what the caller reads is the encrypted image and never the secure content (S1).

A guest may take a page back while the host stores to its frame. Kvm hides the frame before the ultravisor reads it, so
a store after which the frame is still in view is part of what the ultravisor checks; any other is made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, pages_spanned
from shared.host_view import HostState
from shared.words import full_fence, words_u16

_MAX_ROUNDS = 100
"""A guest that keeps taking its pages back holds a device up for so many rounds, and no longer."""


class GuestRam:
    """Normal RAM of one VM as the host sees it.

    `ram` is the mapped segment, `host_view` one byte a GFN. `want` is called with the absent GFNs of an access and
    returns when kvm made them present; it raises GuestFault when kvm refuses. Each of `marks`, a byte a GFN, is set for
    every frame written here (the device dirty map, and the marks that a processor with code in RAM looks at).
    """

    def __init__(
        self,
        ram: memoryview,
        host_view: memoryview,
        want: Callable[[list[int]], Awaitable[None]],
        *marks: memoryview,
    ) -> None:
        self.size_bytes = len(ram)
        self._ram = ram
        self._view = host_view
        self._want = want
        self._marks = marks

    async def read(self, gpa: int, n_bytes: int) -> bytes:
        """`n_bytes` from `gpa`; raises GuestFault outside RAM."""
        await self._present(gpa, n_bytes)
        return bytes(self._ram[gpa : gpa + n_bytes])

    async def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Store `data` at `gpa`; raises GuestFault outside RAM."""
        await self._until_kept(gpa, len(data), lambda: self.write_now(gpa, data))

    def write_now(self, gpa: int, data: bytes | memoryview) -> bool:
        """As `write`, without waiting: False when a frame is absent, or was taken by the guest meanwhile."""
        view = self.view_now(gpa, len(data), writing=True)
        if view is None:
            return False
        view[:] = data
        return self._kept(gpa, len(data))

    async def store_u16(self, gpa: int, value: int) -> None:
        """Set the little-endian u16 at even `gpa` by one store; raises GuestFault outside RAM."""
        await self._until_kept(gpa, 2, lambda: self.store_u16_now(gpa, value))

    def store_u16_now(self, gpa: int, value: int) -> bool:
        """As `store_u16`, without waiting: False when the frame is absent, or was taken by the guest meanwhile."""
        view = self.view_now(gpa, 2, writing=True)
        if view is None:
            return False
        words_u16(view)[0] = value
        return self._kept(gpa, 2)

    async def view(self, gpa: int, n_bytes: int) -> memoryview:
        """The frames themselves, for reading; raises GuestFault outside RAM.

        The caller drops the view before it next waits for a peer: kvm may punch the frames at any time after.
        """
        await self._present(gpa, n_bytes)
        return self._ram[gpa : gpa + n_bytes]

    def view_now(self, gpa: int, n_bytes: int, *, writing: bool) -> memoryview | None:
        """As `view`, without waiting; None when a frame is absent.

        For bulk transfer (`preadv` into guest RAM): a frame that the guest takes meanwhile loses its part.
        """
        self.check(gpa, n_bytes)
        if self._absent(gpa, n_bytes):
            return None
        if writing:
            self._mark(gpa, n_bytes)
        return self._ram[gpa : gpa + n_bytes]

    def states(self, gfns: Iterable[int]) -> dict[HostState, int]:
        """How many of these frames, all in RAM, are in which state now."""
        found = Counter(self._view[gfn] for gfn in gfns)
        return {state: found[state] for state in HostState}

    def check(self, gpa: int, n_bytes: int) -> None:
        """Raise GuestFault unless the whole range lies in RAM."""
        if gpa < 0 or n_bytes < 0 or gpa + n_bytes > self.size_bytes:
            raise GuestFault(f"{n_bytes} bytes at gpa {gpa:#x} are outside RAM of {self.size_bytes:#x} bytes")

    async def _present(self, gpa: int, n_bytes: int) -> None:
        self.check(gpa, n_bytes)
        # A frame that just came may be taken again by the guest while the next one is fetched.
        for _ in range(_MAX_ROUNDS):
            absent = self._absent(gpa, n_bytes)
            if not absent:
                return
            await self._want(absent)
        raise GuestFault(f"{n_bytes} bytes at gpa {gpa:#x} do not stay present")

    async def _until_kept(self, gpa: int, n_bytes: int, store: Callable[[], bool]) -> None:
        for _ in range(_MAX_ROUNDS):
            await self._present(gpa, n_bytes)
            if store():
                return
        raise GuestFault(f"{n_bytes} bytes at gpa {gpa:#x} do not stay present")

    def _kept(self, gpa: int, n_bytes: int) -> bool:
        """Whether what was just stored lies in frames that are still in view."""
        full_fence()
        return not self._absent(gpa, n_bytes)

    def _absent(self, gpa: int, n_bytes: int) -> list[int]:
        if not n_bytes:
            return []
        first = gpa >> PAGE_SHIFT
        if (gpa & (PAGE_BYTES - 1)) + n_bytes <= PAGE_BYTES:
            return [] if self._view[first] != HostState.ABSENT else [first]
        return [gfn for gfn in pages_spanned(gpa, n_bytes) if self._view[gfn] == HostState.ABSENT]

    def _mark(self, gpa: int, n_bytes: int) -> None:
        for marks in self._marks:
            for gfn in pages_spanned(gpa, n_bytes):
                marks[gfn] = 1
