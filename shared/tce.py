"""A TCE table: the emulated IOMMU's map from bus addresses (ioba) to guest physical addresses.

kvm makes the table as a sealed memory file and stores into it, qemu reads it at each DMA. An entry is one native u64:
bit 0 the device may read, bit 1 the device may write, the upper bits the address of the guest page; without either
bit it faults. Each entry is written by one aligned store, so a reader sees the old or the new one.
Source: PAPR 14.5.4.1, Linux `arch/powerpc/include/asm/tce.h`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import IntFlag

from protocol.errors import GuestFault
from protocol.messages import TceWindowBody
from shared.words import words_u64

ENTRY_BYTES = 8
PCI_LIOBN = 0x8000_0000
"""Bit of a liobn that a PCI host bridge gave."""
WINDOWS_PER_DOMAIN = 2
BUS_DOMAIN = 0
MIN_PAGE_SHIFT = 12
_BLOCK_TCES = 1024
_ZEROS = bytes(_BLOCK_TCES * ENTRY_BYTES)
ADDRESS_MASK = (1 << 64) - (1 << MIN_PAGE_SHIFT)


class TcePermission(IntFlag):
    """What an entry lets the device do with the page."""

    NONE = 0
    READ = 1
    WRITE = 2


PERMISSION_MASK = int(TcePermission.READ | TcePermission.WRITE)


def pci_liobn(bridge: int, domain: int, window: int) -> int:
    """The liobn of a window (0 or 1) of PCI host bridge number `bridge`.

    The windows of a bridge are counted by domains: those of its bus (BUS_DOMAIN) are 0 and 1, as QEMU's, and those of
    a slot that has a domain of its own follow, two for each. So no two domains ever share a liobn.
    """
    return PCI_LIOBN | bridge << 8 | domain * WINDOWS_PER_DOMAIN | window


def tce(gpa: int, permission: TcePermission) -> int:
    """The entry that maps the page at `gpa`."""
    return gpa & ADDRESS_MASK | permission


def gpa_of_tce(value: int) -> int:
    """The page address of an entry."""
    return value & ADDRESS_MASK


class TceTable:
    """The entries of one DMA window over `window.n_tces * ENTRY_BYTES` bytes of memory.

    `window` says liobn, page shift, first bus address and number of entries. `release` drops the views, so that the
    memory can be unmapped.
    """

    def __init__(self, window: TceWindowBody, buffer: memoryview) -> None:
        self.window = window
        self.liobn = window.liobn
        self.page_shift = window.page_shift
        self.base = window.base
        self.n_tces = window.n_tces
        self.page_bytes = 1 << window.page_shift
        self._end = window.base + (window.n_tces << window.page_shift)
        self._words = words_u64(buffer[: window.n_tces * ENTRY_BYTES])
        self._bytes = self._words.cast("B")
        if len(self._words) != self.n_tces:
            raise ValueError(f"a table of {self.n_tces} TCEs over {len(buffer)} bytes")

    @property
    def size_bytes(self) -> int:
        """How much bus address space the window covers."""
        return self._end - self.base

    def index_of(self, ioba: int) -> int | None:
        """The index of the entry that covers bus address `ioba`; None outside the window."""
        return ioba - self.base >> self.page_shift if self.base <= ioba < self._end else None

    def entry(self, index: int) -> int:
        """The raw entry; raises IndexError outside the table."""
        if not 0 <= index < self.n_tces:
            raise IndexError(f"TCE {index} of {self.n_tces}")
        value: int = self._words[index]
        return value

    def store(self, index: int, value: int) -> None:
        """Replace one entry with one store; for the owner of the memory only."""
        self._words[index] = value

    def fill(self, index: int, n: int, value: int) -> None:
        """Replace `n` entries from `index` by `value`, which permits nothing.

        The permissions go first, each by a store of its own: a reader that then sees half of an entry finds none. An
        entry by entry takes ten times as long, and the owner of the memory has other VMs to serve.
        """
        if value & PERMISSION_MASK:
            raise ValueError(f"TCE {value:#x} permits an access")
        end = index + n
        self._bytes[index * ENTRY_BYTES : end * ENTRY_BYTES : ENTRY_BYTES] = bytes([value & 0xFF]) * n
        block = memoryview(array("Q", [value]) * min(n, _BLOCK_TCES))
        for start in range(index, end, _BLOCK_TCES):
            stop = min(start + _BLOCK_TCES, end)
            self._words[start:stop] = block[: stop - start]

    def clear(self) -> None:
        """Replace every entry by 0."""
        for start, block in self._used_blocks():
            self.fill(start, len(block), 0)

    def nonzero(self) -> dict[int, int]:
        """Every entry that is not 0, by index."""
        found: dict[int, int] = {}
        for start, block in self._used_blocks():
            found.update((index, value) for index, value in enumerate(block, start) if value)
        return found

    def _used_blocks(self) -> Iterator[tuple[int, memoryview]]:
        """First index and entries of each block that is not all 0.

        A window has a quarter of a million entries, most of them 0, and a VM that moves stands still meanwhile.
        """
        for start in range(0, self.n_tces, _BLOCK_TCES):
            block = self._words[start : start + _BLOCK_TCES]
            if bytes(block) != _ZEROS[: block.nbytes]:
                yield start, block

    def lookup(self, ioba: int) -> int | None:
        """The guest physical address behind `ioba`; None outside the window or where no access is permitted."""
        index = self.index_of(ioba)
        if index is None:
            return None
        value: int = self._words[index]
        if not value & PERMISSION_MASK:
            return None
        return value & ADDRESS_MASK & -self.page_bytes | ioba & self.page_bytes - 1

    def translate(self, ioba: int, n_bytes: int, write: bool) -> list[tuple[int, int]]:
        """`n_bytes` from `ioba` as (gpa, bytes) pieces in order; neighbouring pages make one piece.

        `write` says that the device writes. Raises GuestFault when any page is outside the window or does not permit
        the access. The result may name addresses outside guest RAM: whoever touches memory checks that.
        """
        if n_bytes <= 0:
            if n_bytes < 0:
                raise GuestFault(f"a transfer of {n_bytes} bytes")
            return []
        if ioba < self.base or ioba + n_bytes > self._end:
            raise GuestFault(f"{n_bytes} bytes at ioba {ioba:#x} leave the window of liobn {self.liobn:#x}")
        needed = TcePermission.WRITE if write else TcePermission.READ
        page_bytes = self.page_bytes
        page_address_mask = -page_bytes & ADDRESS_MASK
        offset = ioba & page_bytes - 1
        index = ioba - self.base >> self.page_shift
        pieces: list[tuple[int, int]] = []
        start = end = -1
        words = self._words
        while n_bytes > 0:
            value = words[index]
            if not value & needed:
                raise self._fault(index, value, write)
            gpa = (value & page_address_mask) + offset
            n = min(page_bytes - offset, n_bytes)
            if gpa != end:
                if end >= 0:
                    pieces.append((start, end - start))
                start = gpa
            end = gpa + n
            offset = 0
            index += 1
            n_bytes -= n
        pieces.append((start, end - start))
        return pieces

    def maps_to_itself(self, n_bytes: int) -> bool:
        """Whether the first `n_bytes` of bus addresses lead to the same guest addresses, for reading and writing."""
        n_pages = -(-n_bytes >> self.page_shift)
        if self.base or n_pages > self.n_tces:
            return False
        wanted = array("Q", range(PERMISSION_MASK, (n_pages << self.page_shift) + PERMISSION_MASK, self.page_bytes))
        return memoryview(wanted).tobytes() == self._words[:n_pages].tobytes()

    def release(self) -> None:
        """Drop the views of the memory; the table is unusable after."""
        self._bytes.release()
        self._words.release()

    def _fault(self, index: int, value: int, write: bool) -> GuestFault:
        ioba = self.base + (index << self.page_shift)
        verb = "write" if write else "read"
        return GuestFault(f"the device may not {verb} ioba {ioba:#x} of liobn {self.liobn:#x} (TCE {value:#x})")
