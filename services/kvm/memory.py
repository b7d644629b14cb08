"""Memory of one VM as kvm keeps it: slots, page states, host view, the map of a normal VM, punched frames."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import msgspec

from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from services.kvm.page_state import KvmState
from shared.gfn_ranges import ranges_of
from shared.host_view import HostState
from shared.memfd import SealedMemory
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap

FAULT_AROUND_PAGES = 16


class MemSlot(msgspec.Struct, frozen=True):
    """A memory slot as qemu set it."""

    slot: int
    gpa: int
    size_bytes: int

    @property
    def gfns(self) -> range:
        """Its frames."""
        return range(self.gpa >> PAGE_SHIFT, (self.gpa + self.size_bytes) >> PAGE_SHIFT)


class VmMemory:
    """The frames of one VM. `ram` is the mapped segment (writable), `size_bytes` its length."""

    def __init__(self, name: str, ram_fd: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.n_pages = size_bytes >> PAGE_SHIFT
        try:
            self._mmap = mmap.mmap(ram_fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise HostFault(f"cannot map the RAM of {name}: {error}") from None
        self.ram = memoryview(self._mmap)
        self._view_memory = SealedMemory(f"pefbox-view-{name}", self.n_pages)
        self._map_memory = SealedMemory(f"pefbox-map-{name}", self.n_pages * ENTRY_BYTES)
        self.host_view = self._view_memory.buffer
        self.map = PartitionMap(self._map_memory.buffer)
        self.slots: dict[int, MemSlot] = {}
        self.busy: set[int] = set()
        """GFNs with a call to the ultravisor under way: the lock of a page."""
        self._states = bytearray(self.n_pages)
        self.counts = [0] * len(KvmState)
        self.counts[KvmState.NORMAL] = self.n_pages
        self.host_view[:] = bytes([KvmState.NORMAL.host_state]) * self.n_pages

    @property
    def view_fd(self) -> int:
        """Descriptor of the host view, for qemu."""
        return self._view_memory.fd

    @property
    def map_fd(self) -> int:
        """Descriptor of the normal VM's map, for the guest."""
        return self._map_memory.fd

    # -- slots ------------------------------------------------------------------------------------------------

    def set_slot(self, slot: MemSlot) -> bool:
        """Add, replace (same number) or, with size 0, remove a slot; False when it does not fit."""
        if slot.size_bytes == 0:
            return self.slots.pop(slot.slot, None) is not None
        aligned = slot.gpa % PAGE_BYTES == 0 and slot.size_bytes % PAGE_BYTES == 0
        if not aligned or slot.gpa + slot.size_bytes > self.size_bytes:
            return False
        others = (other for number, other in self.slots.items() if number != slot.slot)
        if any(slot.gfns.start < o.gfns.stop and o.gfns.start < slot.gfns.stop for o in others):
            return False
        self.slots[slot.slot] = slot
        return True

    def in_slots(self, gfn: int) -> bool:
        """Whether a slot covers `gfn`."""
        return any(gfn in slot.gfns for slot in self.slots.values())

    # -- states -----------------------------------------------------------------------------------------------

    def state(self, gfn: int) -> KvmState:
        """KVM's state of `gfn`."""
        return _BY_VALUE[self._states[gfn]]

    def set_state(self, gfn: int, state: KvmState) -> None:
        """The one place where a single frame changes state; the host view follows."""
        self.counts[self._states[gfn]] -= 1
        self.counts[state] += 1
        self._states[gfn] = state
        self.host_view[gfn] = state.host_state

    def in_state(self, *states: KvmState) -> list[int]:
        """Every GFN in one of `states`."""
        wanted = {int(state) for state in states}
        return [gfn for gfn, state in enumerate(self._states) if state in wanted]

    def states(self) -> bytes:
        """The state of every frame, a byte each."""
        return bytes(self._states)

    def arrive(self, states: bytes) -> None:
        """Take over the states of a VM from another host; frames without content are punched.

        Raises HostFault, and no state has changed then.
        """
        view = states.translate(_HOST_VIEW)
        self.punch_all(gfn for gfn, host_state in enumerate(view) if host_state == HostState.ABSENT)
        self._states[:] = states
        self.host_view[:] = view
        self.counts[:] = map(states.count, KvmState)

    def hide(self, gfn: int) -> None:
        """The host finds `gfn` absent from now on, whatever its state becomes."""
        self.host_view[gfn] = KvmState.SECURE.host_state

    def show(self, gfn: int) -> None:
        """The host view is again what the state says."""
        self.host_view[gfn] = self.state(gfn).host_state

    # -- frames -----------------------------------------------------------------------------------------------

    def punch(self, gfn: int, n_pages: int = 1) -> None:
        """Give the normal frames back to the system; a later touch would find zeros. Raises HostFault."""
        try:
            self._mmap.madvise(mmap.MADV_REMOVE, gpa_of(gfn), n_pages * PAGE_BYTES)
        except OSError as error:
            raise HostFault(f"cannot punch gfn {gfn:#x}: {error.strerror}") from None

    def punch_all(self, gfns: Iterable[int]) -> None:
        """As `punch`, for ascending GFNs: a run is one system call."""
        for run in ranges_of(gfns):
            self.punch(run.gfn, run.n)

    def map_around(self, gfn: int) -> None:
        """Map `gfn` of a normal VM, and its neighbours in the same slot."""
        first = gfn - gfn % FAULT_AROUND_PAGES
        for page in range(first, min(first + FAULT_AROUND_PAGES, self.n_pages)):
            if self._states[page] == KvmState.NORMAL and page not in self.busy and self.in_slots(page):
                self.map.set(page, MapKind.NORMAL, page)

    def unmap_all(self) -> None:
        """The normal map gives nothing any more; the caller has the guest forget its translations."""
        for gfn in self.map.mapped():
            self.map.clear(gfn)

    def drop_secure(self, gfns: Iterable[int]) -> None:
        """The VM is secure: these frames are hidden, punched and SECURE. Raises HostFault."""
        for run in ranges_of(gfns):
            for gfn in range(run.gfn, run.gfn + run.n):
                self.set_state(gfn, KvmState.SECURE)
            self.punch(run.gfn, run.n)

    def discard(self, gfns: Iterable[int]) -> None:
        """Of a normal VM, ascending: hidden, punched and DISCARDED; nobody has a translation. Raises HostFault."""
        for run in ranges_of(gfns):
            self.punch(run.gfn, run.n)
            for gfn in range(run.gfn, run.gfn + run.n):
                self.set_state(gfn, KvmState.DISCARDED)

    def bring_back(self, gfns: Iterable[int]) -> None:
        """Those of `gfns` that are DISCARDED are ordinary pages again, and hold zeros."""
        for gfn in gfns:
            if self._states[gfn] == KvmState.DISCARDED:
                self.set_state(gfn, KvmState.NORMAL)

    def forget_secure(self) -> None:
        """The secure VM is gone: its frames are ordinary zeroed ones, shared frames keep their content."""
        self.punch_all(self.in_state(KvmState.SECURE, KvmState.PAGED_OUT))
        for gfn in self.in_state(KvmState.SECURE, KvmState.PAGED_OUT, KvmState.SHARED):
            self.set_state(gfn, KvmState.NORMAL)
        self.busy.clear()

    def page_counts(self) -> dict[str, int]:
        """How many pages are normal, secure, shared, paged out, discarded."""
        return {
            "normal": self.counts[KvmState.NORMAL],
            "secure": self.counts[KvmState.SECURE],
            "shared": self.counts[KvmState.SHARED],
            "paged_out": self.counts[KvmState.PAGED_OUT],
            "discarded": self.counts[KvmState.DISCARDED],
        }

    def close(self) -> None:
        """Release all mappings."""
        self.map.words.release()
        self._map_memory.close()
        self._view_memory.close()
        self.ram.release()
        self._mmap.close()


_BY_VALUE = list(KvmState)
_HOST_VIEW = bytes(state.host_state for state in KvmState).ljust(256, b"\0")
"""The host view of a frame by the value of its state, as `bytes.translate` takes it."""
