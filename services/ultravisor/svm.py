"""One secure VM as the ultravisor keeps it: memory slots, page states, secure frames, images, map.

Plain and synchronous: what needs a peer (an invalidation, a hypercall) lives in the modules that call this one.
Frames: GFN n of the VM is frame n of its secure memory, and n of its RAM segment when it is shared.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from services.runtime.tracer import UNTRACED, Tracer
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.page_crypto import PageSealer
from services.ultravisor.page_state import GfnState, PageEvent, PageStates
from services.ultravisor.secure_memory import SecureAccount, SecureMemory
from shared.memfd import SealedMemory
from shared.partition_map import ENTRY_BYTES, RW, RWX, MapKind, PartitionMap

MAX_SLOTS = 512
_ZEROS = bytes(PAGE_BYTES)
_TAG_ROOM_BYTES = 16


class SvmPhase(Enum):
    """Where a secure VM is in its life."""

    STARTING = "starting"
    ARRIVED = "arrived"
    """All of it has come from another host, and it must not run here before the start token."""
    SECURE = "secure"
    ABORTING = "aborting"
    ENDED = "ended"


class Slot(msgspec.Struct, frozen=True):
    """A registered memory slot: `n_pages` from `gfn`."""

    slot: int
    gfn: int
    n_pages: int

    def covers(self, gfn: int) -> bool:
        """Whether `gfn` lies in this slot."""
        return self.gfn <= gfn < self.gfn + self.n_pages


class Svm:
    """Pages of one secure VM. `memory_bytes` is the size of its RAM segment, `lpid` its partition."""

    def __init__(
        self,
        name: str,
        lpid: int,
        incarnation: int,
        ram: NormalRam,
        account: SecureAccount,
        tracer: Tracer = UNTRACED,
        memory: SecureMemory | None = None,
    ) -> None:
        self._tracer = tracer
        self.name = name
        self.lpid = lpid
        self.ram = ram
        self.phase = SvmPhase.STARTING
        self.slots: dict[int, Slot] = {}
        self.n_pages = ram.size_bytes >> PAGE_SHIFT
        self.states = PageStates(self.n_pages)
        self.memory = memory or SecureMemory(name, ram.size_bytes)
        self._account = account
        self._charged_bytes = 0
        self._sealer = PageSealer(lpid, incarnation)
        self._image = bytearray(PAGE_BYTES + _TAG_ROOM_BYTES)
        try:
            self._map_memory = SealedMemory(f"pefbox-map-{name}", self.n_pages * ENTRY_BYTES)
        except HostFault:
            self.memory.close()
            raise
        self.map = PartitionMap(self._map_memory.buffer)
        self.taken_in: set[int] = set()
        """GFNs whose content the hypervisor supplied during ESM."""
        self.refused_images: dict[int, int] = {}
        """Images of a GFN that failed their check since the last good one."""
        self.withheld: dict[int, int] = {}
        """Times the hypervisor was asked for a GFN and offered no image, since the last good one."""

    # -- memory slots -----------------------------------------------------------------------------------------

    def register_slot(self, slot: Slot) -> bool:
        """Add a slot and charge its secure memory; False when the account does not hold it."""
        n_bytes = slot.n_pages << PAGE_SHIFT
        if not self._account.charge(n_bytes):
            return False
        self._charged_bytes += n_bytes
        self.slots[slot.slot] = slot
        return True

    def unregister_slot(self, number: int) -> None:
        """Drop a slot: its pages are gone, its memory is given back. Raises KeyError for an unknown slot."""
        slot = self.slots.pop(number)
        for gfn in range(slot.gfn, slot.gfn + slot.n_pages):
            self.map.clear(gfn)
            self._sealer.forget(gfn)
        n_bytes = slot.n_pages << PAGE_SHIFT
        self._account.credit(n_bytes)
        self._charged_bytes -= n_bytes

    def in_slots(self, gfn: int, n_pages: int = 1) -> bool:
        """Whether the whole range lies inside registered slots (which never overlap)."""
        covered = 0
        for slot in self.slots.values():
            covered += max(0, min(slot.gfn + slot.n_pages, gfn + n_pages) - max(slot.gfn, gfn))
        return covered == n_pages

    # -- frames -----------------------------------------------------------------------------------------------

    def secure_page(self, gfn: int) -> memoryview:
        """The secure frame of `gfn`, writable."""
        start = gpa_of(gfn)
        return self.memory.buffer[start : start + PAGE_BYTES]

    def take_in(self, gfn: int) -> None:
        """ESM: copy the host's page into secure memory. Raises HostFault, and then the frame is zero."""
        page = self.secure_page(gfn)
        try:
            self.ram.read_into(gpa_of(gfn), page)
        except HostFault:
            page[:] = _ZEROS
            raise
        self.taken_in.add(gfn)

    def give_back(self, gfn: int) -> None:
        """Abort of ESM: the host's page goes back as it came; raises HostFault."""
        if gfn in self.taken_in:
            self.ram.write(gpa_of(gfn), self.secure_page(gfn))
            self.taken_in.discard(gfn)
        else:
            self.ram.zero_page(gpa_of(gfn))

    def seal_out(self, gfn: int) -> None:
        """Write the encrypted image of `gfn` into its normal frame; the secure frame is kept. Raises HostFault.

        The caller has looked at the end of normal RAM (`NormalRam.check_end`).
        """
        self.ram.write_after_check(gpa_of(gfn), self._sealer.seal(gfn, self.secure_page(gfn)))

    def open_in(self, gfn: int, offset: int) -> bool:
        """Check the image at `offset` of normal RAM and take its content; False when refused. Raises HostFault."""
        self.ram.read_into(offset, memoryview(self._image)[:PAGE_BYTES])
        return self._sealer.open(gfn, self._image, self.secure_page(gfn))

    def zero_secure(self, gfn: int) -> None:
        """Zero the secure frame of `gfn`."""
        self.secure_page(gfn)[:] = _ZEROS

    def zero_shared(self, gfn: int) -> None:
        """Zero the normal frame of `gfn` before it becomes visible to the guest (S2); raises HostFault."""
        self.ram.zero_page(gpa_of(gfn))

    # -- map --------------------------------------------------------------------------------------------------

    def map_secure(self, gfn: int) -> None:
        """The guest reaches its secure frame."""
        self.map.set(gfn, MapKind.SECURE, gfn, RWX)

    def map_shared(self, gfn: int) -> None:
        """The guest reaches the normal frame; code is never fetched from it."""
        self.map.set(gfn, MapKind.SHARED, gfn, RW)

    def map_all(self) -> None:
        """ESM is done: every page of every slot by its state."""
        for slot in self.slots.values():
            for gfn in range(slot.gfn, slot.gfn + slot.n_pages):
                if self.states[gfn] in _IN_SECURE_FRAME:
                    self.map_secure(gfn)

    @property
    def map_fd(self) -> int:
        """Descriptor of the map, for the guest."""
        return self._map_memory.fd

    # -- end --------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Give everything back; only after the guest acknowledged or is dead."""
        self._account.credit(self._charged_bytes)
        self._charged_bytes = 0
        self.map.words.release()
        self._map_memory.close()
        self.memory.close()

    def page_counts(self) -> dict[str, int]:
        """How many pages of the slots are secure, shared, paged out."""
        counts = self.states.counts
        shared = sum(counts[state] for state in _SHARED_STATES)
        out = counts[GfnState.PAGED_OUT]
        secure = self._charged_bytes // PAGE_BYTES - shared - out
        return {"normal": 0, "secure": secure, "shared": shared, "paged_out": out}

    def apply(self, gfn: int, event: PageEvent, cause: int = 0) -> GfnState:
        """As PageStates.apply, because of `cause`."""
        if not self._tracer.on:
            return self.states.apply(gfn, event)
        before = self.states[gfn]
        after = self.states.apply(gfn, event)
        self._tracer.page_changed(self.lpid, gfn, before.name, event.name, after.name, cause)
        return after


_IN_SECURE_FRAME = frozenset({GfnState.SECURE, GfnState.PSEUDO_SHARED, GfnState.PSEUDO_SHARED_INV})
"""States in which the guest's map gives the secure frame."""

_SHARED_STATES = (
    GfnState.SHARED,
    GfnState.SHARED_INV,
    GfnState.SHARED_IMPLICIT,
    GfnState.SHARED_IMPLICIT_INV,
)
