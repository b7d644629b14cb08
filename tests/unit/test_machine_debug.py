"""Breakpoints, watchpoints, steps and registers of the machine engine, which the guest sees nothing of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.geometry import PAGE_SHIFT
from protocol.messages import Access
from services.guest.clock import InstructionClock, WallClock
from services.guest.exits import Hypercall, MmioLoad, Pause
from services.guest.machine.debug import access_range, branches_to_itself
from services.guest.machine.registers import Msr, Spr
from services.runtime.gdb.target import Point, PointKind, Refused, StopKind
from shared.gdb_registers import POWER
from tests.unit.machine_rig import ENTRY, RAM_BYTES, MachineRig
from tests.unit.power_asm import (
    addi,
    b,
    bdnz,
    fadd,
    ld,
    li,
    load64,
    lwarx,
    lwz,
    mfmsr,
    mfspr,
    mtspr,
    program,
    std,
    stdu,
    stw,
    xxlor,
)

SC_0, SC_1 = 0x44000002, 0x44000022
RFID = 0x4C000024
STDCX = 0x7C0001AD
HCALL = (li(3, 0xE0), SC_1)
"""H_CEDE is idle: any other number does."""
GET_TCE = (li(3, 0x1C), SC_1)
DATA = 0x20000
OTHER_PAGE = 0x30000


def at(address: int, kind: PointKind = PointKind.SOFTWARE, n_bytes: int = 4) -> Point:
    return Point(kind, address, n_bytes)


def points(rig: MachineRig, *wanted: Point) -> None:
    rig.engine.debug.set_points(frozenset(wanted))


def step(rig: MachineRig) -> int:
    """One step of the rig; where it leads."""
    assert rig.engine.debug.step() is Pause.TRAP
    return rig.engine.debug.pc - ENTRY


@pytest.fixture(params=[InstructionClock, WallClock], ids=["instructions", "wall"])
def rig(request: pytest.FixtureRequest) -> MachineRig:
    return MachineRig(request.param())


def test_a_step_is_one_instruction(rig: MachineRig) -> None:
    rig.begin(li(4, 1), addi(4, 4, 1), addi(4, 4, 1), b(-2))

    seen = [(step(rig), rig.gpr[4]) for _ in range(7)]

    assert seen == [(4, 1), (8, 2), (12, 3), (4, 3), (8, 4), (12, 5), (4, 5)]


def test_steps_are_counted_as_instructions() -> None:
    rig = MachineRig()
    rig.begin(li(4, 1), addi(4, 4, 1), b(-1))

    for _ in range(9):
        step(rig)

    assert rig.n_instructions == 9


def test_steps_and_runs_take_turns(rig: MachineRig) -> None:
    rig.begin(li(4, 1), addi(4, 4, 1), addi(4, 4, 1), *GET_TCE, addi(4, 4, 1), *GET_TCE)

    assert step(rig) == 4
    exit_ = rig.until_exit()
    rig.engine.resume([0, 7])
    assert (step(rig), rig.gpr[4]) == (24, 8)
    assert isinstance(exit_, Hypercall)
    assert isinstance(rig.until_exit(), Hypercall)


def test_a_breakpoint_holds_in_both_byte_orders_of_its_page(rig: MachineRig) -> None:
    there = ENTRY + 0x100
    rig.put(there, li(5, 5), *GET_TCE, little_endian=True)
    points(rig, at(there))
    rig.begin(*load64(4, there), mtspr(Spr.SRR0, 4), mfmsr(4), addi(4, 4, 1), mtspr(Spr.SRR1, 4), RFID)

    assert rig.until_exit() is Pause.TRAP
    assert (rig.engine.debug.pc, rig.gpr[5]) == (there, 0)
    assert (step(rig), rig.gpr[5]) == (0x104, 5)


def test_a_step_goes_into_another_page_and_back(rig: MachineRig) -> None:
    rig.put(OTHER_PAGE, li(5, 5), b((ENTRY + 4 - OTHER_PAGE - 4) // 4))
    rig.begin(b((OTHER_PAGE - ENTRY) // 4), li(6, 6))

    seen = [step(rig) for _ in range(4)]

    assert seen == [OTHER_PAGE - ENTRY, OTHER_PAGE - ENTRY + 4, 4, 8]
    assert rig.gpr[5:7] == [5, 6]


def test_a_step_over_the_last_instruction_of_a_page(rig: MachineRig) -> None:
    rig.put(ENTRY + 0xFFC, li(5, 5), li(6, 6))
    rig.begin(b(0xFFC // 4))

    assert [step(rig) for _ in range(3)] == [0xFFC, 0x1000, 0x1004]
    assert rig.gpr[5:7] == [5, 6]


def test_a_branch_to_itself_is_one_round_a_step(rig: MachineRig) -> None:
    rig.begin(li(4, 3), mtspr(Spr.CTR, 4), bdnz(0), b(0))

    assert [step(rig) for _ in range(7)] == [4, 8, 8, 8, 12, 12, 12]


@pytest.mark.parametrize("word", [b(1), b(-1), bdnz(1), li(3, 0), b(0) | 2, SC_0])
def test_no_other_instruction_is_taken_for_a_branch_to_itself(word: int) -> None:
    assert not branches_to_itself(word)


def test_a_step_into_a_call_is_done_when_the_call_is(rig: MachineRig) -> None:
    rig.begin(*GET_TCE, li(5, 5))
    step(rig)

    assert isinstance(rig.engine.debug.step(), Hypercall)
    rig.engine.resume([0, 7])

    assert step(rig) == 8
    assert rig.gpr[4:6] == [7, 0]
    assert step(rig) == 12


def test_a_step_on_a_device_is_done_when_the_device_has_answered(rig: MachineRig) -> None:
    rig.begin(*load64(4, RAM_BYTES), lwz(5, 0, 4), li(6, 6))
    for _ in range(len(load64(4, RAM_BYTES))):
        before = step(rig)

    assert isinstance(rig.engine.debug.step(), MmioLoad)
    with pytest.raises(Refused, match="waits for its device"):
        rig.engine.debug.set_register(POWER.number["r3"], 1)
    rig.engine.resume([0, 0x11223344])

    assert step(rig) == before + 4
    assert rig.gpr[5] == 0x44332211


def test_a_step_into_an_interrupt_handler_of_the_guest(rig: MachineRig) -> None:
    rig.put(0xC00, RFID)
    rig.begin(SC_0, li(5, 5))

    assert [step(rig), step(rig), step(rig)] == [0xC00 - ENTRY, 4, 8]


def test_a_step_takes_no_interrupt_and_a_run_does(rig: MachineRig) -> None:
    rig.begin(li(4, 0x4000), addi(4, 4, 0x4000), mfmsr(5), 0x7C842A14 | 5 << 11, 0x7C800164, *[li(6, 6)] * 4)
    for _ in range(3):
        step(rig)
    rig.engine._registers.msr |= int(Msr.EE)
    rig.engine.set_line(True)
    rig.put(0x500, *GET_TCE)

    assert step(rig) == 16
    assert isinstance(rig.until_exit(), Hypercall)
    assert rig.spr(Spr.SRR0) == ENTRY + 16


def test_a_reservation_survives_steps(rig: MachineRig) -> None:
    rig.begin(*load64(4, DATA), lwarx(5, 0, 4), li(6, 6), 0x7CC0212D, li(7, 7))
    for _ in range(len(load64(4, DATA)) + 3):
        step(rig)

    assert rig.ram[DATA : DATA + 4] == (6).to_bytes(4, "big")
    assert rig.engine._registers.cr >> 28 & 2


def test_page_faults_of_the_hypervisor_are_no_steps_of_their_own() -> None:
    rig = MachineRig(absent=True)
    rig.begin(*load64(4, DATA), std(4, 0, 4), li(6, 6))

    seen = [step(rig) for _ in range(len(load64(4, DATA)) + 2)]

    assert seen == [4 * n for n in range(1, len(seen) + 1)]
    assert len(rig.faults) == 2


def test_the_slots_of_shadow_pages_may_run_out(monkeypatch: pytest.MonkeyPatch, rig: MachineRig) -> None:
    monkeypatch.setattr("services.guest.machine.code_pages.N_SLOTS", 4)
    rig.begin(*[addi(4, 4, 1)] * 20)

    assert [step(rig) for _ in range(20)] == [4 * n for n in range(1, 21)]
    assert rig.gpr[4] == 20


def test_a_breakpoint_stops_before_its_instruction(rig: MachineRig) -> None:
    rig.begin(li(4, 1), addi(4, 4, 1), addi(4, 4, 1), b(-2))
    points(rig, at(ENTRY + 8))

    assert rig.until_exit() is Pause.TRAP
    assert (rig.engine.debug.pc, rig.gpr[4]) == (ENTRY + 8, 2)
    assert rig.engine.debug.stop.kind is StopKind.TRAP
    assert rig.engine.debug.passes
    assert step(rig) == 12
    assert rig.until_exit() is Pause.TRAP
    assert (rig.engine.debug.pc, rig.gpr[4]) == (ENTRY + 8, 4)


def test_a_breakpoint_counts_no_instruction_twice() -> None:
    rig = MachineRig()
    rig.begin(li(4, 1), addi(4, 4, 1), addi(4, 4, 1), *GET_TCE)
    points(rig, at(ENTRY + 8))

    rig.until_exit()
    assert rig.n_instructions == 2
    step(rig)
    rig.until_exit()

    assert rig.n_instructions == 5


def test_a_breakpoint_in_translated_code_stops_and_one_that_is_gone_does_not(rig: MachineRig) -> None:
    loop = (addi(4, 4, 1), *GET_TCE, b(-3))
    rig.begin(*loop)
    for _ in range(3):
        rig.until_exit()
        rig.engine.resume([0, rig.gpr[4]])

    points(rig, at(ENTRY))
    assert rig.until_exit() is Pause.TRAP
    points(rig)

    assert isinstance(rig.until_exit(), Hypercall)
    assert rig.gpr[4] == 4


def test_the_guest_does_not_see_a_breakpoint(rig: MachineRig) -> None:
    words = (*load64(4, ENTRY), lwz(5, 4, 4), *GET_TCE)
    rig.begin(*words)
    points(rig, at(ENTRY + 4))

    rig.until_exit()
    step(rig)
    rig.until_exit()

    assert rig.gpr[5] == words[1]
    assert rig.ram[ENTRY + 4 : ENTRY + 8] == program(words[1])


def test_a_breakpoint_stays_where_the_guest_changes_its_code(rig: MachineRig) -> None:
    change = (*load64(4, OTHER_PAGE), *load64(5, li(7, 2)), stw(5, 4, 4), b(0))
    rig.put(OTHER_PAGE, li(6, 6), li(7, 1), *GET_TCE)
    rig.begin(*change[:-1], b((OTHER_PAGE - ENTRY) // 4 - len(change) + 1))
    points(rig, at(OTHER_PAGE + 4))

    assert rig.until_exit() is Pause.TRAP
    assert rig.engine.debug.pc == OTHER_PAGE + 4
    step(rig)

    assert rig.gpr[7] == 2


@pytest.mark.parametrize("secure", [False, True])
def test_a_breakpoint_on_an_instruction_that_is_a_trap_anyway(rig: MachineRig, secure: bool) -> None:
    rig.begin(li(4, 1), mfmsr(5), *GET_TCE, secure=secure)
    points(rig, at(ENTRY + 4))

    assert rig.until_exit() is Pause.TRAP
    assert rig.gpr[5] == 0
    assert step(rig) == 8
    assert bool(rig.gpr[5] & Msr.S) is secure


def test_the_registers_of_a_secure_vm_have_the_secure_bit_and_keep_it() -> None:
    rig = MachineRig()
    rig.begin(li(4, 1), secure=True)
    debug = rig.engine.debug
    msr = POWER.number["msr"]
    value = debug.values().values[msr]
    assert value is not None
    assert value & Msr.S

    debug.set_register(msr, value | Msr.FP)
    with pytest.raises(Refused, match=r"MSR\.S"):
        debug.set_register(msr, value & ~Msr.S)

    assert debug.values().values[msr] == value | Msr.FP


@pytest.mark.parametrize(
    ("kind", "stores", "stops"),
    [
        (PointKind.WRITE, True, True),
        (PointKind.WRITE, False, False),
        (PointKind.READ, True, False),
        (PointKind.READ, False, True),
        (PointKind.ACCESS, True, True),
        (PointKind.ACCESS, False, True),
    ],
)
def test_a_watchpoint_stops_before_the_access_that_it_is_about(
    rig: MachineRig, kind: PointKind, stores: bool, stops: bool
) -> None:
    access = std(4, 8, 4) if stores else ld(5, 8, 4)
    prologue = load64(4, DATA)
    rig.begin(*prologue, access, *GET_TCE)
    points(rig, at(DATA + 12, kind, 2))

    exit_ = rig.until_exit()

    assert (exit_ is Pause.TRAP) is stops
    if stops:
        stop = rig.engine.debug.stop
        assert (stop.watch, stop.address) == (kind, DATA + 12)
        assert rig.engine.debug.pc == ENTRY + 4 * len(prologue)
        assert rig.ram[DATA + 8 : DATA + 16] == bytes(8)
        assert rig.engine.debug.passes
        assert step(rig) == 4 * len(prologue) + 4
        assert isinstance(rig.until_exit(), Hypercall)


def test_other_accesses_to_a_watched_page_go_on(rig: MachineRig) -> None:
    loop = (stdu(5, 8, 4), addi(5, 5, 1), bdnz(-2))
    start = (*load64(4, DATA), li(6, 20), mtspr(Spr.CTR, 6))
    rig.begin(*start, *loop, *GET_TCE)
    points(rig, at(DATA + 0x50, PointKind.WRITE, 8))

    assert rig.until_exit() is Pause.TRAP
    assert rig.gpr[4] == DATA + 0x48
    assert rig.engine.debug.stop.address == DATA + 0x50
    step(rig)
    assert isinstance(rig.until_exit(), Hypercall)
    assert rig.ram[DATA + 8 : DATA + 0xA8] == b"".join(n.to_bytes(8, "big") for n in range(20))


def test_a_step_onto_a_watchpoint_stops_before_the_access(rig: MachineRig) -> None:
    prologue = load64(4, DATA)
    rig.begin(*prologue, std(4, 8, 4), li(5, 5))
    points(rig, at(DATA + 8, PointKind.WRITE, 8))
    for _ in prologue:
        step(rig)

    assert step(rig) == 4 * len(prologue)
    assert rig.engine.debug.stop.watch is PointKind.WRITE
    assert step(rig) == 4 * len(prologue) + 4
    assert rig.engine.debug.stop.watch is None


@pytest.mark.parametrize("watched", [DATA, DATA + 8])
def test_l1_an_instruction_whose_page_left_when_it_stopped_at_a_watched_page_is_tried_again(
    rig: MachineRig, watched: int
) -> None:
    """The map is cleared before the processor hears of it: until then it still fetches from the page."""
    rig.begin(*GET_TCE, *load64(4, DATA), ld(5, 0, 4), *GET_TCE)
    points(rig, at(watched, PointKind.READ, 4))
    rig.until_exit()
    rig.map.clear(ENTRY >> PAGE_SHIFT)
    rig.engine.resume([0, 7])

    exit_ = rig.until_exit()

    assert (exit_ is Pause.TRAP) is (watched == DATA)
    assert (ENTRY >> PAGE_SHIFT, Access.READ) in rig.faults


DCBZ, LMW, STXVD2X, LFS = 0x7C0007EC, 46 << 26 | 29 << 21, 31 << 26 | 972 << 1, 48 << 26


@pytest.mark.parametrize(
    ("word", "reached"),
    [
        (std(4, 0, 4), (0x1010, 8)),
        (stw(4, 0, 4), (0x1010, 4)),
        (DCBZ, (0x1000, 128)),
        (LMW, (0x1010, 12)),
        (STXVD2X, (0x1010, 16)),
        (LFS, (0x1010, 8)),
    ],
)
def test_how_far_a_storage_instruction_reaches(word: int, reached: tuple[int, int]) -> None:
    assert access_range(word, 0x1010) == reached


def test_every_register_is_read_and_changed(rig: MachineRig) -> None:
    rig.begin(li(3, 3))
    debug = rig.engine.debug
    before = debug.values()
    wanted = {}
    for number, register in enumerate(POWER.registers):
        if register.name in ("vscr", "msr"):
            continue
        wanted[number] = (0x1111_2222_3333_4444_5555_6666_7777_0000 + number) & (1 << register.bits) - 1
    wanted[POWER.number["pc"]] &= ~3
    wanted[POWER.number["fpscr"]] = 0xF8
    wanted[POWER.number["xer"]] = 0xE000_0010

    for number, value in wanted.items():
        debug.set_register(number, value)
    after = debug.values()

    assert {number: after.values[number] for number in wanted} == wanted
    assert after.values[POWER.number["msr"]] == before.values[POWER.number["msr"]]
    assert after.values[POWER.number["vscr"]] is None
    with pytest.raises(Refused, match="vscr"):
        debug.set_register(POWER.number["vscr"], 1)


def test_floating_point_and_vectors_are_those_that_the_program_has(rig: MachineRig) -> None:
    rig.begin(fadd(3, 1, 2), xxlor(2, 1, 1) | 1)
    rig.engine._registers.msr |= int(Msr.FP | Msr.VEC | Msr.VSX)
    number, debug = POWER.number, rig.engine.debug
    debug.set_register(number["f1"], 0x3FF8_0000_0000_0000)
    debug.set_register(number["vs1h"], 0x0123_4567_89AB_CDEF)
    debug.set_register(number["f2"], 0x4000_0000_0000_0000)

    step(rig)
    step(rig)
    values = debug.values().values

    assert values[number["f3"]] == 0x400C_0000_0000_0000
    assert values[number["vr2"]] == 0x3FF8_0000_0000_0000_0123_4567_89AB_CDEF


def test_special_purpose_registers_by_monitor(rig: MachineRig) -> None:
    rig.begin(mfspr(5, Spr.SPRG0 + 1), li(3, 3))
    debug = rig.engine.debug

    assert debug.monitor(["spr", "sprg0"]).split()[-1] == f"{0:#018x}"
    assert debug.monitor(["spr", "273", "0x1234"]).split()[1:] == ["273", "0x0000000000001234"]
    assert "PVR" in debug.monitor(["spr"])
    step(rig)
    assert rig.gpr[5] == 0x1234
    for words in (["spr", "1024"], ["spr", "nobody"], ["spr", "pidr", "1"], ["spr", "272", "x"], ["nothing"], []):
        with pytest.raises(Refused):
            debug.monitor(words)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["step", "run", "set", "clear"]), max_size=30), st.integers(0, 5))
def test_whatever_a_debugger_does_the_program_comes_to_the_same(orders: list[str], place: int) -> None:
    words = (li(4, 0), li(5, 6), mtspr(Spr.CTR, 5), addi(4, 4, 3), stdu(4, 8, 6), bdnz(-2), *GET_TCE)
    rig = MachineRig()
    rig.begin(*words, gprs={6: DATA})
    exit_: object = None
    for order in orders:
        if exit_ not in (None, Pause.TRAP, Pause.SLICE_END):
            break
        if order == "step":
            exit_ = rig.engine.debug.step()
        elif order == "run":
            exit_ = rig.engine.debug.step() if rig.engine.debug.passes else rig.engine.run(1000)
        else:
            wanted = [at(ENTRY + 4 * place), at(DATA + 8 * place, PointKind.WRITE, 8)] if order == "set" else []
            points(rig, *wanted)
    points(rig)
    if not isinstance(exit_, Hypercall):
        exit_ = rig.until_exit()

    assert exit_ == Hypercall(0x1C, (18, 6))
    assert rig.gpr[4] == 18
    assert rig.ram[DATA + 8 : DATA + 56] == b"".join(n.to_bytes(8, "big") for n in range(3, 19, 3))
    assert rig.n_instructions == 3 + 6 * 3 + 2
