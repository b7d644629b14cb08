"""The TCE tables of one VM and the four hypercalls on them.

Which table entries a guest may store is decided here and nowhere else: a page outside guest RAM is refused, so that
what a device looks up is RAM or a fault. Codes are KVM's (Linux `arch/powerpc/kvm/book3s_64_vio.c`), with what KVM
hands to user space as too hard answered here. Two choices where sources differ: an ioba that is not aligned to the
window's page size is H_PARAMETER (QEMU rounds it down), and one H_STUFF_TCE takes at most `MAX_STUFF_TCES` entries,
the whole default window, so that no call holds up the others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from protocol.codes import HCode
from protocol.errors import MalformedMessage
from protocol.hcalls import MAX_INDIRECT_TCES
from protocol.messages import TceWindowBody
from shared.tce import ADDRESS_MASK, ENTRY_BYTES, MIN_PAGE_SHIFT, PERMISSION_MASK, TceTable

DEFAULT_WINDOW_SHIFT = 12
DEFAULT_WINDOW_TCES = 1 << 18
"""The 32-bit window that a PCI host bridge starts with: 1 GiB of 4 KiB pages at bus address 0, a 2 MiB table."""
MAX_STUFF_TCES = DEFAULT_WINDOW_TCES
MAX_TABLES = 64
"""Two for a bus and for each of its 31 slots."""
MAX_TOTAL_TCES = 1 << 25
"""All tables of a VM together: 256 MiB."""

INDIRECT_LIST_ALIGN_BYTES = 4096
_U64 = (1 << 64) - 1

_SUCCESS: list[int] = [HCode.H_SUCCESS]
_PARAMETER: list[int] = [HCode.H_PARAMETER]


class TceTableState(msgspec.Struct):
    """One table: its window, and every entry that is not 0 by index."""

    window: TceWindowBody
    entries: dict[int, int]


class TceTablesState(msgspec.Struct):
    """All tables of a VM."""

    tables: list[TceTableState]


class TceTables:
    """The tables of one VM by liobn.

    `in_ram(gpa, n_bytes)` says whether a range lies wholly in guest RAM. Memory for a table comes from
    `allocate(window)`, zero-filled, at least `n_tces * 8` bytes; whoever gave it takes it back after `remove`.
    Results of hypercalls are `[code, outputs...]` and are not to be changed by the caller.
    """

    def __init__(self, in_ram: Callable[[int, int], bool], allocate: Callable[[TceWindowBody], memoryview]) -> None:
        self._in_ram = in_ram
        self._allocate = allocate
        self._tables: dict[int, TceTable] = {}

    def create(self, window: TceWindowBody) -> HCode:
        """Make an empty table.

        H_PARAMETER: the window's geometry does not hold. H_IN_USE: the liobn has a table. H_RESOURCE: the VM has too
        many or too large tables; nothing was allocated then. A domain has two liobns, so it needs no limit of its own.
        """
        if not _geometry_holds(window):
            return HCode.H_PARAMETER
        if window.liobn in self._tables:
            return HCode.H_IN_USE
        total_tces = sum(table.n_tces for table in self._tables.values()) + window.n_tces
        if len(self._tables) >= MAX_TABLES or total_tces > MAX_TOTAL_TCES:
            return HCode.H_RESOURCE
        self._tables[window.liobn] = TceTable(window, self._allocate(window))
        return HCode.H_SUCCESS

    def remove(self, liobn: int) -> HCode:
        """Forget a table and drop every view of its memory; H_PARAMETER when there is none."""
        table = self._tables.pop(liobn, None)
        if table is None:
            return HCode.H_PARAMETER
        table.release()
        return HCode.H_SUCCESS

    def get(self, liobn: int) -> TceTable | None:
        """The table of `liobn`."""
        return self._tables.get(liobn)

    @property
    def windows(self) -> list[TceWindowBody]:
        """Every window, in the order of their making."""
        return [table.window for table in self._tables.values()]

    def h_get_tce(self, liobn: int, ioba: int) -> list[int]:
        """`[H_SUCCESS, tce]`."""
        table = self._tables.get(liobn)
        index = None if table is None else _aligned_index(table, ioba, 1)
        if table is None or index is None:
            return _PARAMETER
        return [HCode.H_SUCCESS, table.entry(index)]

    def h_put_tce(self, liobn: int, ioba: int, tce: int) -> list[int]:
        """Store one entry."""
        table = self._tables.get(liobn)
        index = None if table is None else _aligned_index(table, ioba, 1)
        if table is None or index is None or not self._storable(table, tce):
            return _PARAMETER
        table.store(index, tce)
        return _SUCCESS

    def h_stuff_tce(self, liobn: int, ioba: int, tce: int, n_tces: int) -> list[int]:
        """Store `n_tces` copies of an entry that permits nothing."""
        if tce & PERMISSION_MASK or not 0 <= tce <= _U64 or not 0 <= n_tces <= MAX_STUFF_TCES:
            return _PARAMETER
        table = self._tables.get(liobn)
        index = None if table is None else _aligned_index(table, ioba, n_tces)
        if table is None or index is None:
            return _PARAMETER
        table.fill(index, n_tces, tce)
        return _SUCCESS

    def may_put_indirect(self, liobn: int, ioba: int, list_gpa: int, n_tces: int) -> HCode:
        """What H_PUT_TCE_INDIRECT answers before its list is read: H_SUCCESS says that it is worth reading.

        The caller then reads `n_tces * 8` bytes at `list_gpa`; a list outside guest RAM is H_PARAMETER.
        """
        if not 0 <= n_tces <= MAX_INDIRECT_TCES or list_gpa % INDIRECT_LIST_ALIGN_BYTES:
            return HCode.H_PARAMETER
        table = self._tables.get(liobn)
        if table is None or _aligned_index(table, ioba, n_tces) is None:
            return HCode.H_PARAMETER
        return HCode.H_SUCCESS

    def h_put_tce_indirect(self, liobn: int, ioba: int, list_gpa: int, n_tces: int, tces: bytes) -> list[int]:
        """Store the big-endian entries `tces` that were read at `list_gpa`.

        Stops at the first entry that may not be stored: H_PARAMETER, and those before it stay stored.
        """
        table = self._tables.get(liobn)
        refused = self.may_put_indirect(liobn, ioba, list_gpa, n_tces) is not HCode.H_SUCCESS
        if table is None or refused or len(tces) != n_tces * ENTRY_BYTES:
            return _PARAMETER
        first = ioba - table.base >> table.page_shift
        for index, value in enumerate(struct.unpack(f">{n_tces}Q", tces), first):
            if not self._storable(table, value):
                return _PARAMETER
            table.store(index, value)
        return _SUCCESS

    def clear(self) -> None:
        """Empty every table, as a reset of the machine does; the windows stay."""
        for table in self._tables.values():
            table.clear()

    def save(self) -> TceTablesState:
        """Windows and entries."""
        return TceTablesState([TceTableState(table.window, table.nonzero()) for table in self._tables.values()])

    def load(self, state: TceTablesState) -> None:
        """Make the tables of `state`; there are none yet. Raises MalformedMessage for a state that does not hold."""
        for saved in state.tables:
            if self.create(saved.window) is not HCode.H_SUCCESS:
                raise MalformedMessage(f"TCE window {saved.window.liobn:#x} cannot be made")
            self._check_entries(saved)
        self.fill(state)

    def check(self, state: TceTablesState) -> None:
        """Raise MalformedMessage unless every window of `state` is here, with the same geometry, and takes its entries.

        Windows that are here alone are no fault: a guest may have had nothing in them.
        """
        if len({saved.window.liobn for saved in state.tables}) != len(state.tables):
            raise MalformedMessage("a TCE window comes twice")
        for saved in state.tables:
            table = self._tables.get(saved.window.liobn)
            if table is None or table.window != saved.window:
                raise MalformedMessage(f"TCE window {saved.window.liobn:#x} is not here, or another one")
            self._check_entries(saved)

    def fill(self, state: TceTablesState) -> None:
        """Give the tables that are here the entries of a `state` that passed `check`, and no others."""
        self.clear()
        for saved in state.tables:
            table = self._tables[saved.window.liobn]
            for index, value in saved.entries.items():
                table.store(index, value)

    def _check_entries(self, saved: TceTableState) -> None:
        table = self._tables[saved.window.liobn]
        for index, value in saved.entries.items():
            if not 0 <= index < table.n_tces or not self._storable(table, value):
                raise MalformedMessage(f"TCE {index} of window {saved.window.liobn:#x} is not storable")

    def _storable(self, table: TceTable, value: int) -> bool:
        if not 0 <= value <= _U64:
            return False
        if not value & PERMISSION_MASK:
            # Linux lets a guest poison entries that permit nothing with any value.
            return True
        gpa = value & ~PERMISSION_MASK
        if gpa & table.page_bytes - 1:
            return False
        return self._in_ram(gpa & ADDRESS_MASK, table.page_bytes)


def _geometry_holds(window: TceWindowBody) -> bool:
    if (
        not MIN_PAGE_SHIFT <= window.page_shift <= 34
        or not 1 <= window.n_tces <= 1 << 24
        or not 0 <= window.liobn < 1 << 32
    ):
        return False
    aligned = window.base >= 0 and window.base % (1 << window.page_shift) == 0
    return aligned and window.base + (window.n_tces << window.page_shift) <= 1 << 64


def _aligned_index(table: TceTable, ioba: int, n_tces: int) -> int | None:
    """The first index of `n_tces` entries at `ioba`; None unless aligned and wholly inside the window."""
    if ioba & table.page_bytes - 1:
        return None
    index = table.index_of(ioba)
    return None if index is None or index + n_tces > table.n_tces else index
