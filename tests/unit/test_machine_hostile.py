"""S5: whatever words a guest executes, the engine comes back with an exit, and runs the next program rightly."""

from __future__ import annotations

import random

import pytest

from services.guest.exits import Crash, Hypercall, MmioLoad, MmioStore, Pause, Ultracall
from services.guest.machine.interrupts import Vector
from services.guest.machine.registers import Dsisr, Msr, Spr
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig
from tests.unit.power_asm import R3, R4

N_PROGRAMS = 100
N_WORDS = 40
MAX_RUNS = 30
EXTENDED = 31
"""The opcode that holds most instructions."""
STATES = (Msr.SF | Msr.ME, Msr.ME, Msr.SF | Msr.ME | Msr.FP | Msr.VEC | Msr.VSX | Msr.EE, Msr.SF | Msr.ME | Msr.PR)


def random_program(chance: random.Random) -> list[int]:
    """Words whose opcodes are all tried, those of opcode 31 most."""
    opcodes = (chance.choice((EXTENDED, chance.randrange(64))) for _ in range(N_WORDS))
    return [opcode << 26 | chance.getrandbits(26) for opcode in opcodes]


@pytest.mark.parametrize("secure", [False, True])
def test_s5_random_code_ends_in_exits_and_leaves_the_engine_usable(secure: bool) -> None:
    chance = random.Random(20)
    rig = MachineRig()
    for _ in range(N_PROGRAMS):
        for vector in Vector:
            rig.put(vector, asm.SC1)
        gprs = {n: chance.choice((0, 0x30000, chance.getrandbits(64))) for n in range(32)}
        rig.begin(*random_program(chance), asm.SC1, gprs=gprs, secure=secure)
        rig.engine._registers.msr = chance.choice(STATES)
        for _ in range(MAX_RUNS):
            exit_ = rig.engine.run(SLICE_NS)
            assert isinstance(exit_, Hypercall | Ultracall | MmioLoad | MmioStore | Crash | Pause)
            if isinstance(exit_, Crash):
                assert "which is no memory" in exit_.reason
                break
            if exit_ is not Pause.SLICE_END:
                rig.engine.resume([0])

    rig.run(*asm.load64(R4, 0x30000), asm.std(R4, 0, R4), asm.ld(R3, 0, R4), asm.SC1)
    assert rig.gpr[R3] == 0x30000


def test_an_atomic_operation_that_does_not_exist_is_a_storage_interrupt() -> None:
    rig = MachineRig()
    rig.put(Vector.DATA_STORAGE, asm.SC1)
    stdat = EXTENDED << 26 | R3 << 21 | R4 << 16 | 0x1F << 11 | 742 << 1
    rig.run(*asm.load64(R4, 0x30000), stdat, gprs={0x1F: 0x1234})

    assert rig.engine._registers.pc == Vector.DATA_STORAGE + 4
    assert rig.spr(Spr.SRR0) == ENTRY + 5 * 4
    assert rig.spr(Spr.DAR) == 0x30000
    assert rig.spr(Spr.DSISR) == Dsisr.BAD_ATOMIC


@pytest.mark.parametrize("extended", [597, 725])
def test_a_string_instruction_whose_count_is_no_register_names_its_address(extended: int) -> None:
    rig = MachineRig()
    rig.put(Vector.ALIGNMENT, asm.SC1)
    word = EXTENDED << 26 | 5 << 21 | R4 << 16 | 8 << 11 | extended << 1
    rig.put(ENTRY, word, little_endian=True)
    rig.engine.start(ENTRY, {R4: 0x30000, 8: 0x1234}, secure=False)
    rig.engine._registers.msr = STATES[0] | Msr.LE
    rig.until_exit()

    assert rig.engine._registers.pc == Vector.ALIGNMENT + 4
    assert rig.spr(Spr.DAR) == 0x30000
