"""A VM whose guest is real POWER code, in a cluster of real processes: it prints, idles, and powers off."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path

import pytest
import trio

from deploy.api import cluster
from protocol.hcalls import H_CEDE, H_PUT_TERM_CHAR, H_RTAS
from protocol.rtas import POWER_OFF
from services.guest.machine.interrupts import Vector
from services.guest.machine.registers import Spr
from tests.cluster.vm_files import console_until
from tests.unit import power_asm as asm
from tests.unit.power_asm import R3, R4, R5, R6, R7
from tests.unit.program_files import BASE, elf_file

TEXT = b"code on POWER\r\n\0"
BLOCK_AT = 0x400
"""RTAS arguments, behind the code."""
SPIN_SECONDS = 0.2
TICKS_20_MS = 20_000 * 512

_CLUSTER = """
[hosts.alpha]
secure_memory = "64M"

[vms.vm1]
host = "alpha"
memory = "64M"
time = "{time}"

[vms.vm1.guest]
kernel = "machine"
boot = "program"
image = "{image}"
"""


def store(at: int, code: bytes) -> list[int]:
    """Instructions that write `code` to a low address: the program brings its own interrupt vectors."""
    words = struct.unpack(f">{len(code) // 4}I", code)
    stores = [
        (asm.lis(R6, word >> 16), asm.ori(R6, R6, word & 0xFFFF), asm.stw(R6, at + 4 * n, 0))
        for n, word in enumerate(words)
    ]
    return [instruction for three in stores for instruction in three]


def hello() -> bytes:
    """Writes TEXT and idles for 20 ms; the decrementer's handler powers off."""
    first, second = (int.from_bytes(TEXT[at : at + 8], "big") for at in (0, 8))
    power_off = asm.program(*asm.load64(R4, BASE + BLOCK_AT), *asm.load64(R3, H_RTAS.number), asm.SC1, asm.b(0))
    code = asm.program(
        *store(Vector.DECREMENTER, power_off),
        asm.li(R3, H_PUT_TERM_CHAR.number),
        asm.li(R4, 0),
        asm.li(R5, len(TEXT) - 1),
        *asm.load64(R6, first),
        *asm.load64(R7, second),
        asm.SC1,
        *asm.load64(R4, TICKS_20_MS),
        asm.mtspr(Spr.DEC, R4),
        asm.li(R3, H_CEDE.number),
        asm.SC1,
        asm.b(0),
    )
    assert len(code) <= BLOCK_AT
    block = struct.pack(">6I", POWER_OFF, 2, 1, 0, 0, 0)
    return elf_file([(BASE, code.ljust(BLOCK_AT, b"\0") + block, 0x1000)])


@pytest.mark.parametrize("time", ["wall", "instructions"])
async def test_a_program_prints_idles_until_its_decrementer_and_powers_off(tmp_path: Path, time: str) -> None:
    image = tmp_path / "hello.elf"
    image.write_bytes(hello())
    file = tmp_path / "c.toml"
    file.write_text(_CLUSTER.format(image=image, time=time))

    async with cluster(file) as running:
        vm = running.vm("vm1")
        assert TEXT.decode().rstrip("\0") in await console_until(vm, "POWER\r\n")
        row = await vm.wait_state("off")

    assert not row.reason


@pytest.mark.parametrize("time", ["wall", "instructions"])
async def test_an_engine_that_crashes_fails_its_vm_says_where_and_leaves_the_host_alone(
    tmp_path: Path, time: str
) -> None:
    image = tmp_path / "spin.elf"
    image.write_bytes(elf_file([(BASE, asm.program(asm.b(0)), 0x1000)]))
    file = tmp_path / "c.toml"
    file.write_text(_CLUSTER.format(image=image, time=time))

    async with cluster(file) as running:
        vm = running.vm("vm1")
        await vm.wait_state("running")
        await trio.sleep(SPIN_SECONDS)
        await vm.guest.send_signal(signal.SIGSEGV)
        row = await vm.wait_state("failed")
        assert "SIGSEGV" in row.reason
        assert (await running.process("alpha/kvm").row()).state == "running"
        (line,) = [json.loads(line) for line in vm.guest.log().splitlines() if "the engine crashed" in line]
        assert line["signal"] == "SIGSEGV"
        assert int(line["pc"], 16) == BASE
        # Blocks are known where instructions are counted.
        assert line.get("block") == (f"{BASE:#x}" if time == "instructions" else None)
