"""Loads and stores that met no RAM: from the exit that asks a device to the register that gets its answer."""

from __future__ import annotations

from services.guest.exits import MmioLoad, MmioStore
from services.guest.machine import accesses
from services.guest.machine.code_pages import CODE_PAGE_BYTES
from services.guest.machine.interrupts import Interrupts
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import WORD_BYTES, Msr
from services.guest.machine.translator import Stop, Translator

_PAGE_MASK = CODE_PAGE_BYTES - 1


class DeviceAccesses:
    """Of one processor."""

    def __init__(self, registers: RegisterFile, interrupts: Interrupts, translator: Translator) -> None:
        self._registers = registers
        self._interrupts = interrupts
        self._translator = translator
        self._access: accesses.Access | None = None
        self._address = 0

    def begin(self, stop: Stop, gpa: int) -> MmioLoad | MmioStore | None:
        """The exit for the instruction that stopped at the page of `gpa`; None when an interrupt was delivered."""
        registers = self._registers
        access = accesses.decode(self._translator.instruction(registers.pc))
        address = self._translator.data_address(stop)
        if access is None:
            self._interrupts.alignment(registers.pc, address)
            return None
        self._access, self._address = access, address
        gpa = gpa & ~_PAGE_MASK | address & _PAGE_MASK
        form = access.form
        if not form.store:
            return MmioLoad(gpa, form.size)
        return MmioStore(gpa, form.size, accesses.device_value(form, registers.gpr[access.register], self._order))

    def finish(self, asked: MmioLoad | MmioStore, result: list[int]) -> None:
        """Where no device answers a load gives all ones, as on a bus, and a store is lost."""
        access = self._access
        assert access is not None
        registers, form = self._registers, access.form
        if isinstance(asked, MmioLoad):
            value = result[1] if not result[0] and len(result) > 1 else -1
            value &= (1 << 8 * form.size) - 1
            registers.gpr[access.register] = accesses.register_value(form, value, self._order)
        if form.update:
            registers.gpr[access.base] = self._address
        registers.pc += WORD_BYTES
        self._interrupts.done_outside()

    @property
    def _order(self) -> accesses.Order:
        return "little" if self._registers.msr & Msr.LE else "big"
