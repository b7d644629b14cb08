"""What the engine calls for an exception: machine code for the frequent ones, the Python callback for the others.

System calls of Linux's processes (`sc`, and `scv` with `rfscv`) come thousands of times a second, and so do stores to
PIDR, which change the process; to flush one it does a tlbiel for each of the 128 sets of a POWER9's TLB. The way to
Python and back would cost ten times what is done. What machine code does here `Interrupts` and `Instructions` do as
well, and it leaves to them whatever is special: a processor that is traced, a process that may not, a facility that is
off, a flush of the engine's TLB that nobody here knows of.

`scv`, `rfscv`, `tlbiel` and stores to PIDR come as `sc` with levels of ours (`replaced.py`).
"""

from __future__ import annotations

import ctypes
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

from services.guest.machine.hooks import NativeCallback, address_of, executable
from services.guest.machine.interrupts import KEPT, KEPT_BY_SCV, Entry, Interrupts, Vector
from services.guest.machine.register_file import ExceptionRegisters
from services.guest.machine.registers import SRR1_FROM_MSR, Msr

_CODE = bytes.fromhex(
    "83fe08"  #         cmp esi, SYSTEM_CALL
    "755c"  #         jne python
    "488b02"  #         mov rax, [rdx+LEVEL]
    "8b00"  #         mov eax, [rax]
    "488b4a08"  #         mov rcx, [rdx+MSR]
    "4c8b01"  #         mov r8, [rcx]
    "41f7c000040000"  #         test r8d, SE                      traced?
    "7547"  #         jnz python
    "85c0"  #         test eax, eax
    "7446"  #         jz sc
    "83f807"  #         cmp eax, SCV_LEVEL
    "0f8498000000"  #         je scv
    "41f7c000400000"  #         test r8d, PR                      a process may not
    "7531"  #         jnz python
    "83f806"  #         cmp eax, SLBIA_LEVEL
    "742b"  #         je out
    "83f808"  #         cmp eax, RFSCV_LEVEL
    "0f84f2000000"  #         je rfscv
    "83e820"  #         sub eax, TLBIEL_LEVEL
    "83f820"  #         cmp eax, 32
    "0f834f010000"  #         jae pidr
    "488b4a18"  #         mov rcx, [rdx+GPRS]
    "488b04c1"  #         mov rax, [rcx+rax*8]              RB
    "a9000c0000"  #         test eax, IS                      of an address?
    "7408"  #         jz python
    "a900f0ff00"  #         test eax, SET                     of the only set there is?
    "7401"  #         jz python
    "c3"  # out:    ret
    "ff6238"  # python: jmp [rdx+PYTHON]
    "4c8b4a20"  # sc:     mov r9, [rdx+SPRS]
    "488b4a10"  #         mov rcx, [rdx+PC]
    "488b01"  #         mov rax, [rcx]
    "498981d0000000"  #         mov [r9+SRR0*8], rax
    "4c89c0"  #         mov rax, r8
    "48234250"  #         and rax, [rdx+FROM_MSR]
    "480b4258"  #         or rax, [rdx+SECURE]
    "498981d8000000"  #         mov [r9+SRR1*8], rax
    "4c89c1"  #         mov rcx, r8
    "4c234260"  #         and r8, [rdx+KEPT_BY_SC]
    "4c8d4a70"  #         lea r9, [rdx+SC_ENTRY]
    "83e130"  # enter:  and ecx, IR|DR                    rcx: MSR, r8: what is kept of it, r9: where to
    "83f930"  #         cmp ecx, IR|DR
    "7504"  #         jne real
    "4983c110"  #         add r9, 16
    "4d0b01"  # real:   or r8, [r9]
    "498b4108"  #         mov rax, [r9+8]
    "488b4a10"  #         mov rcx, [rdx+PC]
    "488901"  #         mov [rcx], rax
    "4150"  #         push r8
    "488b4228"  #         mov rax, [rdx+WRITE]
    "be4d000000"  #         mov esi, REG_MSR
    "4889e2"  #         mov rdx, rsp
    "ffd0"  #         call rax
    "58"  #         pop rax
    "c3"  #         ret
    "4c8b4a20"  # scv:    mov r9, [rdx+SPRS]
    "41f781c804000000100000"  #         test dword ptr [r9+FSCR*8], FSCR_SCV
    "7491"  #         jz python
    "53"  #         push rbx
    "4154"  #         push r12
    "4155"  #         push r13
    "4883ec10"  #         sub rsp, 16
    "4889d3"  #         mov rbx, rdx
    "4989fc"  #         mov r12, rdi
    "4d89c5"  #         mov r13, r8
    "be4a000000"  #         mov esi, REG_LR                   LR: where it returns to
    "488b5310"  #         mov rdx, [rbx+PC]
    "ff5328"  #         call [rbx+WRITE]
    "4c89e8"  #         mov rax, r13
    "48234350"  #         and rax, [rbx+FROM_MSR]
    "480b4358"  #         or rax, [rbx+SECURE]
    "48890424"  #         mov [rsp], rax
    "4c89e7"  #         mov rdi, r12
    "be4c000000"  #         mov esi, REG_CTR                  CTR: the MSR
    "4889e2"  #         mov rdx, rsp
    "ff5328"  #         call [rbx+WRITE]
    "4c89e7"  #         mov rdi, r12
    "4889da"  #         mov rdx, rbx
    "4c89e9"  #         mov rcx, r13
    "4d89e8"  #         mov r8, r13
    "4883c410"  #         add rsp, 16
    "415d"  #         pop r13
    "415c"  #         pop r12
    "5b"  #         pop rbx
    "4c234268"  #         and r8, [rdx+KEPT_BY_SCV]
    "4c8d8a90000000"  #         lea r9, [rdx+SCV_ENTRY]
    "e963ffffff"  #         jmp enter
    "53"  # rfscv:  push rbx
    "4154"  #         push r12
    "4155"  #         push r13
    "4883ec10"  #         sub rsp, 16
    "4889d3"  #         mov rbx, rdx
    "4989fc"  #         mov r12, rdi
    "4d89c5"  #         mov r13, r8
    "be4a000000"  #         mov esi, REG_LR
    "4889e2"  #         mov rdx, rsp
    "ff5330"  #         call [rbx+READ]
    "488b0424"  #         mov rax, [rsp]
    "4883e0fc"  #         and rax, -4
    "488b4b10"  #         mov rcx, [rbx+PC]
    "488901"  #         mov [rcx], rax
    "4c89e7"  #         mov rdi, r12
    "be4c000000"  #         mov esi, REG_CTR
    "4889e2"  #         mov rdx, rsp
    "ff5330"  #         call [rbx+READ]
    "488b0424"  #         mov rax, [rsp]
    "480fbaf016"  #         btr rax, S_BIT
    "4181e500100000"  #         and r13d, ME
    "4c09e8"  #         or rax, r13
    "48890424"  #         mov [rsp], rax
    "4c89e7"  #         mov rdi, r12
    "be4d000000"  #         mov esi, REG_MSR
    "4889e2"  #         mov rdx, rsp
    "ff5328"  #         call [rbx+WRITE]
    "4883c410"  #         add rsp, 16
    "415d"  #         pop r13
    "415c"  #         pop r12
    "5b"  #         pop rbx
    "c3"  #         ret
    "83e820"  # pidr:   sub eax, 32
    "83f820"  #         cmp eax, 32
    "0f83bcfeffff"  #         jae python
    "4c8b4a40"  #         mov r9, [rdx+TRANSLATIONS]
    "498b09"  #         mov rcx, [r9+FLUSHES]             the engine's counts of flushes
    "4c8b11"  #         mov r10, [rcx]
    "4c035108"  #         add r10, [rcx+8]
    "4c035110"  #         add r10, [rcx+16]
    "4d3b5108"  #         cmp r10, [r9+EXPECTED]            others than expected?
    "0f85a0feffff"  #         jne python
    "488b4a18"  #         mov rcx, [rdx+GPRS]
    "8b04c1"  #         mov eax, [rcx+rax*8]              RS
    "488b4a20"  #         mov rcx, [rdx+SPRS]
    "48898180010000"  #         mov [rcx+PIDR*8], rax
    "4151"  #         push r9
    "be0b000040"  #         mov esi, TLB_FLUSH
    "31c0"  #         xor eax, eax                      no vector registers for `...`
    "ff5248"  #         call [rdx+CONTROL]
    "4159"  #         pop r9
    "498b09"  #         mov rcx, [r9+FLUSHES]
    "488b01"  #         mov rax, [rcx]
    "48034108"  #         add rax, [rcx+8]
    "48034110"  #         add rax, [rcx+16]
    "49894108"  #         mov [r9+EXPECTED], rax            this flush was expected
    "c3"  #         ret
)


class _Entry(ctypes.Structure):
    _fields_ = (("msr", ctypes.c_uint64), ("pc", ctypes.c_uint64))


class _State(ctypes.Structure):
    """What the machine code works on (System V: rdi engine, esi exception, rdx this)."""

    _fields_ = (
        ("level", ctypes.c_void_p),
        ("msr", ctypes.c_void_p),
        ("pc", ctypes.c_void_p),
        ("gprs", ctypes.c_void_p),
        ("sprs", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("python", ctypes.c_void_p),
        ("translations", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
        ("from_msr", ctypes.c_uint64),
        ("secure", ctypes.c_uint64),
        ("kept_by_sc", ctypes.c_uint64),
        ("kept_by_scv", ctypes.c_uint64),
        ("sc_entry", _Entry * 2),
        ("scv_entry", _Entry * 2),
    )


class NativeExceptions:
    """Of one engine; `python` is the callback for all else, `translations` where the second-level TLB has its state.
    The caller keeps all three for as long as the engine."""

    def __init__(
        self,
        registers: ExceptionRegisters,
        interrupts: Interrupts,
        python: Any,  # noqa: ANN401
        translations: int,
    ) -> None:
        self._interrupts = interrupts
        self._state = _State(
            registers.level,
            registers.msr,
            registers.pc,
            registers.gprs,
            registers.sprs,
            address_of(uclib.uc_reg_write),
            address_of(uclib.uc_reg_read),
            address_of(python),
            translations,
            address_of(uclib.uc_ctl),
            SRR1_FROM_MSR,
            kept_by_sc=KEPT,
            kept_by_scv=KEPT_BY_SCV,
        )
        self.native = NativeCallback(executable(_CODE), self._state)
        """What the engine has to call for an exception."""
        interrupts.on_mode = self._follow
        self._follow()

    def _follow(self) -> None:
        """Another mode is in use."""
        interrupts, state = self._interrupts, self._state
        state.secure = Msr.S if interrupts.mode.secure else 0
        for relocated in (False, True):
            state.sc_entry[relocated] = _entry(interrupts.entry(Vector.SYSTEM_CALL, translated=relocated))
            state.scv_entry[relocated] = _entry(interrupts.scv_entry(0, translated=relocated))


def _entry(entry: Entry) -> _Entry:
    return _Entry(entry.msr, entry.pc)
