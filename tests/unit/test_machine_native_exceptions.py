"""Machine code for exceptions does what Python does: programs run on two engines, of which one calls Python alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.guest.machine.engine import MachineEngine
from services.guest.machine.hooks import address_of
from services.guest.machine.interrupts import AIL_RELOCATED, InterruptMode, Vector
from services.guest.machine.registers import Fscr, Msr, Spr
from services.guest.machine.state import RegisterState
from tests.unit import power_asm as asm
from tests.unit.power_asm import R4, R5, R6, R7
from tests.unit.translated_rig import CODE, CODE_AT, KERNEL_AT, SCV_AT, Translated

MSRS = [int(Msr.SF | Msr.ME | more) for more in (0, Msr.EE, Msr.SE, Msr.EE | Msr.FP)]
TRANSLATED = int(Msr.IR | Msr.DR)
STATES = st.builds(int.__or__, st.sampled_from(MSRS), st.sampled_from([0, TRANSLATED, TRANSLATED | int(Msr.PR)]))
MODES = st.builds(InterruptMode, st.sampled_from([0, AIL_RELOCATED]), st.booleans(), st.booleans())
CALLS = st.sampled_from(
    [
        (asm.SC0,),
        (asm.scv(0),),
        (asm.scv(3),),
        (asm.RFSCV,),
        (asm.SLBIA,),
        (asm.tlbiel(R6, R7),),
        (asm.tlbie(R6, R7),),
        (asm.mtspr(Spr.PIDR, R6),),
        (asm.SLBIA, asm.tlbiel(R6, R7), asm.mtspr(Spr.PIDR, R7), asm.scv(0)),
    ]
)
OPERANDS = st.sampled_from([0x7000, 1 << 10, 1 << 10 | 1 << 12, 3 << 10 | 5 << 12])
BACK = 0x900
SCV_AT_REAL = 0x17000
SCV_VECTORS_WORDS = 24


class PythonAlone:
    """In the place of NativeExceptions: the callback of last resort for everything."""

    def __init__(self, _registers: object, _interrupts: object, python: object, _translations: int) -> None:
        self.native = SimpleNamespace(address=address_of(python), data=0)


def outcome(words: tuple[int, ...], msr: int, mode: InterruptMode, operand: int, scv: bool) -> RegisterState:
    """Where the processor stands after `words` and the first hypercall of the kernel behind them."""
    world = Translated()
    rig = world.rig
    for vector in Vector:
        rig.put(vector, asm.SC1, little_endian=mode.little_endian)
        rig.put(KERNEL_AT + vector, asm.SC1, little_endian=mode.little_endian)
    for at in (SCV_AT, SCV_AT_REAL):
        rig.put(at, *[asm.SC1] * (SCV_VECTORS_WORDS + 1), little_endian=mode.little_endian)
    rig.put(CODE_AT + 0x800, *words, asm.SC1)
    rig.put(CODE_AT + BACK, asm.SC1)
    code = CODE if msr & TRANSLATED else CODE_AT
    world.register_table()
    rig.engine._interrupts.mode = mode
    rig.engine._code.hide_msr = mode.secure
    rig.put(
        CODE_AT, *asm.load64(R4, Fscr.SCV if scv else 0), asm.mtspr(Spr.FSCR, R4), *asm.load64(R6, operand),
        *asm.load64(R5, code + BACK), asm.mtspr(Spr.LR, R5), *asm.load64(R5, msr | Msr.S), asm.mtspr(Spr.CTR, R5),
        *asm.load64(R5, code + 0x800), asm.mtspr(Spr.SRR0, R5), *asm.load64(R5, msr), asm.mtspr(Spr.SRR1, R5), asm.RFID,
    )  # fmt: skip
    rig.engine._registers.pc = CODE_AT
    rig.until_exit()
    return rig.engine._registers.save()


@settings(max_examples=400)
@given(words=CALLS, msr=STATES, mode=MODES, operand=OPERANDS, scv=st.booleans())
def test_the_registers_are_the_same(
    words: tuple[int, ...], msr: int, mode: InterruptMode, operand: int, scv: bool
) -> None:
    native = outcome(words, msr, mode, operand, scv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.guest.machine.engine.NativeExceptions", PythonAlone)
        assert native == outcome(words, msr, mode, operand, scv)


@pytest.mark.parametrize(
    "words", [(asm.SC0,), (asm.scv(0),), (asm.RFSCV,), (asm.SLBIA,), (asm.mtspr(Spr.PIDR, R6),) * 2]
)
def test_the_frequent_ones_do_not_come_to_python(words: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    in_python = MachineEngine._on_exception

    def on_exception(engine: MachineEngine, *arguments: int) -> None:
        levels.append(engine._registers.error_code)
        in_python(engine, *arguments)

    monkeypatch.setattr(MachineEngine, "_on_exception", on_exception)
    state = outcome(words, int(Msr.SF | Msr.ME), InterruptMode(), 5, scv=True)

    assert set(levels) == {1}, "only hypercalls"
    assert words[0] != asm.mtspr(Spr.PIDR, R6) or state.sprs[Spr.PIDR] == 5
