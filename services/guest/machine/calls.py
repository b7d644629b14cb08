"""Hypercalls and ultracalls between registers and exits, and what the processor itself takes from their success.

Source: PAPR 14.5 for the registers, 14.5.4.3.6 (H_SET_MODE), 14.5.3.9 (H_SIGNAL_SYS_RESET); Linux
`arch/powerpc/mm/book3s64/radix_pgtable.c` and `arch/powerpc/platforms/pseries/lpar.c` for H_REGISTER_PROC_TBL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from protocol.codes import HCode
from protocol.declare import CallTable
from protocol.hcall_values import PROC_TABLE_MODIFY, PROC_TABLE_REGISTER, SetModeResource
from protocol.hcalls import (
    H_LOGICAL_CI_LOAD,
    H_LOGICAL_CI_STORE,
    H_REGISTER_PROC_TBL,
    H_SET_MODE,
    H_SIGNAL_SYS_RESET,
    HCALLS,
)
from protocol.ucalls import UCALLS
from services.guest.exits import Hypercall, Ultracall
from services.guest.machine.interrupts import Interrupts, Vector
from services.guest.machine.mmu import Mmu, ProcessTable
from services.guest.machine.register_file import RegisterFile

_MASK64 = (1 << 64) - 1
_FIRST_ARGUMENT = 4
_MIN_TABLE_SHIFT = 12
_MAX_TABLE_SHIFT = 36
"""The table size field has 5 bits."""
_VCPU = 0
_SYS_RESET_ALL = _MASK64
_CI_SIZES = frozenset({1, 2, 4, 8})


class Calls:
    """Of one processor. `flush_tlb` is called when all translations change."""

    def __init__(
        self, registers: RegisterFile, interrupts: Interrupts, mmu: Mmu, flush_tlb: Callable[[], None]
    ) -> None:
        self._registers = registers
        self._interrupts = interrupts
        self._mmu = mmu
        self._flush_tlb = flush_tlb

    def hypercall(self) -> Hypercall:
        """The call that the registers hold: only the declared arguments leave the processor."""
        number, args = self._take(HCALLS)
        if number == H_LOGICAL_CI_STORE.number:
            args = (*args[:2], _swapped(args[2], args[0]))
        return Hypercall(number, args)

    def ultracall(self) -> Ultracall:
        """As `hypercall`."""
        return Ultracall(*self._take(UCALLS))

    def _take(self, table: CallTable) -> tuple[int, tuple[int, ...]]:
        gpr = self._registers.gpr
        number = gpr[3]
        call = table.by_number.get(number)
        n_args = 0 if call is None else call.n_args
        return number, tuple(gpr[_FIRST_ARGUMENT : _FIRST_ARGUMENT + n_args])

    def give(self, call: Hypercall | Ultracall, result: list[int]) -> None:
        """Put `[code, outputs...]` into registers, and take note of what changed the processor."""
        if isinstance(call, Hypercall):
            result = self._of_hypercall(call, result)
        gpr = self._registers.gpr
        for register, value in enumerate(result, 3):
            gpr[register] = value & _MASK64
        if _resets_caller(call, result):
            # The caller is reset after its call, which it finds done.
            self._interrupts.deliver(Vector.SYSTEM_RESET, self._registers.pc)

    def _of_hypercall(self, call: Hypercall, result: list[int]) -> list[int]:
        if result[0] != HCode.H_SUCCESS:
            return result
        if call.number == H_SET_MODE.number:
            self._set_mode(call.args[0], call.args[1])
        elif call.number == H_REGISTER_PROC_TBL.number:
            self._register_table(*call.args)
        elif call.number == H_LOGICAL_CI_LOAD.number and len(result) > 1:
            return [result[0], _swapped(result[1], call.args[0])]
        return result

    def _set_mode(self, flags: int, resource: int) -> None:
        if resource == SetModeResource.ADDRESS_TRANSLATION_MODE:
            self._interrupts.mode = replace(self._interrupts.mode, ail=flags & 3)
        elif resource == SetModeResource.LITTLE_ENDIAN:
            self._interrupts.mode = replace(self._interrupts.mode, little_endian=bool(flags & 1))

    def _register_table(self, flags: int, base: int, _page_size: int, table_size: int) -> None:
        if not flags & PROC_TABLE_MODIFY:
            return
        if flags & PROC_TABLE_REGISTER:
            shift = min(table_size + _MIN_TABLE_SHIFT, _MAX_TABLE_SHIFT)
            self._mmu.table = ProcessTable(base, 1 << shift)
        else:
            self._mmu.table = None
        self._flush_tlb()


def _resets_caller(call: Hypercall | Ultracall, result: list[int]) -> bool:
    if call.number != H_SIGNAL_SYS_RESET.number or result[0] != HCode.H_SUCCESS:
        return False
    return isinstance(call, Hypercall) and call.args[0] in (_VCPU, _SYS_RESET_ALL)


def _swapped(value: int, size: int) -> int:
    """PAPR's cache-inhibited calls are big-endian accesses; the wire carries the device's little-endian value."""
    if size not in _CI_SIZES:
        return value
    return int.from_bytes((value & (1 << 8 * size) - 1).to_bytes(size, "little"), "big")
