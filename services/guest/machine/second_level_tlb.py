"""Answers TLB misses of the engine that were answered before, without Python.

The engine's own TLB is small and forgets everything at each change of the process, the kernel's pages too: with this
one behind it such a miss takes nanoseconds instead of microseconds. It is machine code, which the engine calls in the
place of the Python callback (x86-64, which `doctor` asks for); what it does not hold goes on to that callback.

It has two tables: of pages of 4 KiB, which is what the engine asks for, and of blocks of 64 KiB, for what the guest's
own page tables and the partition-scoped map give as a whole: a new block costs one miss in Python and not sixteen.

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

from protocol.geometry import PAGE_SHIFT
from services.guest.machine.hooks import NativeCallback, address_of, executable
from services.guest.machine.mmu import KERNEL
from services.guest.machine.registers import Msr

N_SETS = 16384
"""Of the table of single pages. The kernel's and those of processes have half of them each."""
N_BLOCK_SETS = 8192
"""Of the table of blocks."""
BLOCK_SHIFT = PAGE_SHIFT
"""A block is a frame of the partition-scoped map."""
_N_WAYS = 4
"""One for loads, one for stores, one for fetches, and one that makes an index a shift."""
_ENTRY_BYTES = 32
"""Page and use, context, engine-physical page, permissions."""
_ENTRY_WORDS = _ENTRY_BYTES // 8
_SMALL_SHIFT = 12
_PROBLEM = int(Msr.PR)
_PID_HASH_SHIFT = 3
_CONTEXT_BITS = int(Msr.IR | Msr.DR | Msr.PR | Msr.LE)
_CONTEXT_PID_SHIFT = 16
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
    "0f858d000000"  #             jne miss
    "e8c2000000"  #       call place
    "4d3b19"  #           cmp r11, [r9]
    "751a"  #             jne block
    "493b4108"  #         cmp rax, [r9+8]
    "7514"  #             jne block
    "498b4110"  #         mov rax, [r9+16]
    "488901"  # answer:   mov [rcx], rax
    "418b4118"  #         mov eax, [r9+24]
    "894108"  #           mov [rcx+8], eax
    "b801000000"  #       mov eax, 1
    "c3"  #               ret
    # Else the answer for the whole block, r10 being the process << 16.
    "4989f1"  # block:   mov r9, rsi
    "49c1e910"  #         shr r9, 16
    "49c1ea0d"  #         shr r10, 13
    "4531d1"  #           xor r9d, r10d
    "4181e1ff0f0000"  #   and r9d, N_BLOCK_SETS / 2 - 1
    "4189c2"  #           mov r10d, eax
    "4181e200400000"  #   and r10d, PR
    "41c1ea03"  #         shr r10d, BLOCK_PROBLEM_SHIFT
    "4531d1"  #           xor r9d, r10d
    "4989f2"  #           mov r10, rsi             the upper half is for the kernel
    "49c1ea3f"  #         shr r10, 63
    "41c1e20c"  #         shl r10d, 12
    "4509d1"  #           or r9d, r10d
    "448d52f0"  #         lea r10d, [rdx-16]
    "4f8d0c8a"  #         lea r9, [r10+r9*4]
    "49c1e105"  #         shl r9, 5
    "4d034838"  #         add r9, [r8+56]          the entries of blocks
    "4989f3"  #           mov r11, rsi
    "4981e30000ffff"  #   and r11, -65536
    "4d09d3"  #           or r11, r10
    "4d3b19"  #           cmp r11, [r9]
    "7513"  #             jne miss
    "493b4108"  #         cmp rax, [r9+8]
    "750d"  #             jne miss
    "89f0"  #             mov eax, esi
    "2500f00000"  #       and eax, 0xF000
    "49034110"  #         add rax, [r9+16]
    "eb87"  #             jmp answer
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
        ("blocks", ctypes.c_void_p),
    )


class _Table:
    """Entries for pieces of 1 << `shift` bytes. Which of them hold is kept by place and process, for `forget_...`."""

    def __init__(self, shift: int, n_sets: int) -> None:
        self._shift = shift
        self._half = n_sets // 2
        self._kernel = KERNEL >> shift
        self._problem_shift = problem_shift(n_sets)
        self._entries = bytearray(n_sets * _N_WAYS * _ENTRY_BYTES)
        self._pin = ctypes.c_char.from_buffer(self._entries)
        self.words = memoryview(self._entries).cast("Q")
        self._kept: dict[int, tuple[int, int]] = {}
        """What the entry at an index into `words` was last noted for: place and process. The two that follow are the
        same the other way round, so that all three are bounded, whatever a guest does."""
        self._of_process: defaultdict[int, set[int]] = defaultdict(set)
        self._of_place: defaultdict[int, set[int]] = defaultdict(set)

    @property
    def address(self) -> int:
        """Where the entries lie."""
        return ctypes.addressof(self._pin)

    def at(self, address: int, way: int, pid: int, problem: int) -> int:
        """Index into `words` of an entry, as the machine code finds it; `problem` is MSR.PR or 0.

        A process's buffer is used by the process and by the kernel for it, in turns and each with permissions of its
        own: were both to have one entry, each turn would be a miss.
        """
        piece = address >> self._shift
        half = self._half if piece & self._kernel else 0
        in_half = (piece ^ pid << _PID_HASH_SHIFT) % self._half ^ problem >> self._problem_shift
        return ((in_half | half) * _N_WAYS + way) * _ENTRY_WORDS

    def note(self, at: int, place: int, pid: int) -> None:
        """The entry at `at` will lead to `place` for process `pid`."""
        before = self._kept.get(at)
        if before == (place, pid):
            return
        if before is not None:
            _take_out(self._of_place, before[0], at)
            _take_out(self._of_process, before[1], at)
        self._kept[at] = place, pid
        self._of_place[place].add(at)
        self._of_process[pid].add(at)

    def clear(self) -> None:
        """No entry holds any more, since the generation is another."""
        self._of_process.clear()
        self._of_place.clear()
        self._kept.clear()

    def erase(self) -> None:
        """As if there had never been an entry."""
        self._entries[:] = bytes(len(self._entries))

    def forget_page(self, address: int, shift: int, pid: int) -> None:
        """No entry of the 1 << `shift` bytes from `address` on, of process `pid`, holds any more."""
        words = self.words
        for piece in range(address >> self._shift, (address + (1 << shift) - 1 >> self._shift) + 1):
            for problem in (0, _PROBLEM):
                at = self.at(piece << self._shift, 0, pid, problem)
                for way in range(at, at + _N_WAYS * _ENTRY_WORDS, _ENTRY_WORDS):
                    if words[way] >> self._shift == piece:
                        words[way + 1] = 0

    def forget_process(self, pid: int) -> None:
        """No entry of process `pid`, which is not the kernel's, holds any more."""
        for at in self._of_process.pop(pid, ()):
            self.words[at + 1] = 0
            _take_out(self._of_place, self._kept.pop(at)[0], at)

    def forget_place(self, place: int) -> None:
        """No entry that leads to `place` holds any more."""
        for at in self._of_place.pop(place, ()):
            self.words[at + 1] = 0
            _take_out(self._of_process, self._kept.pop(at)[1], at)


class SecondLevelTlb:
    """Of one engine; `miss` is the callback for what is not here. The caller keeps both for as long as the engine."""

    def __init__(self, watched: Watched, miss: Any) -> None:  # noqa: ANN401
        self._pages = _Table(_SMALL_SHIFT, N_SETS)
        """By the true page, not its shadow."""
        self._blocks = _Table(BLOCK_SHIFT, N_BLOCK_SETS)
        self._pid = ctypes.c_uint32.from_address(watched.pidr)
        self._msr = ctypes.c_uint64.from_address(watched.msr)
        self._counts = memoryview((ctypes.c_uint64 * 3).from_address(watched.flushes)).cast("B").cast("Q")
        self._state = _State(watched.flushes, msr=watched.msr, pidr=watched.pidr, miss=address_of(miss))
        self._state.entries, self._state.blocks = self._pages.address, self._blocks.address
        self.native = NativeCallback(executable(_CODE), self._state)
        """What the engine has to call for a miss."""
        self._generation = 0
        self.forget()

    def forget(self) -> None:
        """No entry holds any more."""
        self._generation += _GENERATION_STEP
        if self._generation >> 64:
            # Generations begin anew: an entry must not come to life again.
            self._pages.erase()
            self._blocks.erase()
            self._generation = _GENERATION_STEP
        self._state.generation = self._generation
        self._pages.clear()
        self._blocks.clear()
        self.expect_flush()

    def note(self, address: int, kind: int, page: int) -> None:
        """A miss of `kind` at `address` gets the engine-physical `page` or its shadow, and the answer will be kept."""
        pid = 0 if address & KERNEL else self._pid.value
        at = self._pages.at(address, kind - _FIRST_USE, pid, self._msr.value & _PROBLEM)
        self._pages.note(at, page, pid)

    def note_block(self, address: int, kind: int, page: int, permissions: int) -> None:
        """What a miss of `kind` at `address` gets, the engine-physical `page` with `permissions`, holds for all pages
        of the block around it."""
        pid, msr = 0 if address & KERNEL else self._pid.value, self._msr.value
        at = self._blocks.at(address, kind - _FIRST_USE, pid, msr & _PROBLEM)
        block = page >> BLOCK_SHIFT
        self._blocks.note(at, block, pid)
        words = self._blocks.words
        words[at] = address >> BLOCK_SHIFT << BLOCK_SHIFT | kind - _FIRST_USE
        words[at + 1] = (msr & _CONTEXT_BITS | pid << _CONTEXT_PID_SHIFT) + self._generation
        words[at + 2] = block << BLOCK_SHIFT
        words[at + 3] = permissions

    def forget_page(self, address: int, shift: int, pid: int) -> None:
        """No entry of the 1 << `shift` bytes from `address` on, of process `pid`, holds any more."""
        if 1 << (shift - _SMALL_SHIFT) > _MAX_PAGES:
            self.forget()
            return
        self._pages.forget_page(address, shift, pid)
        self._blocks.forget_page(address, shift, pid)

    def forget_process(self, pid: int) -> None:
        """No entry of process `pid`, which is not the kernel's, holds any more."""
        self._pages.forget_process(pid)
        self._blocks.forget_process(pid)

    def forget_place(self, page: int) -> None:
        """No entry that leads to the engine-physical `page` or its shadow holds any more."""
        self._pages.forget_place(page)
        self._blocks.forget_place(page >> BLOCK_SHIFT)

    def expect_flush(self) -> None:
        """The engine has flushed its TLB for a reason that is none here."""
        self._state.expected = sum(self._counts)

    def notice_flushes(self) -> None:
        """Forget what is here if the engine flushed its TLB: the guest invalidated something. To be called before each
        answer to a miss, and before a flush that is expected."""
        if sum(self._counts) != self._state.expected:
            self.forget()


def problem_shift(n_sets: int) -> int:
    """From MSR.PR to the highest bit of a set in its half."""
    return _PROBLEM.bit_length() - (n_sets // 2).bit_length() + 1


def _take_out(sets: dict[int, set[int]], key: int, at: int) -> None:
    members = sets[key]
    members.discard(at)
    if not members:
        del sets[key]
