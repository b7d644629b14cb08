"""The interrupt presentation controller by hypercall. Source: PAPR 14.5.4.6; Linux arch/powerpc/sysdev/xics."""

from __future__ import annotations

from protocol.codes import HCode
from protocol.hcalls import H_CPPR, H_EOI, H_XIRR
from services.guest.model.cpu import Cpu, Panic, Step

ALLOW_ALL = 0xFF
SOURCE_MASK = 0xFFFFFF


def open_interrupts(cpu: Cpu) -> Step[None]:
    """Let every priority through."""
    yield from cpu.hcall(H_CPPR, ALLOW_ALL)


def accept(cpu: Cpu) -> Step[int]:
    """Take the most favoured interrupt: its XIRR, 0 in the low 24 bits when there is none."""
    result = yield from cpu.hcall(H_XIRR, ALLOW_ALL)
    if result[0] != HCode.H_SUCCESS or len(result) < 2:
        raise Panic(f"H_XIRR gave {result[0]}")
    return result[1] & 0xFFFFFFFF


def end(cpu: Cpu, xirr: int) -> Step[None]:
    """Done with it; the old priority comes back."""
    yield from cpu.hcall(H_EOI, xirr)
