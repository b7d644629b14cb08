"""The engine's TLB misses: effective to engine-physical, and why an access could not be done.

`fill` runs inside the engine and never waits: whatever stands against an access is kept in `stop` and ends the run, and
the engine's owner serves it outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import unicorn as uc

from protocol.messages import Access
from services.guest.machine.accesses import effective_address
from services.guest.machine.code_pages import CODE_PAGE_BYTES, CodePages
from services.guest.machine.debug import DebugFetches
from services.guest.machine.mmu import REAL_MASK, Mmu, StorageFault, Use
from services.guest.machine.partition import OutsideRam, Partition
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import Dsisr, Msr, Spr
from services.guest.machine.second_level_tlb import BLOCK_SHIFT, SecondLevelTlb

_PAGE_MASK = CODE_PAGE_BYTES - 1
_MASK64, _MASK32 = (1 << 64) - 1, (1 << 32) - 1
_USES = {
    uc.UC_MEM_READ: (Use.LOAD, Access.READ),
    uc.UC_MEM_WRITE: (Use.STORE, Access.WRITE),
    uc.UC_MEM_FETCH: (Use.FETCH, Access.EXECUTE),
}
_IR, _DR, _PR, _LE = int(Msr.IR), int(Msr.DR), int(Msr.PR), int(Msr.LE)
_PIDR = int(Spr.PIDR)
_NO_PAGES = 60
"""Bits of an address in real mode, which knows no pages."""
_READ: int = uc.UC_PROT_READ
_READ_WRITE: int = uc.UC_PROT_READ | uc.UC_PROT_WRITE
_EXECUTE: int = uc.UC_PROT_EXEC
_EXECUTE_READ: int = uc.UC_PROT_EXEC | uc.UC_PROT_READ


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run of the engine ended at an access to `address`."""

    reason: BaseException
    address: int
    use: Use


class _Found(NamedTuple):
    """Where an address leads."""

    page: int
    """The true page."""
    given: int
    """The one that the engine gets for it."""
    permissions: int
    shift: int
    """Bits of the address within a page of the guest's own translation."""


class Translator:
    """Of one engine."""

    def __init__(
        self, registers: RegisterFile, mmu: Mmu, partition: Partition, code: CodePages, second_level: SecondLevelTlb
    ) -> None:
        self._registers = registers
        self._mmu = mmu
        self._partition = partition
        self._code = code
        self._second_level = second_level
        self.stop: Stop | None = None
        self.debug: DebugFetches | None = None
        """While a debugger has points or steps."""
        self.n_fills = 0

    def fill(self, address: int, kind: int, entry: Any) -> bool:  # noqa: ANN401
        """Answer a miss of the engine's TLB in `entry`. Nothing may be raised into the engine."""
        use, access = _USES[kind]
        self.n_fills += 1
        try:
            found = self._page(address, use, access)
            entry[0].paddr, entry[0].perms = found.given, found.permissions
            if self._holds_for_block(found, use):
                self._second_level.note_block(address, kind, found.page, found.permissions)
            # Last, since what is noted is kept: only what is answered may be.
            self._second_level.note(address, kind, found.page)
        except BaseException as reason:
            self.stop = Stop(reason, address, use)
            return False
        return True

    def _page(self, address: int, use: Use, access: Access) -> _Found:
        """Where `address` leads."""
        debug = self.debug
        if debug is not None:
            instead = debug.instead(address, use)
            if instead is not None:
                return _Found(instead, instead, _EXECUTE, 0)
        gpa, more, shift = self._guest_real(address, use)
        place, partition_more = self._partition.place(gpa, access)
        page = place & ~_PAGE_MASK
        if use is Use.FETCH:
            little_endian = bool(self._registers.msr & _LE)
            if debug is not None:
                return _Found(page, debug.fetch(address, page, little_endian=little_endian), _EXECUTE, shift)
            fetched = self._code.fetch(page, little_endian=little_endian)
            # Code has constants and tables beside it: were fetches and loads to take the entry from each other, each
            # change between them would be a miss. A shadow is for fetches alone.
            readable = more and partition_more and fetched == page
            return _Found(page, fetched, _EXECUTE_READ if readable else _EXECUTE, shift)
        if more and partition_more and self._code.may_write(page, storing=use is Use.STORE):
            return _Found(page, page, _READ_WRITE, shift)
        return _Found(page, page, _READ, shift)

    def _holds_for_block(self, found: _Found, use: Use) -> bool:
        """Whether all pages of the block around the one that was found get what it got: as far as the guest's
        translation goes, the partition-scoped one, which is of whole frames, and where code lies."""
        if found.shift < BLOCK_SHIFT or self.debug is not None:
            return False
        if use is Use.FETCH:
            return self._code.is_plain_frame(found.page, little_endian=bool(self._registers.msr & _LE))
        return found.permissions == _READ or self._code.may_write_frame(found.page)

    def _guest_real(self, address: int, use: Use) -> tuple[int, bool, int]:
        """The guest real address, whether the guest's own translation lets it be written, or read by a fetch, and the
        bits of `address` within a page of that translation."""
        msr = self._registers.msr
        if not msr & (_IR if use is Use.FETCH else _DR):
            return address & REAL_MASK, True, _NO_PAGES
        try:
            return self._mmu.translate(address, use, self._registers.spr[_PIDR], problem=msr & _PR != 0)
        except OutsideRam:
            raise StorageFault(Dsisr.BAD_CONFIGURATION) from None

    def instruction(self, address: int) -> int:
        """The true instruction word at `address`. Raises what stands against the fetch."""
        data = self._partition.load(self._guest_real(address, Use.FETCH)[0], 4)
        order: Literal["little", "big"] = "little" if self._registers.msr & _LE else "big"
        return int.from_bytes(data, order)

    def data_address(self, stop: Stop) -> int:
        """The first byte that a load or store could not reach: the engine tells its page, the instruction the rest."""
        registers = self._registers
        address = effective_address(self.instruction(registers.pc), registers.gpr)
        if address is None:
            return stop.address
        address &= _MASK64 if registers.msr & Msr.SF else _MASK32
        return address if address & ~_PAGE_MASK == stop.address & ~_PAGE_MASK else stop.address
