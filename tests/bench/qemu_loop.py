"""The loop of `mips_loop` under QEMU's TCG, as its firmware, which says on the terminal when it begins and ends."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from protocol.hcalls import H_PUT_TERM_CHAR
from services.guest.machine.registers import Spr
from tests.bench.boot import QEMU, read_until
from tests.unit import power_asm as asm
from tests.unit.power_asm import R3, R4, R5, R6

N_TIMES = 100_000_000
"""Half a second, beside which the way of a character to us is nothing."""
_ENTRY = 0x100
_TERMINAL = 0x7100_0000
_BEGIN, _END = "<", ">"


def mips(loop: tuple[int, ...], data: int) -> float:
    """Million instructions a second of `loop`, which works on memory at `data` and counts CTR down."""
    code = asm.program(
        *_say(_BEGIN),
        *asm.load64(R3, N_TIMES),
        asm.mtspr(Spr.CTR, R3),
        *asm.load64(R4, data),
        *loop,
        *_say(_END),
        asm.b(0),
    )
    with tempfile.NamedTemporaryFile(prefix="pefbox-loop-") as file:
        Path(file.name).write_bytes(bytes(_ENTRY) + code)
        return N_TIMES * len(loop) / _seconds(file.name) / 1e6


def _say(character: str) -> tuple[int, ...]:
    value = ord(character) << 56
    registers = ((R3, H_PUT_TERM_CHAR.number), (R4, _TERMINAL), (R5, 1), (R6, value))
    return (*(word for register, number in registers for word in asm.load64(register, number)), asm.SC1)


def _seconds(firmware: str) -> float:
    words = [QEMU, "-M", "pseries", "-accel", "tcg", "-m", "256M", "-smp", "1", "-nodefaults", "-display", "none"]
    words += ["-monitor", "none", "-serial", "stdio", "-bios", firmware]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        read_until(process, _BEGIN)
        started = time.perf_counter()
        read_until(process, _END)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.communicate()
