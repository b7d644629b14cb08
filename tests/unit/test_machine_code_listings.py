"""The machine code that engines call is what its listing says, by the GNU assembler."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from unicorn import ppc_const

from services.guest.machine import hooks, native_exceptions, replaced, second_level_tlb
from services.guest.machine.instructions import EngineException
from services.guest.machine.registers import Fscr, Msr, Spr
from tests.needs import need_program

LINE = re.compile(r'^\s+"(?P<bytes>[0-9a-f]+)"\s+# (?:(?P<label>\w+):)?\s*(?P<instruction>.+?)(?:\s{3,}.*)?$')
STATE = {name.upper(): getattr(native_exceptions._State, name).offset for name, *_ in native_exceptions._State._fields_}
SYMBOLS = STATE | {
    "SYSTEM_CALL": EngineException.SYSTEM_CALL,
    **{name: getattr(Msr, name) for name in ("SE", "PR", "IR", "DR", "ME")},
    "S_BIT": Msr.S.bit_length() - 1,
    "SRR0": Spr.SRR0,
    "SRR1": Spr.SRR1,
    "FSCR": Spr.FSCR,
    "PIDR": Spr.PIDR,
    "FSCR_SCV": Fscr.SCV,
    "SLBIA_LEVEL": replaced._SLBIA_LEVEL,
    "SCV_LEVEL": replaced._SCV_LEVEL,
    "RFSCV_LEVEL": replaced._RFSCV_LEVEL,
    "TLBIEL_LEVEL": replaced._TLBIEL_LEVELS.start,
    "TLB_FLUSH": hooks.TLB_FLUSH,
    "IS": 3 << 10,
    "SET": 0xFFF << 12,
    "REG_MSR": ppc_const.UC_PPC_REG_MSR,
    "REG_LR": ppc_const.UC_PPC_REG_LR,
    "REG_CTR": ppc_const.UC_PPC_REG_CTR,
    "FLUSHES": second_level_tlb._State.flushes.offset,
    "EXPECTED": second_level_tlb._State.expected.offset,
    "N_SETS": second_level_tlb.N_SETS,
    "N_BLOCK_SETS": second_level_tlb.N_BLOCK_SETS,
    "PROBLEM_SHIFT": second_level_tlb.problem_shift(second_level_tlb.N_SETS),
    "BLOCK_PROBLEM_SHIFT": second_level_tlb.problem_shift(second_level_tlb.N_BLOCK_SETS),
    "MSR_BITS": Msr.IR | Msr.DR | Msr.PR | Msr.LE,
}


def listing(module: ModuleType) -> list[re.Match[str]]:
    return [line for line in map(LINE.match, inspect.getsource(module).splitlines()) if line]


@pytest.mark.parametrize("module", [native_exceptions, second_level_tlb])
def test_the_bytes_are_those_of_the_listing(module: ModuleType, tmp_path: Path) -> None:
    need_program("as", "binutils")
    lines = listing(module)
    source = [".intel_syntax noprefix", *(f".set {name}, {int(value)}" for name, value in SYMBOLS.items())]
    for line in lines:
        source += [f"{line['label']}:"] if line["label"] else []
        source.append(line["instruction"])
    (tmp_path / "x.s").write_text("\n".join([*source, ""]))
    subprocess.run(["as", "-o", tmp_path / "x.o", tmp_path / "x.s"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "x.o", tmp_path / "x"], check=True)

    assert (tmp_path / "x").read_bytes().hex() == module._CODE.hex()
    assert "".join(line["bytes"] for line in lines) == module._CODE.hex()
