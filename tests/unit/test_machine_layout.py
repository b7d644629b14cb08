"""How the engine's structures are found in memory."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import unicorn as uc
from unicorn import ppc_const

from services.guest.machine import layout
from services.guest.machine.layout import probe, stop_between_blocks_only
from services.guest.machine.registers import Msr
from tests.unit import power_asm as asm
from tests.unit.power_asm import R3, R4, R5


def test_a_pointer_near_the_processor_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe()
    searched = layout._Probe()
    processor = layout._word(searched._base + found.processor)
    # The begin of another allocation, the inside of this one, an odd address, and only then the right one.
    pointers = (ctypes.c_uint64 * 4)(processor - 4096, processor + 64, processor + 3, processor)
    monkeypatch.setattr(searched, "_base", ctypes.addressof(pointers))
    monkeypatch.setattr(searched, "_n_bytes", ctypes.sizeof(pointers))

    again = searched.layout()

    assert again.processor == 24
    assert (again.gprs, again.sprs, again.vsrs) == (found.gprs, found.sprs, found.vsrs)


def test_an_allocation_with_pages_of_its_own_ends_with_them() -> None:
    """As the C library makes large ones: there may be nothing behind, and the size counts two words before it."""
    is_mapped = 2
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    both = libc.mmap(None, ctypes.c_size_t(2 * mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    assert libc.munmap(ctypes.c_void_p(both + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE)) == 0
    ctypes.c_uint64.from_address(both + 8).value = mmap.PAGESIZE | is_mapped

    assert layout._allocation_bytes(both + 16) == mmap.PAGESIZE - 16


CODE, DATA, BYTES = 0x1000, 0x4000, 0x10000


@pytest.mark.parametrize("access", [asm.ldu(R3, 8, R4), asm.stdu(R3, 8, R4), asm.stwu(R3, 8, R4)])
def test_an_update_form_whose_tlb_miss_asks_for_a_stop_is_done_once(access: int) -> None:
    """A stop behind the access would have the engine do it again, from the register that it has updated."""
    offset = probe().no_exit_request
    assert offset is not None
    engine = uc.Uc(uc.UC_ARCH_PPC, uc.UC_MODE_PPC64 | uc.UC_MODE_BIG_ENDIAN)
    ram = mmap.mmap(-1, BYTES)
    pin = ctypes.c_char.from_buffer(ram)
    engine.mem_map_ptr(0, BYTES, uc.UC_PROT_ALL, ctypes.addressof(pin))
    engine.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
    engine.ctl_exits_enabled(True)
    misses = []

    def fill(engine: Any, address: int, _access: int, entry: Any, _data: object) -> bool:  # noqa: ANN401
        entry.paddr, entry.perms = address & -4096, uc.UC_PROT_ALL
        if address >= DATA:
            misses.append(address)
            engine.emu_stop()
        return True

    engine.hook_add(uc.UC_HOOK_TLB_FILL, fill)
    engine.hook_add(uc.UC_HOOK_INTR, lambda engine, _number, _data: engine.emu_stop())
    stop_between_blocks_only(engine, offset)
    code = asm.program(access, asm.addi(R5, R5, 1), asm.b(1), asm.SC0)
    ram[CODE : CODE + len(code)] = code
    engine.reg_write(ppc_const.UC_PPC_REG_MSR, Msr.SF | Msr.ME)
    engine.reg_write(ppc_const.UC_PPC_REG_4, DATA)

    engine.emu_start(CODE, 0)
    assert misses
    # The block was finished first.
    assert engine.reg_read(ppc_const.UC_PPC_REG_PC) == CODE + 12
    assert engine.reg_read(ppc_const.UC_PPC_REG_4) == DATA + 8
    assert engine.reg_read(ppc_const.UC_PPC_REG_5) == 1
