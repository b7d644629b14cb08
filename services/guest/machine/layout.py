"""Where the engine keeps its registers, found out by running stubs.

`unicorn` gives no access to special purpose registers and to the error code of an exception, but all of them lie in its
own memory. `probe` runs stubs that leave known values there and
searches for them; a value that does not turn up at exactly one place means that this release is laid out otherwise,
and the engine refuses to run with it. Offsets are never taken from a table.

Memory is read by process_vm_readv(2) while it is searched, so that a wrong guess is an error and no crash.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import unicorn as uc
from unicorn import ppc_const
from unicorn.unicorn_py3.unicorn import uclib

from protocol.errors import HostFault
from services.guest.machine.hooks import TLB_FLUSH
from services.guest.machine.registers import Msr, Spr

_STUB_BYTES = 0x10000
_STUB_AT = 0x200
_DATA_AT = 0x8000
"""Of another page than the stubs, or the load would not miss."""
_CODE_LIMIT = 1000
_UNCOUNTED = 0
"""A count has the engine look for a stop at each instruction."""
_GPR_MAGIC = 0x5A5A_1234_0000_0000
_FPR_MAGIC = 0xA5A5_4321_0000_0000
_PC_MAGIC = 0x0000_0123_4567_89A8
_MSR_MAGIC = Msr.SF | Msr.ME | Msr.FP
_SPR_BYTES = 1024 * 8
_CACHE_LINES = struct.pack("<II", 128, 128)
_TIME_BASE_BEFORE_BYTES = 16
_SYSCALL = 0x44000002
_LOAD = 0xE8640000
"""ld r3, 0(r4)"""
_ADD = 0x38A50001
"""addi r5, r5, 1"""
_MTSPR = 0x7C0003A6
_NOP = 0x60000000
_LEVELS = (0, 1, 2, 3)
XER_FLAGS = (1 << 31, 1 << 30, 1 << 29, 1 << 19, 1 << 18)
"""SO, OV, CA, OV32 and CA32 in XER."""
# Of glibc's malloc: the word before an allocation is its size with the word, and three flags.
_SIZE_WORD_BYTES = 8
_CHUNK_FLAGS = 7
_CHUNK_MAPPED = 2
"""It has pages of its own, and its size is with the two words before it."""
_CHUNK_ALIGN = 16
_MAX_ALLOCATION_BYTES = 16 << 20
_READY_FLAGS = bytes([0, 1, 0, 1])
_NO_EXIT_REQUEST_AT = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes: of the processor's address in the engine's own structure, the others from there or there."""

    processor: int
    gprs: int
    sprs: int
    vsrs: int
    """64 registers of 16 bytes, each the two doublewords of the host, low one first."""
    msr: int
    pc: int
    xer_flags: tuple[int, ...]
    """Of the bits of `XER_FLAGS`, u64 each, 0 or 1: the engine keeps them apart from the rest of XER."""
    error_code: int
    """Of the last exception, u32: the level of a system call, the kind of a program interrupt."""
    time_base: int
    """Pointer to a time base of the emulator's, which is not there; reading PURR goes through it."""
    flushes: int
    """Three counts, u64 each, whose sum changes with each flush of the engine's TLB: of all modes of addressing at
    once, of a mode, and of a mode that was empty anyway."""
    no_exit_request: int | None
    """A byte of the engine's own structure: when it is set, code is translated without a look for a request to stop
    behind each load and store. None when this release has none, which only makes it slower."""


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def engine_address(engine: Any) -> int:  # noqa: ANN401
    """Where the structure of a `unicorn.Uc` lies."""
    handle = engine._uch
    return int(handle.value if hasattr(handle, "value") else handle)


def stop_between_blocks_only(engine: Any, no_exit_request: int) -> None:  # noqa: ANN401
    """Have translated code look for a request to stop at the begin of each block alone, as from now on.

    Behind a load or store the look costs more than the access, and an engine that stops there does the instruction
    once more when it goes on, which update forms cannot bear.
    """
    _byte(engine, no_exit_request).value = 1


def mtspr(spr: int, gpr: int) -> int:
    """The instruction word."""
    return _MTSPR | gpr << 21 | (spr & 31) << 16 | (spr >> 5) << 11


@cache
def probe() -> Layout:
    """The layout of the installed release; raises HostFault when it is not understood."""
    return _Probe().layout()


class _Probe:
    """A throw-away engine in which the stubs run."""

    def __init__(self) -> None:
        self._uc = uc.Uc(uc.UC_ARCH_PPC, uc.UC_MODE_PPC64 | uc.UC_MODE_BIG_ENDIAN)
        self._ram = mmap.mmap(-1, _STUB_BYTES)
        self._pin = ctypes.c_char.from_buffer(self._ram)
        self._uc.mem_map_ptr(0, _STUB_BYTES, uc.UC_PROT_ALL, ctypes.addressof(self._pin))
        self._uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self._uc.ctl_exits_enabled(True)
        self._uc.hook_add(uc.UC_HOOK_TLB_FILL, self._fill)
        self._uc.hook_add(uc.UC_HOOK_INTR, _stop)
        self._stop_at_load = False
        self._base = engine_address(self._uc)
        self._n_bytes = _allocation_bytes(self._base)

    def layout(self) -> Layout:
        for n in range(32):
            self._uc.reg_write(ppc_const.UC_PPC_REG_0 + n, _GPR_MAGIC + n)
            self._uc.reg_write(ppc_const.UC_PPC_REG_FPR0 + n, _FPR_MAGIC + n)
        self._run([mtspr(Spr.SPRG0, 1), mtspr(Spr.SPRG3, 2)])
        processor, gprs = self._find_processor()
        at = _word(self._base + processor)
        size = _allocation_bytes(at)

        def snapshot() -> bytes:
            return _read(at, size)

        sprs = self._find_sprs(snapshot())
        vsrs = _only(snapshot(), struct.pack("<Q", _FPR_MAGIC), "floating-point registers") - 8
        self._check_vsrs(snapshot(), vsrs)
        time_base = _only(snapshot(), _CACHE_LINES, "cache line sizes", sprs + _SPR_BYTES) - _TIME_BASE_BEFORE_BYTES
        return Layout(
            processor,
            gprs,
            sprs,
            vsrs,
            self._find_register(snapshot, ppc_const.UC_PPC_REG_MSR, _MSR_MAGIC, "machine state register"),
            self._find_register(snapshot, ppc_const.UC_PPC_REG_PC, _PC_MAGIC, "program counter"),
            self._find_flags(snapshot),
            self._find_error_code(snapshot),
            time_base,
            self._find_flushes(snapshot),
            self._find_no_exit_request(),
        )

    def _run(self, words: list[int], level: int = 0, limit: int = _CODE_LIMIT) -> None:
        code = struct.pack(f">{len(words) + 1}I", *words, _SYSCALL | level << 5)
        self._ram[_STUB_AT : _STUB_AT + len(code)] = code
        self._uc.ctl_flush_tb()
        self._uc.reg_write(ppc_const.UC_PPC_REG_MSR, Msr.SF | Msr.ME)
        self._uc.emu_start(_STUB_AT, 0, count=limit)

    def _find_processor(self) -> tuple[int, int]:
        pattern = b"".join(struct.pack("<Q", _GPR_MAGIC + n) for n in range(32))
        for offset in range(0, self._n_bytes - 7, 8):
            address = _word(self._base + offset)
            if not 1 << 16 <= address < 1 << 47:
                continue
            gprs = _read_some(address).find(pattern)
            # A neighbour on the heap, or a copy that another engine left there, is not the processor's structure.
            if 0 <= gprs <= _allocation_bytes(address) - len(pattern):
                return offset, gprs
        raise _unknown("general registers")

    def _find_sprs(self, memory: bytes) -> int:
        first = struct.pack("<Q", _GPR_MAGIC + 1)
        second = struct.pack("<Q", _GPR_MAGIC + 2)
        apart = (Spr.SPRG3 - Spr.SPRG0) * 8
        at = memory.find(first)
        while at >= 0:
            if memory[at + apart : at + apart + 8] == second:
                sprs = at - Spr.SPRG0 * 8
                pvr = self._pvr()
                if memory[sprs + Spr.PVR * 8 : sprs + Spr.PVR * 8 + 8] == struct.pack("<Q", pvr):
                    return sprs
            at = memory.find(first, at + 1)
        raise _unknown("special purpose registers")

    def _pvr(self) -> int:
        self._run([0x7C0002A6 | 3 << 21 | (Spr.PVR & 31) << 16 | (Spr.PVR >> 5) << 11])
        pvr: int = self._uc.reg_read(ppc_const.UC_PPC_REG_3)
        self._uc.reg_write(ppc_const.UC_PPC_REG_3, _GPR_MAGIC + 3)
        return pvr

    def _check_vsrs(self, memory: bytes, vsrs: int) -> None:
        found = [memory[vsrs + 16 * n + 8 : vsrs + 16 * n + 16] for n in range(32)]
        if found != [struct.pack("<Q", _FPR_MAGIC + n) for n in range(32)]:
            raise _unknown("vector-scalar registers")

    def _find_register(self, snapshot: Callable[[], bytes], register: int, magic: int, what: str) -> int:
        self._uc.reg_write(register, magic)
        return _only(snapshot(), struct.pack("<Q", magic), what)

    def _find_flags(self, snapshot: Callable[[], bytes]) -> tuple[int, ...]:
        memories = []
        for value in (0, *XER_FLAGS):
            self._uc.reg_write(ppc_const.UC_PPC_REG_3, value)
            self._run([mtspr(Spr.XER, 3)])
            memories.append(memoryview(snapshot()).cast("Q"))
        found = list(zip(*memories, strict=True))
        wanted = [tuple(int(flag == of) for of in (0, *XER_FLAGS)) for flag in XER_FLAGS]
        if any(found.count(values) != 1 for values in wanted):
            raise _unknown("carry and overflow")
        return tuple(found.index(values) * 8 for values in wanted)

    def _find_error_code(self, snapshot: Callable[[], bytes]) -> int:
        memories = []
        for level in _LEVELS:
            self._run([_NOP], level)
            memories.append(memoryview(snapshot()).cast("I"))
        found = [n for n, values in enumerate(zip(*memories, strict=True)) if values == _LEVELS]
        if len(found) != 1:
            raise _unknown("error code")
        return found[0] * 4

    def _find_flushes(self, snapshot: Callable[[], bytes]) -> int:
        """A flush with one mode in use counts that one, and the others as empty; a second one finds all of them so."""
        found = self._counts_flushes(snapshot) & self._counts_flushes(snapshot)
        if len(found) != 1:
            raise _unknown("counts of flushes")
        return found.pop() * 8 - 8

    def _counts_flushes(self, snapshot: Callable[[], bytes]) -> set[int]:
        """Which words may be the count of modes, with that of empty modes behind it."""
        self._run([_NOP])
        memories = [snapshot()]
        for _ in range(2):
            uclib.uc_ctl(self._uc._uch, TLB_FLUSH)
            memories.append(snapshot())
        words = [memoryview(memory).cast("Q") for memory in memories]
        steps = [[after - before for before, after in zip(*two, strict=True)] for two in pairwise(words)]
        first, second = ([(steps_of[n], steps_of[n + 1]) for n in range(len(steps_of) - 1)] for steps_of in steps)
        return {
            n for n, (one, two) in enumerate(zip(first, second, strict=True)) if one == (1, two[1] - 1) and not two[0]
        }

    def _find_no_exit_request(self) -> int | None:
        """The byte that decides whether a block is left behind a load whose TLB miss asked for a stop.

        It lies between two that say that the engine was started and is ready.
        """
        self._stop_at_load = True
        if self._loads_on():
            return None
        memory = _read(self._base, self._n_bytes)
        at = memory.find(_READY_FLAGS)
        while at >= 0:
            flag = _byte(self._uc, at + _NO_EXIT_REQUEST_AT)
            flag.value = 1
            found = self._loads_on()
            flag.value = 0
            if found:
                return at + _NO_EXIT_REQUEST_AT
            at = memory.find(_READY_FLAGS, at + 1)
        return None

    def _loads_on(self) -> bool:
        """Whether a block goes on behind a load during which a stop was asked for."""
        uclib.uc_ctl(self._uc._uch, TLB_FLUSH)
        self._uc.reg_write(ppc_const.UC_PPC_REG_4, _DATA_AT)
        self._uc.reg_write(ppc_const.UC_PPC_REG_5, 0)
        self._run([_LOAD, _ADD], limit=_UNCOUNTED)
        return bool(self._uc.reg_read(ppc_const.UC_PPC_REG_5))

    def _fill(self, engine: Any, address: int, access: int, entry: Any, _data: object) -> bool:  # noqa: ANN401
        entry.paddr = address & (_STUB_BYTES - 1) & ~0xFFF
        entry.perms = uc.UC_PROT_ALL
        if access == uc.UC_MEM_READ and self._stop_at_load:
            engine.emu_stop()
        return True


def _stop(engine: Any, _number: int, _data: object) -> None:  # noqa: ANN401
    engine.emu_stop()


def _byte(engine: Any, offset: int) -> ctypes.c_uint8:  # noqa: ANN401
    """A byte of the engine's own structure."""
    return ctypes.c_uint8.from_address(engine_address(engine) + offset)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _read(address: int, n_bytes: int) -> bytes:
    data = _try_read(address, n_bytes)
    if len(data) != n_bytes:
        raise _unknown("processor")
    return data


def _allocation_bytes(address: int) -> int:
    """How much the C library gave out at `address`, by its size word there; 0 when no allocation begins there.

    `malloc_usable_size` believes every address that it is given, and may follow it out of memory.
    """
    word = int.from_bytes(_try_read(address - _SIZE_WORD_BYTES, _SIZE_WORD_BYTES), "little")
    size = (word & ~_CHUNK_FLAGS) - (_SIZE_WORD_BYTES if word & _CHUNK_MAPPED else 0)
    if address % _CHUNK_ALIGN or not _SIZE_WORD_BYTES < size <= _MAX_ALLOCATION_BYTES:
        return 0
    n_bytes = size - _SIZE_WORD_BYTES
    return n_bytes if len(_try_read(address, n_bytes)) == n_bytes else 0


def _read_some(address: int) -> bytes:
    """Up to 128 KiB that can be read from `address`."""
    for shift in range(17, 11, -1):
        data = _try_read(address, 1 << shift)
        if data:
            return data
    return b""


def _try_read(address: int, n_bytes: int) -> bytes:
    buffer = ctypes.create_string_buffer(n_bytes)
    local = _Range(ctypes.addressof(buffer), n_bytes)
    remote = _Range(address, n_bytes)
    n_read = _libc.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return buffer.raw[: max(n_read, 0)]


def _only(memory: bytes, pattern: bytes, what: str, start: int = 0) -> int:
    at = memory.find(pattern, start)
    if at < 0:
        raise _unknown(what)
    return at


def _unknown(what: str) -> HostFault:
    version = uc.__version__
    return HostFault(f"unicorn {version} keeps its {what} in an unknown way: install the release that pefbox names")
