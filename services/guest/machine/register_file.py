"""The registers of one engine, as memory of its own that `services.guest.machine.layout` found.

Registers that translated code keeps apart (CR, XER, LR, CTR, FPSCR) and the MSR, whose change has consequences in the
engine, go through its interface. Only while the engine does not run.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from unicorn import ppc_const
from unicorn.unicorn_py3.unicorn import uclib

from protocol.errors import HostFault
from services.guest.machine.layout import XER_FLAGS, Layout, engine_address
from services.guest.machine.registers import Spr
from services.guest.machine.second_level_tlb import Watched
from services.guest.machine.state import N_GPRS, N_SPRS, VSR_BYTES, VSRS_BYTES, RegisterState

_PROBE_VALUE = 0x1122_3344_5566_7788
_TIME_BASE_BYTES = 4096
_ALL_XER_FLAGS = sum(XER_FLAGS)


@dataclass(frozen=True, slots=True)
class ExceptionRegisters:
    """Addresses of what an engine has that its exceptions are about."""

    level: int
    """Of the last system call, 32 bits."""
    msr: int
    pc: int
    gprs: int
    sprs: int


class RegisterFile:
    """`gpr` and `spr` are arrays of u64 by number; a store takes effect at once."""

    def __init__(self, engine: Any, layout: Layout) -> None:  # noqa: ANN401
        self._handle = engine._uch
        base = engine_address(engine)
        processor = ctypes.c_uint64.from_address(base + layout.processor).value
        self._processor = processor
        self.gpr = (ctypes.c_uint64 * N_GPRS).from_address(processor + layout.gprs)
        self.spr = (ctypes.c_uint64 * N_SPRS).from_address(processor + layout.sprs)
        self._vsrs = (ctypes.c_char * VSRS_BYTES).from_address(processor + layout.vsrs)
        self._vsr_bytes = memoryview(self._vsrs).cast("B")
        self._msr = ctypes.c_uint64.from_address(processor + layout.msr)
        self._pc = ctypes.c_uint64.from_address(processor + layout.pc)
        self._error_code = ctypes.c_uint32.from_address(processor + layout.error_code)
        self._xer_flags = tuple(
            (bit, ctypes.c_uint64.from_address(processor + offset))
            for bit, offset in zip(XER_FLAGS, layout.xer_flags, strict=True)
        )
        self._value = ctypes.c_uint64()
        self._value_at = ctypes.byref(self._value)
        # Code that reads PURR follows this pointer, which the engine leaves null.
        self._time_base = ctypes.create_string_buffer(_TIME_BASE_BYTES)
        ctypes.c_uint64.from_address(processor + layout.time_base).value = ctypes.addressof(self._time_base)
        self._check()
        self._sprs_at_power_on = bytes(self.spr)

    def _check(self) -> None:
        self._write(ppc_const.UC_PPC_REG_3, _PROBE_VALUE)
        if self.gpr[3] != _PROBE_VALUE or not self.spr[Spr.PVR]:
            raise HostFault("the registers of the engine are not where they were found")
        self.gpr[3] = 0

    @property
    def pc(self) -> int:
        """The next instruction's effective address."""
        return self._pc.value

    @pc.setter
    def pc(self, value: int) -> None:
        self._pc.value = value

    @property
    def msr(self) -> int:
        """Without S, which the engine does not know."""
        return self._msr.value

    @msr.setter
    def msr(self, value: int) -> None:
        self._write(ppc_const.UC_PPC_REG_MSR, value)

    @property
    def error_code(self) -> int:
        """Of the last exception."""
        return self._error_code.value

    @property
    def lr(self) -> int:
        """Link register."""
        return self._read(ppc_const.UC_PPC_REG_LR)

    @lr.setter
    def lr(self, value: int) -> None:
        self._write(ppc_const.UC_PPC_REG_LR, value)

    @property
    def ctr(self) -> int:
        """Count register."""
        return self._read(ppc_const.UC_PPC_REG_CTR)

    @ctr.setter
    def ctr(self, value: int) -> None:
        self._write(ppc_const.UC_PPC_REG_CTR, value)

    @property
    def cr(self) -> int:
        """Condition register, 32 bits."""
        return self._read(ppc_const.UC_PPC_REG_CR) & 0xFFFF_FFFF

    @cr.setter
    def cr(self, value: int) -> None:
        self._write(ppc_const.UC_PPC_REG_CR, value)

    @property
    def xer(self) -> int:
        """Fixed-point exception register."""
        flags = sum(bit for bit, flag in self._xer_flags if flag.value)
        return self._read(ppc_const.UC_PPC_REG_XER) & ~_ALL_XER_FLAGS | flags

    @xer.setter
    def xer(self, value: int) -> None:
        self._write(ppc_const.UC_PPC_REG_XER, value & ~_ALL_XER_FLAGS)
        for bit, flag in self._xer_flags:
            flag.value = int(value & bit != 0)

    @property
    def fpscr(self) -> int:
        """Floating-point status and control register."""
        return self._read(ppc_const.UC_PPC_REG_FPSCR)

    @fpscr.setter
    def fpscr(self, value: int) -> None:
        self._write(ppc_const.UC_PPC_REG_FPSCR, value)

    def vsr_halves(self) -> tuple[list[int], list[int]]:
        """The low doublewords of all vector-scalar registers, and the high ones."""
        words = self._vsr_bytes.cast("Q").tolist()
        return words[0::2], words[1::2]

    def vsr(self, number: int) -> int:
        """A vector-scalar register, 128 bits."""
        return int.from_bytes(self._vsr_bytes[number * VSR_BYTES : (number + 1) * VSR_BYTES], "little")

    def set_vsr(self, number: int, value: int) -> None:
        """Change a vector-scalar register."""
        self._vsr_bytes[number * VSR_BYTES : (number + 1) * VSR_BYTES] = value.to_bytes(VSR_BYTES, "little")

    def clear(self) -> None:
        """Everything as at power on; the MSR is the caller's."""
        ctypes.memset(self.gpr, 0, ctypes.sizeof(self.gpr))
        ctypes.memmove(self.spr, self._sprs_at_power_on, ctypes.sizeof(self.spr))
        ctypes.memset(self._vsrs, 0, VSRS_BYTES)
        self.lr = self.ctr = self.cr = self.xer = self.fpscr = 0

    def watched(self, layout: Layout) -> Watched:
        """What the second-level TLB has to look at."""
        pidr = ctypes.addressof(self.spr) + int(Spr.PIDR) * ctypes.sizeof(ctypes.c_uint64)
        return Watched(self._processor + layout.flushes, ctypes.addressof(self._msr), pidr)

    def of_exceptions(self) -> ExceptionRegisters:
        """What machine code for exceptions works on."""
        registers = (self._error_code, self._msr, self._pc, self.gpr, self.spr)
        return ExceptionRegisters(*(ctypes.addressof(each) for each in registers))

    def save(self) -> RegisterState:
        """A copy of everything."""
        return RegisterState(
            pc=self.pc,
            msr=self.msr,
            lr=self.lr,
            ctr=self.ctr,
            cr=self.cr,
            xer=self.xer,
            fpscr=self.fpscr,
            gprs=list(self.gpr),
            sprs={number: value for number, value in enumerate(self.spr) if value},
            vsrs=self._vsrs.raw,
        )

    def load(self, state: RegisterState) -> None:
        """Hold `state` from now on."""
        for number in range(N_SPRS):
            self.spr[number] = state.sprs.get(number, 0)
        for number, value in enumerate(state.gprs):
            self.gpr[number] = value
        self.pc, self.msr = state.pc, state.msr
        self.lr, self.ctr, self.cr = state.lr, state.ctr, state.cr
        self.xer, self.fpscr, self._vsrs.raw = state.xer, state.fpscr, state.vsrs

    def _read(self, register: int) -> int:
        self._value.value = 0
        uclib.uc_reg_read(self._handle, register, self._value_at)
        return self._value.value

    def _write(self, register: int, value: int) -> None:
        self._value.value = value
        uclib.uc_reg_write(self._handle, register, self._value_at)
