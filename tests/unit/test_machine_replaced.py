"""Instructions in whose place others stand in a shadow of their page."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.guest.machine.code_pages import CODE_PAGE_BYTES
from services.guest.machine.registers import Spr
from services.guest.machine.replaced import is_trap_level, is_trapped, needed, useful
from tests.needs import need_program
from tests.unit import power_asm as asm

N_WORDS = CODE_PAGE_BYTES // 4
REGISTERS = st.integers(0, 31)
NEEDED = st.one_of(
    REGISTERS.map(lambda rt: asm.mfspr(rt, Spr.PURR)),
    REGISTERS.map(lambda rt: asm.mfspr(rt, Spr.SPURR)),
    REGISTERS.map(lambda rs: asm.mtspr(Spr.PIDR, rs)),
)
HIDDEN = REGISTERS.map(asm.mfmsr)
USEFUL_TRAPS = st.one_of(
    st.builds(asm.tlbie, REGISTERS, REGISTERS, ric=st.integers(0, 3), prs=st.integers(0, 1)),
    st.builds(asm.tlbiel, REGISTERS, REGISTERS, ric=st.integers(0, 3), prs=st.integers(0, 1)),
    st.sampled_from([asm.SLBIA, asm.scv(0), asm.RFSCV]),
)
HINTS = st.sampled_from([asm.mr(number, number) for number in (31, 1, 6, 2, 5, 3)])
# Of the same opcode, with low bytes of those that are searched for.
OTHERS = st.one_of(
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([asm.scv(1), asm.mr(4, 2), asm.mr(4, 4), asm.NOP, asm.SC0, 0x6464_6464, 0x2424_2424, 0x7878_7878]),
)
WORDS = st.one_of(NEEDED, HIDDEN, USEFUL_TRAPS, HINTS, OTHERS)


def is_hint(word: int) -> bool:
    return word in {asm.mr(number, number) for number in (31, 1, 6, 2, 5, 3)}


def page_of(words: dict[int, int], *, little_endian: bool) -> bytes:
    return asm.program(*(words.get(at, asm.NOP) for at in range(N_WORDS)), little_endian=little_endian)


@given(words=st.dictionaries(st.integers(0, N_WORDS - 1), WORDS, max_size=40), little=st.booleans(), hide=st.booleans())
def test_exactly_those_are_found_wherever_they_stand(words: dict[int, int], little: bool, hide: bool) -> None:
    page = page_of(words, little_endian=little)
    found = needed(page, little_endian=little, hide_msr=hide) + useful(page, little_endian=little)

    hidden = {at for at, word in words.items() if is_trapped(word) and (hide or word & 0xFC1FFFFF != asm.mfmsr(0))}
    assert {at // 4 for at, _ in found} == hidden | {at for at, word in words.items() if is_hint(word)}
    assert len(found) == len({at for at, _ in found})


@given(word=st.one_of(NEEDED, HIDDEN, USEFUL_TRAPS), little=st.booleans())
def test_a_trap_is_a_system_call_of_a_level_of_ours(word: int, little: bool) -> None:
    page = asm.program(word, little_endian=little)
    ((at, instead),) = needed(page, little_endian=little, hide_msr=True) + useful(page, little_endian=little)
    trap = int.from_bytes(instead, "little" if little else "big")

    assert at == 0
    assert trap & ~(0x7F << 5) == asm.SC0
    assert is_trap_level(trap >> 5 & 0x7F)


@given(rb=REGISTERS, rs=REGISTERS)
def test_the_level_for_a_tlbiel_names_its_register(rb: int, rs: int) -> None:
    ((_, instead),) = useful(asm.program(asm.tlbiel(rb, rs)), little_endian=False)

    assert int.from_bytes(instead) >> 5 & 0x7F == 32 + rb


@given(rs=REGISTERS)
def test_the_level_for_a_store_to_pidr_names_its_register(rs: int) -> None:
    ((_, instead),) = needed(asm.program(asm.mtspr(Spr.PIDR, rs)), little_endian=False, hide_msr=False)

    assert int.from_bytes(instead) >> 5 & 0x7F == 64 + rs


@given(word=HINTS, little=st.booleans())
def test_a_hint_becomes_a_no_operation(word: int, little: bool) -> None:
    assert useful(asm.program(word, little_endian=little), little_endian=little) == [
        (0, asm.program(asm.NOP, little_endian=little))
    ]


@pytest.mark.parametrize("level", [0, 1, 2, 3, 96, 127])
def test_the_levels_of_the_architecture_are_no_traps(level: int) -> None:
    assert not is_trap_level(level)


def test_the_words_are_those_of_the_gnu_assembler(tmp_path: Path) -> None:
    need_program("powerpc64-linux-gnu-as", "gcc-powerpc64-linux-gnu")
    source = [
        "mfmsr 5", "mfspr 5,309", "mfspr 5,308", "mtspr 48,5", "tlbie 4,7,2,1,1", "tlbiel 4,7,0,1,1", "slbia",
        "scv 0", "rfscv", "or 31,31,31", "or 1,1,1", "or 6,6,6", "or 2,2,2", "or 5,5,5", "or 3,3,3",
    ]  # fmt: skip
    (tmp_path / "x.s").write_text("\n".join([".machine power9", *source, ""]))
    subprocess.run(["powerpc64-linux-gnu-as", "-o", tmp_path / "x.o", tmp_path / "x.s"], check=True)
    subprocess.run(
        ["powerpc64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", tmp_path / "x.o", tmp_path / "x"], check=True
    )
    code = (tmp_path / "x").read_bytes()
    found = needed(code, little_endian=False, hide_msr=True) + useful(code, little_endian=False)

    assert sorted(at for at, _ in found) == [4 * number for number in range(len(source))]
