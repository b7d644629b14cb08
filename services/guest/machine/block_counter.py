"""Counts instructions and stops the engine at a limit, once a block of translated code instead of once an instruction.

The engine's own count costs a call for every instruction. Its block callback comes once for each run of code without a
branch, with the block's address and size: a callback of a few host instructions adds the size up, and has the engine
stop before a block that would pass the limit. Written in machine code, since a Python function would cost more than
the block; `doctor` lets only x86-64 hosts run pefbox anyway.

Where a block ended early (a fault, an exception), how far it came follows from the program counter.
"""

from __future__ import annotations

import ctypes
from typing import Any

import unicorn as uc
from unicorn.unicorn_py3.unicorn import uclib

from services.guest.machine.hooks import NativeCallback, add_hook, address_of, executable
from services.guest.machine.registers import WORD_BYTES

MAX_BLOCK_INSTRUCTIONS = 1024
"""Blocks end with their page of 4 KiB: a slice stops at most so many instructions before its limit."""
_CALLBACK = bytes.fromhex(
    "48897108"  # mov [rcx+8], rsi     the block's address
    "c1ea02"  #   shr edx, 2
    "48895110"  # mov [rcx+16], rdx    its instructions
    "480111"  #   add [rcx], rdx       begun in all
    "488b01"  #   mov rax, [rcx]
    "483b4118"  # cmp rax, [rcx+24]    the limit
    "7701"  #     ja .+3
    "c3"  #       ret
    "c7412801000000"  # mov dword [rcx+40], 1   stopped
    "ff6120"  #   jmp [rcx+32]         uc_emu_stop, for the engine in rdi
)


class _Counts(ctypes.Structure):
    """What the callback works on, in its order (System V: rdi engine, rsi address, edx size, rcx this)."""

    _fields_ = (
        ("begun", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("stop", ctypes.c_void_p),
        ("stopped", ctypes.c_uint64),
    )


class BlockCounter:
    """Of one engine, which it outlives."""

    def __init__(self, engine: Any) -> None:  # noqa: ANN401
        self._counts = _Counts(stop=address_of(uclib.uc_emu_stop))
        self._native = NativeCallback(executable(_CALLBACK), self._counts)
        add_hook(engine, uc.UC_HOOK_BLOCK, self._native)

    def begin(self, limit: int) -> None:
        """The engine is about to run at most `limit` instructions. The last address stays: a fault may ask for it."""
        counts = self._counts
        counts.begun = counts.size = counts.stopped = 0
        counts.limit = limit

    @property
    def stopped(self) -> bool:
        """Whether the limit ended the run."""
        return bool(self._counts.stopped)

    @property
    def address(self) -> int:
        """Effective address of the block that was begun last."""
        return int(self._counts.address)

    def retired(self, pc: int, *, fetch: bool) -> int:
        """Instructions that ran since `begin`; the engine stopped at `pc`, with `fetch` since it could not go there."""
        counts = self._counts
        begun: int = counts.begun
        if fetch:
            return begun
        before: int = begun - counts.size
        if self.stopped:
            return before
        # A block that a branch left is whole: only one that `pc` lies in, or just behind, was cut short.
        into = (pc - counts.address) // WORD_BYTES
        return before + into if 0 <= into <= counts.size else begun
