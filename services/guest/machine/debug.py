"""Breakpoints, watchpoints and single steps of the machine engine, none of which the guest can see.

A breakpoint is a trap in a shadow of its code page (`code_pages.py`), which only fetches from that effective address
use. A page with a watchpoint never gets into the engine's TLB: each access to it ends the run, and is done by a step
when it is not one that the point is about. A step fetches from a shadow that has traps everywhere but in the place of
the one instruction, and from a page of traps wherever else: whatever comes next, in this page or another, in an
interrupt handler or a process, stops. So neither needs the engine's own counting, which slows every instruction.
"""

from __future__ import annotations

from services.guest.machine.accesses import decode
from services.guest.machine.code_pages import CODE_PAGE_BYTES, CodePages
from services.guest.machine.mmu import Use
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import Msr
from services.runtime.gdb.target import Point, PointKind, Stop, StopKind

_PAGE_MASK = CODE_PAGE_BYTES - 1
_MASK64 = (1 << 64) - 1
_BRANCH, _BRANCH_CONDITIONAL = 18, 16
_LK = 1
_BO_NO_CONDITION, _BO_IF_SET, _BO_NO_COUNT, _BO_IF_ZERO = 16, 8, 4, 2
_DCBZ, _DCBZ_MASK, _CACHE_LINE_BYTES = 0x7C0007EC, 0xFC0007FE, 128
_LMW, _STMW = 46, 47
_QUADWORDS = frozenset({56, 57, 61})
"""lq, and the vector-scalar loads and stores."""
_STRING_BYTES = 16


class Watched(Exception):
    """An access to a page that has a watchpoint."""


class DebugFetches:
    """What the engine's TLB is to hold while a debugger has points or steps."""

    def __init__(self, registers: RegisterFile, code: CodePages) -> None:
        self._registers = registers
        self._code = code
        self._breakpoints: frozenset[int] = frozenset()
        self._watches: tuple[Point, ...] = ()
        self._watched_pages: frozenset[int] = frozenset()
        self._step_pc: int | None = None
        self._watching = True

    @property
    def is_on(self) -> bool:
        """Whether anything is different from a processor without a debugger."""
        return bool(self._breakpoints or self._watches) or self.is_stepping

    @property
    def is_stepping(self) -> bool:
        """Whether only one instruction is to run."""
        return self._step_pc is not None

    def set_points(self, points: frozenset[Point]) -> None:
        """Stop at these. The engine's TLB has to be flushed."""
        self._breakpoints = frozenset(point.address for point in points if not point.kind.is_watch)
        self._watches = tuple(point for point in points if point.kind.is_watch)
        self._watched_pages = frozenset(
            page
            for point in self._watches
            for page in range(point.address & ~_PAGE_MASK, point.address + point.n_bytes, CODE_PAGE_BYTES)
        )

    def begin_step(self, *, watching: bool) -> None:
        """Only the next instruction is to run. The TLB has to be flushed now and after `end_step`."""
        self._step_pc, self._watching = self._registers.pc, watching

    def end_step(self) -> None:
        """What runs next is no step."""
        self._step_pc, self._watching = None, True

    def is_breakpoint(self, address: int) -> bool:
        """Whether a run stops there."""
        return address in self._breakpoints

    def stops_at(self, address: int) -> bool:
        """Whether the trap at `address` is a debugger's."""
        return address != self._step_pc if self._step_pc is not None else address in self._breakpoints

    def instead(self, address: int, use: Use) -> int | None:
        """The engine-physical page that is fetched in the place of all else, whatever the guest maps there; None for
        one as it is. Raises Watched, ShadowsFull."""
        if use is not Use.FETCH:
            if self._watching and address & ~_PAGE_MASK in self._watched_pages:
                raise Watched
            return None
        if self._step_pc is None or not (address ^ self._step_pc) & ~_PAGE_MASK:
            return None
        return self._code.stops()

    def fetch(self, address: int, page: int, *, little_endian: bool) -> int:
        """The engine-physical page to fetch from at `address`, for the true `page`. Raises ShadowsFull."""
        if self._step_pc is not None:
            return self._code.fetch_one(page, self._step_pc & _PAGE_MASK, little_endian=little_endian)
        first = address & ~_PAGE_MASK
        stops = frozenset(it - first for it in self._breakpoints if 0 <= it - first < CODE_PAGE_BYTES)
        return self._code.fetch(page, little_endian=little_endian, stops=stops)

    def watch_of(self, address: int, n_bytes: int, use: Use) -> Stop | None:
        """The stop that an access makes, None when no watchpoint is about it."""
        wanted = PointKind.WRITE if use is Use.STORE else PointKind.READ
        for point in self._watches:
            overlaps = address < point.address + point.n_bytes and point.address < address + n_bytes
            if overlaps and point.kind in (wanted, PointKind.ACCESS):
                return Stop(StopKind.TRAP, point.kind, max(address, point.address))
        return None


def access_range(word: int, address: int) -> tuple[int, int]:
    """First byte and length of what the storage instruction `word` reaches, which uses `address`."""
    if word & _DCBZ_MASK == _DCBZ:
        return address & -_CACHE_LINE_BYTES, _CACHE_LINE_BYTES
    opcode = word >> 26
    if opcode in (_LMW, _STMW):
        return address, 4 * (32 - (word >> 21 & 31))
    access = decode(word)
    if access is not None:
        return address, access.form.size
    # Floating point and reservations are never longer than a doubleword; of opcode 31 the rest may be a vector.
    return address, 8 if opcode not in _QUADWORDS and opcode != 31 else _STRING_BYTES


def branches_to_itself(word: int) -> bool:
    """Whether a relative branch leads back to itself: the engine would not come out of it."""
    opcode = word >> 26
    if opcode == _BRANCH:
        return word & 0x03FF_FFFE == 0
    return opcode == _BRANCH_CONDITIONAL and word & 0xFFFE == 0


def do_branch_to_itself(word: int, registers: RegisterFile) -> None:
    """One round of such a branch. Source: Power ISA 3.0B, book I, 2.4."""
    pc = registers.pc
    taken = word >> 26 == _BRANCH or _is_taken(word >> 21 & 31, word >> 16 & 31, registers)
    if word & _LK:
        registers.lr = pc + 4
    if not taken:
        registers.pc = pc + 4


def _is_taken(bo: int, bi: int, registers: RegisterFile) -> bool:
    counted = True
    if not bo & _BO_NO_COUNT:
        ctr = registers.ctr = registers.ctr - 1 & _MASK64
        low = ctr if registers.msr & Msr.SF else ctr & 0xFFFF_FFFF
        counted = (low == 0) is bool(bo & _BO_IF_ZERO)
    is_set = bool(registers.cr >> (31 - bi) & 1)
    return counted and bool(bo & _BO_NO_CONDITION or is_set is bool(bo & _BO_IF_SET))
