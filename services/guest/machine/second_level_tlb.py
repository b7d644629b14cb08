"""Answers TLB misses of the engine that were answered before, without Python.

The engine's own TLB is small and forgets everything at each change of the process, the kernel's pages too: with this
one behind it such a miss takes nanoseconds instead of microseconds. It is machine code, which the engine calls in the
place of the Python callback (x86-64, which `doctor` asks for); what it does not hold goes on to that callback.

When it has to forget:

- the guest invalidates translations (tlbie, tlbiel): those that it names, `forget_page` and `forget_process`;
- a code page or its shadow changes: what leads there, `forget_place`;
- the partition-scoped map changes: everything, `forget`;
- another process (mtspr PIDR) is no reason: entries of the lower quadrant name their process.

The engine flushes its own TLB for each of these instructions, so they are traps (`replaced.py`), whose flush is
`expected`. It counts its flushes: a count that nobody here knows of means that all entries are of an older generation.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from services.guest.machine.hooks import NativeCallback, address_of, executable
from services.guest.machine.mmu import KERNEL
from services.guest.machine.registers import Msr

N_SETS = 16384
"""The kernel's pages and those of processes have half of them each."""
_HALF_OF_SETS = N_SETS // 2
_N_WAYS = 4
"""One for loads, one for stores, one for fetches, and one that makes an index a shift."""
_ENTRY_BYTES = 32
"""Page and use, context, engine-physical page, permissions."""
_ENTRY_WORDS = _ENTRY_BYTES // 8
_PAGE_SHIFT = 12
_KERNEL_PAGE = KERNEL >> _PAGE_SHIFT
_PROBLEM = int(Msr.PR)
_PID_HASH_SHIFT = 3
_PROBLEM_SHIFT = 2
"""From MSR.PR to the highest bit of a set in its half. A process's buffer is used by the process and by the kernel for
it, in turns and each with permissions of its own: were both to have one entry, each turn would be a miss."""
_FIRST_USE = 16
"""UC_MEM_READ; stores and fetches follow."""
_GENERATION_STEP = 1 << 48
_MAX_PAGES = 1 << 9
"""Larger pages are not looked for one by one: everything is forgotten instead."""
_CODE = bytes.fromhex(
    # An answer that is here and holds is given at once.
    "498b00"  #           mov rax, [r8]          the engine's three counts of flushes
    "4c8b08"  #           mov r9, [rax]
    "4c034808"  #         add r9, [rax+8]
    "4c034810"  #         add r9, [rax+16]
    "4d3b4808"  #         cmp r9, [r8+8]         others than expected?
    "7524"  #             jne miss
    "e859000000"  #       call place
    "4d3b19"  #           cmp r11, [r9]
    "751a"  #             jne miss
    "493b4108"  #         cmp rax, [r9+8]
    "7514"  #             jne miss
    "498b4110"  #         mov rax, [r9+16]
    "488901"  #           mov [rcx], rax
    "418b4118"  #         mov eax, [r9+24]
    "894108"  #           mov [rcx+8], eax
    "b801000000"  #       mov eax, 1
    "c3"  #               ret
    # What the callback answers is kept.
    "56"  # miss:         push rsi
    "52"  #               push rdx
    "51"  #               push rcx
    "4150"  #             push r8
    "4883ec08"  #         sub rsp, 8
    "41ff5030"  #         call [r8+48]
    "4883c408"  #         add rsp, 8
    "4158"  #             pop r8
    "59"  #               pop rcx
    "5a"  #               pop rdx
    "5e"  #               pop rsi
    "84c0"  #             test al, al
    "741f"  #             jz out
    "e81b000000"  #       call place
    "4d8919"  #           mov [r9], r11
    "49894108"  #         mov [r9+8], rax
    "488b01"  #           mov rax, [rcx]
    "49894110"  #         mov [r9+16], rax
    "8b4108"  #           mov eax, [rcx+8]
    "49894118"  #         mov [r9+24], rax
    "b801000000"  #       mov eax, 1
    "c3"  # out:          ret
    # r9: the entry of this miss, r11: its page and use, rax: its context.
    "498b4018"  # place:  mov rax, [r8+24]       PIDR
    "448b10"  #           mov r10d, [rax]
    "4885f6"  #           test rsi, rsi          an address of the kernel?
    "7903"  #             jns lower
    "4531d2"  #           xor r10d, r10d         is of process 0
    "4989f1"  # lower:    mov r9, rsi
    "49c1e90c"  #         shr r9, 12
    "428d04d500000000"  # lea eax, [r10*8]
    "4131c1"  #           xor r9d, eax
    "4181e1ff1f0000"  #   and r9d, N_SETS / 2 - 1
    "498b4010"  #         mov rax, [r8+16]       MSR
    "8b00"  #             mov eax, [rax]
    "c1e802"  #           shr eax, PROBLEM_SHIFT
    "2500100000"  #       and eax, N_SETS / 4    PR
    "4131c1"  #           xor r9d, eax
    "4989f3"  #           mov r11, rsi           the upper half is for the kernel
    "49c1eb3f"  #         shr r11, 63
    "41c1e30d"  #         shl r11d, 13
    "4509d9"  #           or r9d, r11d
    "8d42f0"  #           lea eax, [rdx-16]      the use: UC_MEM_READ is 16
    "4e8d0c88"  #         lea r9, [rax+r9*4]
    "49c1e105"  #         shl r9, 5
    "4d034828"  #         add r9, [r8+40]        the entries
    "4989f3"  #           mov r11, rsi
    "4981e300f0ffff"  #   and r11, -4096
    "4909c3"  #           or r11, rax
    "498b4010"  #         mov rax, [r8+16]       MSR
    "8b00"  #             mov eax, [rax]
    "2531400000"  #       and eax, MSR_BITS      IR, DR, PR and LE
    "49c1e210"  #         shl r10, 16
    "4c09d0"  #           or rax, r10
    "49034020"  #         add rax, [r8+32]       generation
    "c3"  #               ret
)


@dataclass(frozen=True, slots=True)
class Watched:
    """Addresses of what an engine has that decides whether an entry holds."""

    flushes: int
    """Three counts, whose sum changes with each flush."""
    msr: int
    pidr: int


class _State(ctypes.Structure):
    """What the machine code works on (System V: rdi engine, rsi address, edx kind, rcx answer, r8 this)."""

    _fields_ = (
        ("flushes", ctypes.c_void_p),
        ("expected", ctypes.c_uint64),
        ("msr", ctypes.c_void_p),
        ("pidr", ctypes.c_void_p),
        ("generation", ctypes.c_uint64),
        ("entries", ctypes.c_void_p),
        ("miss", ctypes.c_void_p),
    )


class SecondLevelTlb:
    """Of one engine; `miss` is the callback for what is not here. The caller keeps both for as long as the engine."""

    def __init__(self, watched: Watched, miss: Any) -> None:  # noqa: ANN401
        self._entries = bytearray(N_SETS * _N_WAYS * _ENTRY_BYTES)
        self._pin_entries = ctypes.c_char.from_buffer(self._entries)
        self._pid = ctypes.c_uint32.from_address(watched.pidr)
        self._msr = ctypes.c_uint64.from_address(watched.msr)
        self._words = memoryview(self._entries).cast("Q")
        self._kept: dict[int, tuple[int, int]] = {}
        """What the entry at an index into `_words` was last noted for: engine-physical page and process. The two that
        follow are the same the other way round, so that all three are bounded, whatever a guest does."""
        self._of_process: defaultdict[int, set[int]] = defaultdict(set)
        self._of_place: defaultdict[int, set[int]] = defaultdict(set)
        """The true page, not its shadow."""
        self._counts = memoryview((ctypes.c_uint64 * 3).from_address(watched.flushes)).cast("B").cast("Q")
        self._state = _State(watched.flushes, msr=watched.msr, pidr=watched.pidr, miss=address_of(miss))
        self._state.entries = ctypes.addressof(self._pin_entries)
        self.native = NativeCallback(executable(_CODE), self._state)
        """What the engine has to call for a miss."""
        self._generation = 0
        self.forget()

    def forget(self) -> None:
        """No entry holds any more."""
        self._generation += _GENERATION_STEP
        if self._generation >> 64:
            # Generations begin anew: an entry must not come to life again.
            self._entries[:] = bytes(len(self._entries))
            self._generation = _GENERATION_STEP
        self._state.generation = self._generation
        self._of_process.clear()
        self._of_place.clear()
        self._kept.clear()
        self.expect_flush()

    def note(self, address: int, kind: int, page: int) -> None:
        """A miss of `kind` at `address` gets the engine-physical `page` or its shadow, and the answer will be kept."""
        pid = 0 if address & KERNEL else self._pid.value
        at = _entry_at(address >> _PAGE_SHIFT, kind - _FIRST_USE, pid, self._msr.value & _PROBLEM)
        before = self._kept.get(at)
        if before == (page, pid):
            return
        if before is not None:
            _take_out(self._of_place, before[0], at)
            _take_out(self._of_process, before[1], at)
        self._kept[at] = page, pid
        self._of_place[page].add(at)
        self._of_process[pid].add(at)

    def forget_page(self, address: int, shift: int, pid: int) -> None:
        """No entry of the 1 << `shift` bytes from `address` on, of process `pid`, holds any more."""
        n_pages = 1 << (shift - _PAGE_SHIFT)
        if n_pages > _MAX_PAGES:
            self.forget()
            return
        words, first = self._words, address >> _PAGE_SHIFT
        for page in range(first, first + n_pages):
            for problem in (0, _PROBLEM):
                at = _entry_at(page, 0, pid, problem)
                for way in range(at, at + _N_WAYS * _ENTRY_WORDS, _ENTRY_WORDS):
                    if words[way] >> _PAGE_SHIFT == page:
                        words[way + 1] = 0

    def forget_process(self, pid: int) -> None:
        """No entry of process `pid`, which is not the kernel's, holds any more."""
        words = self._words
        for at in self._of_process.pop(pid, ()):
            words[at + 1] = 0
            _take_out(self._of_place, self._kept.pop(at)[0], at)

    def forget_place(self, page: int) -> None:
        """No entry that leads to the engine-physical `page` or its shadow holds any more."""
        for at in self._of_place.pop(page, ()):
            self._words[at + 1] = 0
            _take_out(self._of_process, self._kept.pop(at)[1], at)

    def expect_flush(self) -> None:
        """The engine has flushed its TLB for a reason that is none here."""
        self._state.expected = sum(self._counts)

    def notice_flushes(self) -> None:
        """Forget what is here if the engine flushed its TLB: the guest invalidated something. To be called before each
        answer to a miss, and before a flush that is expected."""
        if sum(self._counts) != self._state.expected:
            self.forget()


def _take_out(sets: dict[int, set[int]], key: int, at: int) -> None:
    members = sets[key]
    members.discard(at)
    if not members:
        del sets[key]


def _entry_at(page: int, way: int, pid: int, problem: int) -> int:
    """As the machine code finds it; `problem` is MSR.PR or 0."""
    half = _HALF_OF_SETS if page & _KERNEL_PAGE else 0
    in_half = (page ^ pid << _PID_HASH_SHIFT) % _HALF_OF_SETS ^ problem >> _PROBLEM_SHIFT
    return ((in_half | half) * _N_WAYS + way) * _ENTRY_WORDS
