"""The machine engine runs POWER code: calls, interrupts, byte order, faults of the map, devices, state."""

from __future__ import annotations

import pytest

from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT
from protocol.hcalls import H_CEDE, H_LOGICAL_CI_LOAD, H_LOGICAL_CI_STORE, H_PUT_TERM_CHAR, H_SET_MODE
from protocol.messages import Access
from protocol.ucalls import UV_SHARE_PAGE
from services.guest.clock import WallClock
from services.guest.exits import Crash, Hypercall, Idle, MmioLoad, MmioStore, Pause, Ultracall
from services.guest.machine.interrupts import RELOCATED_BASE, InterruptMode, Vector
from services.guest.machine.registers import Fscr, Msr, Spr, Srr1
from services.guest.machine.slices import NS_PER_INSTRUCTION, SLICE_INSTRUCTIONS
from services.guest.machine.time_base import TICKS_PER_US
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig
from tests.unit.power_asm import R1, R3, R4, R5, R6, R7, R8, R9, R10

DONE = asm.SC1
"""Programs end with a hypercall; what they found out is in registers."""
DEVICE = 1 << 45
USER_MODE = Msr.SF | Msr.PR | Msr.EE | Msr.ME


def handler(rig: MachineRig, vector: int, *words: int) -> None:
    """Put an interrupt handler at its real-mode vector."""
    rig.put(vector, *words)


def load_msr(rt: int, msr: int) -> tuple[int, ...]:
    return asm.load64(rt, msr)


def test_a_hypercall_leaves_with_its_declared_arguments_and_gets_its_outputs() -> None:
    rig = MachineRig()
    exit_ = rig.run(*[asm.li(3 + n, 0x58 + n) for n in range(9)], asm.SC1, asm.SC1)

    assert exit_ == Hypercall(H_PUT_TERM_CHAR.number, (0x59, 0x5A, 0x5B, 0x5C))
    rig.engine.resume([-4, 7, 8])
    assert rig.until_exit() == Hypercall((1 << 64) - 4, ())
    assert rig.gpr[R4:R7] == [7, 8, 0x5B]


def test_an_unknown_hypercall_takes_no_register_with_it() -> None:
    """S4: what is not declared does not leave the processor."""
    assert MachineRig().run(asm.li(R3, 0x7FFC), asm.li(R4, 1), asm.SC1) == Hypercall(0x7FFC, ())


def test_sc_2_is_an_ultracall() -> None:
    rig = MachineRig()
    exit_ = rig.run(*asm.load64(R3, UV_SHARE_PAGE.number), asm.li(R4, 5), asm.li(R5, 2), asm.SC2, secure=True)

    assert exit_ == Ultracall(UV_SHARE_PAGE.number, (5, 2))


def test_run_before_resume_and_resume_without_an_exit_are_mistakes() -> None:
    rig = MachineRig()
    rig.run(asm.SC1)
    assert not rig.engine.at_safe_point
    with pytest.raises(RuntimeError):
        rig.engine.run(SLICE_NS)
    with pytest.raises(RuntimeError):
        rig.engine.save()
    rig.engine.resume([0])
    assert rig.engine.at_safe_point
    with pytest.raises(RuntimeError):
        rig.engine.resume([0])


def test_a_loop_ends_its_slice_at_the_same_instruction_every_time() -> None:
    rig = MachineRig()
    rig.begin(asm.addi(R3, R3, 1), asm.b(-1))

    for slices in range(1, 4):
        assert rig.engine.run(SLICE_NS) is Pause.SLICE_END
        assert rig.engine.n_instructions == slices * SLICE_INSTRUCTIONS
        assert rig.gpr[R3] == slices * SLICE_INSTRUCTIONS // 2
        assert rig.clock.now_ns() == slices * SLICE_INSTRUCTIONS * NS_PER_INSTRUCTION


@pytest.mark.parametrize(
    ("word", "vector", "cause"),
    [
        (asm.TRAP, Vector.PROGRAM, Srr1.TRAP),
        (0x00000000, Vector.PROGRAM, Srr1.ILLEGAL),
        (asm.mfspr(R3, 304), Vector.PROGRAM, Srr1.PRIVILEGED),
        (asm.fadd(1, 2, 3), Vector.FP_UNAVAILABLE, 0),
        (asm.vaddubm(1, 2, 3), Vector.VMX_UNAVAILABLE, 0),
        (asm.xxlor(1, 2, 3), Vector.VSX_UNAVAILABLE, 0),
    ],
)
def test_what_an_instruction_raises_goes_to_its_vector(word: int, vector: Vector, cause: int) -> None:
    rig = MachineRig()
    handler(rig, vector, DONE)
    rig.run(asm.NOP, word)

    assert rig.engine._registers.pc == vector + 4
    assert rig.spr(Spr.SRR0) == ENTRY + 4
    assert rig.spr(Spr.SRR1) == Msr.SF | Msr.ME | cause
    assert rig.msr == Msr.SF | Msr.ME


@pytest.mark.parametrize("word", [asm.NOP, asm.ISYNC, asm.li(R9, 1), asm.std(R9, 0, R4), asm.mtspr(Spr.SPRG0, R4)])
def test_a_traced_instruction_is_done_and_followed_by_a_trace_interrupt(word: int) -> None:
    rig = MachineRig()
    handler(rig, Vector.TRACE, DONE)
    rig.begin(word, DONE, gprs={R4: 0x30000})
    rig.engine._registers.msr = Msr.SF | Msr.ME | Msr.SE
    rig.until_exit()

    assert rig.engine._registers.pc == Vector.TRACE + 4
    assert rig.spr(Spr.SRR0) == ENTRY + 4
    assert rig.spr(Spr.SRR1) == Msr.SF | Msr.ME | Msr.SE
    assert rig.n_instructions == 2


def test_a_traced_instruction_that_the_engine_cannot_do_itself_is_followed_by_one_too() -> None:
    rig = MachineRig()
    handler(rig, Vector.TRACE, DONE)
    rig.begin(asm.mfmsr(R9), DONE, secure=True)
    rig.engine._registers.msr = Msr.SF | Msr.ME | Msr.SE
    rig.until_exit()

    assert rig.engine._registers.pc == Vector.TRACE + 4
    assert (rig.spr(Spr.SRR0), rig.gpr[R9]) == (ENTRY + 4, Msr.SF | Msr.ME | Msr.SE | Msr.S)


def test_a_traced_access_to_a_device_is_followed_by_one_too() -> None:
    rig = MachineRig()
    handler(rig, Vector.TRACE, DONE)
    rig.begin(asm.lwz(R9, 0, R4), DONE, gprs={R4: DEVICE})
    rig.engine._registers.msr = Msr.SF | Msr.ME | Msr.SE
    assert rig.until_exit() == MmioLoad(DEVICE, 4)
    rig.engine.resume([0, 5])
    rig.until_exit()

    assert rig.engine._registers.pc == Vector.TRACE + 4
    assert rig.spr(Spr.SRR0) == ENTRY + 4


@pytest.mark.parametrize("traced", [Msr.SE, Msr.BE])
def test_a_traced_branch_is_interrupted_where_it_leads(traced: Msr) -> None:
    rig = MachineRig()
    handler(rig, Vector.TRACE, DONE)
    rig.begin(asm.b(2), asm.TRAP, DONE)
    rig.engine._registers.msr = Msr.SF | Msr.ME | traced
    rig.until_exit()

    assert rig.engine._registers.pc == Vector.TRACE + 4
    assert rig.spr(Spr.SRR0) == ENTRY + 8


def test_the_processor_says_which_process_runs() -> None:
    rig = MachineRig()
    assert rig.engine.pidr == 0

    rig.run(asm.li(R4, 42), asm.mtspr(Spr.PIDR, R4), asm.SC1)

    assert rig.engine.pidr == 42


def test_the_number_of_a_process_has_32_bits() -> None:
    rig = MachineRig()
    rig.run(*asm.load64(R4, 0x5_0000_0001), asm.mtspr(Spr.PIDR, R4), asm.mfspr(R9, Spr.PIDR), asm.SC1)

    assert rig.gpr[R9] == rig.engine.pidr == 1


def test_an_illegal_instruction_is_named_to_the_operator() -> None:
    rig = MachineRig()
    handler(rig, Vector.PROGRAM, DONE)
    rig.run(0)

    assert rig.lacking == [(0, ENTRY)]


def test_a_system_call_goes_to_the_kernel_and_rfid_comes_back() -> None:
    rig = MachineRig()
    handler(rig, Vector.SYSTEM_CALL, asm.li(R9, 9), asm.RFID)
    rig.put(0x20000, asm.li(R8, 8), asm.SC0, asm.li(R10, 10), asm.SC1)
    rig.run(
        *load_msr(R4, USER_MODE & ~Msr.PR),
        asm.mtspr(Spr.SRR1, R4),
        *asm.load64(R5, 0x20000),
        asm.mtspr(Spr.SRR0, R5),
        asm.RFID,
    )

    assert rig.gpr[R8 : R10 + 1] == [8, 9, 10]
    assert rig.spr(Spr.SRR0) == 0x20008


def test_interrupts_take_the_byte_order_that_h_set_mode_chose() -> None:
    rig = MachineRig()
    exit_ = rig.run(asm.li(R3, H_SET_MODE.number), asm.li(R4, 1), asm.li(R5, 4), asm.li(R6, 0), asm.li(R7, 0), DONE, 0)
    assert exit_ == Hypercall(H_SET_MODE.number, (1, 4, 0, 0))
    rig.engine.resume([0])
    rig.put(Vector.PROGRAM, asm.li(R9, 77), DONE, little_endian=True)
    rig.until_exit()

    assert rig.gpr[R9] == 77
    assert rig.msr & Msr.LE
    assert not rig.spr(Spr.SRR1) & Msr.LE


def test_a_refused_h_set_mode_changes_nothing() -> None:
    rig = MachineRig()
    rig.run(asm.li(R3, H_SET_MODE.number), asm.li(R4, 1), asm.li(R5, 4), DONE, 0)
    rig.engine.resume([-55])
    handler(rig, Vector.PROGRAM, DONE)
    rig.until_exit()

    assert not rig.msr & Msr.LE


def test_little_endian_code_and_data() -> None:
    rig = MachineRig()
    rig.put(0x20000, asm.lwz(R6, 0, R4), asm.stw(R6, 4, R4), DONE, little_endian=True)
    rig.ram[0x30000:0x30004] = b"\x01\x02\x03\x04"
    rig.run(
        *load_msr(R5, Msr.SF | Msr.ME | Msr.LE),
        asm.mtspr(Spr.SRR1, R5),
        *asm.load64(R5, 0x20000),
        asm.mtspr(Spr.SRR0, R5),
        *asm.load64(R4, 0x30000),
        asm.RFID,
    )

    assert rig.gpr[R6] == 0x04030201
    assert rig.ram[0x30004:0x30008] == b"\x01\x02\x03\x04"


def test_floating_point_vector_and_vsx_run_once_enabled() -> None:
    rig = MachineRig()
    rig.ram[0x30000:0x30010] = bytes.fromhex("3ff8000000000000 4000000000000000")
    lfd = [50 << 26 | n << 21 | R4 << 16 | at for n, at in ((1, 0), (2, 8))]
    stfd = 54 << 26 | 3 << 21 | R4 << 16 | 16
    rig.run(
        *load_msr(R5, Msr.SF | Msr.ME | Msr.FP | Msr.VEC | Msr.VSX),
        asm.mtmsrd(R5),
        *asm.load64(R4, 0x30000),
        *lfd,
        asm.fadd(3, 1, 2),
        stfd,
        asm.vaddubm(1, 2, 3),
        asm.xxlor(4, 1, 1),
        DONE,
    )

    assert rig.ram[0x30010:0x30018] == bytes.fromhex("400c000000000000")


# -- the partition-scoped map -----------------------------------------------------------------------------------


def test_pages_are_asked_for_with_the_access_that_needs_them() -> None:
    rig = MachineRig(absent=True)
    rig.run(*asm.load64(R4, 0x30000), *asm.load64(R5, 0x40000), asm.ld(R6, 0, R4), asm.std(R6, 0, R5), DONE)

    assert rig.faults == [(1, Access.EXECUTE), (3, Access.READ), (4, Access.WRITE)]


def test_a_fault_of_the_map_does_not_count_an_instruction_twice() -> None:
    counts = []
    for absent in (False, True):
        rig = MachineRig(absent=absent)
        rig.run(*asm.load64(R4, 0x30000), asm.ld(R6, 0, R4), asm.std(R6, 8, R4), DONE)
        counts.append(rig.engine.n_instructions)

    assert counts == [8, 8]


@pytest.mark.parametrize("access", [asm.ldu(R6, 8, R4), asm.stdu(R6, 8, R4)])
def test_an_update_form_whose_page_comes_late_updates_once(access: int) -> None:
    rig = MachineRig(absent=True)
    rig.run(*asm.load64(R4, 0x30000), access, access, asm.addi(R5, R5, 1), DONE)

    assert [gfn for gfn, _ in rig.faults] == [1, 3]
    assert (rig.gpr[R4], rig.gpr[R5]) == (0x30010, 1)


def test_update_forms_that_miss_until_their_slice_ends_store_once_each() -> None:
    rig = MachineRig(WallClock())
    n_stores = 1000
    stride, base = 0x1000, 0x100000
    rig.run(
        *asm.load64(R6, n_stores), asm.mtspr(Spr.CTR, R6), *asm.load64(R4, base), asm.addi(R5, R5, 1),
        asm.stdu(R5, stride, R4), asm.bdnz(-2), DONE,
    )  # fmt: skip

    stored = [rig.ram[base + n * stride + 7] for n in range(1, n_stores + 1)]
    assert stored == [n & 0xFF for n in range(1, n_stores + 1)]
    assert rig.gpr[R4] == base + n_stores * stride


def test_a_page_that_nobody_gives_ends_the_program() -> None:
    rig = MachineRig()
    rig.map.clear(3)
    rig.on_fault = rig.refuse
    rig.begin(*asm.load64(R4, 0x30000), asm.ld(R6, 0, R4), DONE)

    with pytest.raises(GuestFault, match="no memory at gfn 0x3"):
        rig.until_exit()


def test_an_invalidated_page_is_asked_for_again() -> None:
    rig = MachineRig()
    rig.begin(*asm.load64(R4, 0x30000), asm.ld(R6, 0, R4), asm.b(-1))
    rig.engine.run(SLICE_NS)
    rig.map.clear(3)
    rig.engine.flush_translations()
    rig.engine.run(SLICE_NS)

    assert rig.faults == [(3, Access.READ)]


def test_l1_a_device_access_whose_own_page_left_is_tried_again() -> None:
    """The map is cleared before the processor hears of it: until then it still fetches from the page."""
    rig = MachineRig()
    rig.run(DONE, *asm.load64(R4, DEVICE + 8), asm.lwz(R6, 0, R4), DONE)
    rig.map.clear(ENTRY >> PAGE_SHIFT)
    rig.engine.resume([0])

    assert rig.until_exit() == MmioLoad(DEVICE + 8, 4)
    assert rig.faults == [(ENTRY >> PAGE_SHIFT, Access.READ)]


def test_a_page_moved_to_another_frame_is_read_there() -> None:
    rig = MachineRig()
    rig.ram[0x50007] = 9
    rig.begin(*asm.load64(R4, 0x30000), asm.ld(R6, 0, R4), asm.b(-1))
    rig.engine.run(SLICE_NS)
    rig.map.words[3] = rig.map.words[5]
    rig.engine.flush_translations()
    rig.engine.run(SLICE_NS)

    assert rig.gpr[R6] == 9


def test_a_page_is_dirty_from_the_first_store_and_again_after_it_was_cleared() -> None:
    rig = MachineRig()
    rig.begin(*asm.load64(R4, 0x30000), asm.ld(R6, 0, R4), asm.b(1), asm.std(R6, 0, R4), asm.b(-1))
    rig.engine.run(SLICE_NS)
    assert [gfn for gfn, byte in enumerate(rig.dirty) if byte] == [3]

    rig.dirty[3] = 0
    rig.engine.flush_translations()
    rig.engine.run(SLICE_NS)
    assert rig.dirty[3] == 1


def test_a_page_that_is_only_read_stays_clean() -> None:
    rig = MachineRig()
    rig.run(*asm.load64(R4, 0x30000), asm.ld(R6, 0, R4), DONE)

    assert not any(rig.dirty)


# -- interrupts from outside, time --------------------------------------------------------------------------------


def loop_with_interrupts(rig: MachineRig) -> None:
    rig.begin(*load_msr(R4, Msr.SF | Msr.ME | Msr.EE), asm.mtmsrd(R4), asm.addi(R3, R3, 1), asm.b(-1))
    rig.engine.run(SLICE_NS)


def test_the_external_line_interrupts_at_the_next_slice() -> None:
    rig = MachineRig()
    handler(rig, Vector.EXTERNAL, DONE)
    loop_with_interrupts(rig)
    rig.engine.set_line(True)

    assert isinstance(rig.engine.run(SLICE_NS), Hypercall)
    assert rig.engine._registers.pc == Vector.EXTERNAL + 4
    assert not rig.msr & Msr.EE


def test_a_line_that_fell_before_the_slice_interrupts_nobody() -> None:
    rig = MachineRig()
    loop_with_interrupts(rig)
    rig.engine.set_line(True)
    rig.engine.set_line(False)

    assert rig.engine.run(SLICE_NS) is Pause.SLICE_END


def test_a_masked_interrupt_waits_for_ee_and_comes_soon_after() -> None:
    rig = MachineRig()
    handler(rig, Vector.EXTERNAL, DONE)
    rig.begin(
        *load_msr(R4, Msr.SF | Msr.ME | Msr.EE),
        asm.li(R5, 1000),
        asm.mtspr(Spr.CTR, R5),
        asm.bdnz(0),
        asm.mtmsrd(R4, 1),
        asm.addi(R3, R3, 1),
        asm.b(-1),
    )
    rig.engine.set_line(True)
    rig.until_exit()

    assert 0 < rig.gpr[R3] < 4096


@pytest.mark.parametrize("n_words", [1, 2, 3, 7, 500])
def test_slices_of_blocks_of_any_size_end_before_the_block_that_would_pass_the_limit(n_words: int) -> None:
    rig = MachineRig()
    rig.begin(*[asm.addi(R3, R3, 1)] * n_words, asm.b(-n_words))

    for _ in range(3):
        before = rig.n_instructions
        assert rig.engine.run(SLICE_NS) is Pause.SLICE_END
        assert SLICE_INSTRUCTIONS - n_words - 1 <= rig.n_instructions - before <= SLICE_INSTRUCTIONS
        assert rig.n_instructions % (n_words + 1) == 0
        assert rig.gpr[R3] == rig.n_instructions // (n_words + 1) * n_words


def test_an_interrupt_that_is_masked_for_long_does_not_cut_slices_short_for_ever() -> None:
    rig = MachineRig()
    rig.begin(asm.b(0))
    rig.engine.set_line(True)
    for _ in range(10):
        rig.engine.run(SLICE_NS)
    before = rig.n_instructions
    rig.engine.run(SLICE_NS)

    assert rig.n_instructions - before > SLICE_INSTRUCTIONS // 2


def test_the_decrementer_interrupts_when_its_time_has_come() -> None:
    rig = MachineRig()
    handler(rig, Vector.DECREMENTER, asm.mfspr(R9, Spr.TBL), DONE)
    rig.begin(
        *load_msr(R4, Msr.SF | Msr.ME | Msr.EE),
        *asm.load64(R5, 300 * TICKS_PER_US),
        asm.mtspr(Spr.DEC, R5),
        asm.mtmsrd(R4),
        asm.mfspr(R8, Spr.TBL),
        asm.addi(R3, R3, 1),
        asm.b(-1),
    )
    rig.until_exit()

    assert 300 * TICKS_PER_US <= rig.gpr[R9] - rig.gpr[R8] < 301 * TICKS_PER_US


def test_an_expired_decrementer_stays_due_until_it_is_written() -> None:
    rig = MachineRig()
    handler(rig, Vector.DECREMENTER, asm.addi(R9, R9, 1), asm.RFID)
    rig.begin(*load_msr(R4, Msr.SF | Msr.ME | Msr.EE), asm.li(R5, -1), asm.mtspr(Spr.DEC, R5), asm.mtmsrd(R4), asm.b(0))
    for _ in range(5):
        rig.engine.run(SLICE_NS)

    assert rig.gpr[R9] == 4


def test_cede_idles_until_the_decrementer_and_enables_interrupts() -> None:
    rig = MachineRig()
    handler(rig, Vector.DECREMENTER, DONE)
    exit_ = rig.run(
        *asm.load64(R5, 1000 * TICKS_PER_US), asm.mtspr(Spr.DEC, R5), asm.li(R3, H_CEDE.number), asm.SC1, asm.b(0)
    )

    assert isinstance(exit_, Idle)
    assert exit_.until_ns == 1_000_000
    assert rig.msr & Msr.EE
    assert rig.engine.at_safe_point
    rig.clock.skip_to(exit_.until_ns)
    rig.until_exit()
    assert rig.engine._registers.pc == Vector.DECREMENTER + 4
    assert rig.gpr[R3] == 0


def test_cede_does_not_idle_over_an_interrupt_that_is_due() -> None:
    rig = MachineRig()
    handler(rig, Vector.EXTERNAL, asm.li(R9, 5), DONE)
    rig.begin(asm.li(R3, H_CEDE.number), asm.SC1, asm.b(0))
    rig.engine.set_line(True)

    assert isinstance(rig.until_exit(), Hypercall)
    assert rig.gpr[R9] == 5


def test_the_time_base_follows_the_wall_clock() -> None:
    clock = WallClock()
    rig = MachineRig(clock)
    before = clock.now_ns() * TICKS_PER_US // 1000
    rig.run(asm.mfspr(R9, Spr.TBL), DONE)

    assert before <= rig.gpr[R9] <= clock.now_ns() * TICKS_PER_US // 1000


def test_the_same_start_gives_the_same_instruction_count_at_every_exit() -> None:
    def run() -> tuple[list[int], str | None]:
        rig = MachineRig(absent=True)
        handler(rig, Vector.DECREMENTER, asm.mtspr(Spr.DEC, R5), asm.SC1, asm.RFID)
        rig.begin(
            *asm.load64(R5, 77 * TICKS_PER_US),
            asm.mtspr(Spr.DEC, R5),
            *load_msr(R4, Msr.SF | Msr.ME | Msr.EE),
            asm.mtmsrd(R4),
            *asm.load64(R6, 0x30000),
            asm.stwu(R7, 0x40, R6),
            asm.SC1,
            asm.b(-2),
        )
        found = []
        for _ in range(300):
            if isinstance(rig.engine.run(SLICE_NS), Hypercall):
                rig.engine.resume([0])
            found.append(rig.n_instructions)
        return found, rig.engine.trail

    assert run() == run()


def test_a_trail_tells_apart_runs_whose_calls_came_at_other_instructions() -> None:
    trails = set()
    for words in ((asm.SC1, asm.NOP, asm.SC1), (asm.NOP, asm.SC1, asm.SC1), (asm.SC1, asm.SC1, asm.NOP)):
        rig = MachineRig()
        rig.run(*words)
        rig.engine.resume([0])
        rig.until_exit()
        trails.add(rig.engine.trail)

    assert len(trails) == 3


# -- the secure bit and emulated instructions -----------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
def test_mfmsr_shows_the_secure_bit_of_a_secure_vm(secure: bool) -> None:
    rig = MachineRig()
    rig.run(asm.mfmsr(R9), asm.mfmsr(R10), DONE, secure=secure)

    assert rig.gpr[R9] == rig.gpr[R10] == Msr.SF | Msr.ME | (Msr.S if secure else 0)


def test_mfmsr_shows_the_secure_bit_in_both_byte_orders_of_one_page() -> None:
    rig = MachineRig()
    little = ENTRY + 0x100
    rig.put(little, asm.mfmsr(R10), DONE, little_endian=True)
    rig.run(
        *asm.load64(R4, little),
        asm.mtspr(Spr.SRR0, R4),
        asm.mfmsr(R9),
        asm.ori(R5, R9, Msr.LE),
        asm.mtspr(Spr.SRR1, R5),
        asm.RFID,
        secure=True,
    )

    assert (rig.gpr[R9], rig.gpr[R10]) == (Msr.SF | Msr.ME | Msr.S, Msr.SF | Msr.ME | Msr.S | Msr.LE)


def test_a_shadowed_page_reads_as_the_guest_wrote_it() -> None:
    rig = MachineRig()
    rig.run(asm.mfmsr(R9), *asm.load64(R4, ENTRY), asm.lwz(R5, 0, R4), DONE, secure=True)

    assert rig.gpr[R5] == asm.mfmsr(R9)


def test_a_program_may_patch_its_own_shadowed_page() -> None:
    rig = MachineRig()
    rig.run(
        asm.mfmsr(R9),
        *asm.load64(R4, ENTRY),
        *asm.load64(R5, asm.li(R10, 42)),
        asm.stw(R5, 14 * 4, R4),
        asm.ISYNC,
        asm.NOP,
        asm.li(R10, 1),
        DONE,
        secure=True,
    )

    assert rig.gpr[R10] == 42


def test_scv_goes_to_its_own_vector_and_rfscv_returns() -> None:
    rig = MachineRig()
    rig.put(0x17000 + 3 * 0x20, asm.li(R9, 9), asm.RFSCV)
    rig.run(*asm.load64(R4, Fscr.SCV), asm.mtspr(Spr.FSCR, R4), asm.scv(3), asm.li(R10, 10), DONE)

    assert rig.gpr[R9 : R10 + 1] == [9, 10]


def test_a_program_that_is_copied_over_another_one_runs_whole() -> None:
    """The engine drops the translations that the first store hits, and misses the next one. As firmware loads."""
    rig = MachineRig()
    first, second = ENTRY + 0x2000, ENTRY + 0x2040
    rig.put(first, asm.li(R3, 1), asm.BLR)
    rig.put(second, asm.li(R4, 1), asm.BLR)
    calls = [
        word
        for at in (first, second)
        for word in (*asm.load64(R9, at), asm.mtspr(Spr.LR, R9), asm.BLRL)
    ]  # fmt: skip
    stores = [
        word
        for at, instruction in ((first, asm.li(R3, 2)), (second, asm.li(R4, 2)))
        for word in (*asm.load64(R9, at), *asm.load64(R10, instruction), asm.stw(R10, 0, R9))
    ]  # fmt: skip
    rig.run(*calls, *stores, *calls, DONE)

    assert (rig.gpr[R3], rig.gpr[R4]) == (2, 2)


def test_scv_in_real_mode_goes_to_its_real_vector_whatever_ail_says() -> None:
    rig = MachineRig()
    rig.put(0x17000, DONE)
    rig.begin(*asm.load64(R4, Fscr.SCV), asm.mtspr(Spr.FSCR, R4), asm.scv(0))
    rig.engine._interrupts.mode = InterruptMode(ail=3)
    rig.engine.run(SLICE_NS)

    assert rig.engine._registers.pc == 0x17004


def test_scv_that_the_kernel_did_not_enable_is_unavailable() -> None:
    rig = MachineRig()
    handler(rig, Vector.FACILITY_UNAVAILABLE, asm.mfspr(R9, Spr.FSCR), DONE)
    rig.run(asm.scv(0))

    assert rig.gpr[R9] >> 56 == 12
    assert rig.spr(Spr.SRR0) == ENTRY


def test_purr_reads_as_time() -> None:
    rig = MachineRig()
    rig.begin(asm.b(0))
    rig.engine.run(SLICE_NS)
    rig.put(ENTRY + 0x1000, asm.mfspr(R9, Spr.PURR), asm.mfspr(R10, Spr.SPURR), DONE)
    rig.engine._registers.pc = ENTRY + 0x1000
    rig.until_exit()

    assert rig.gpr[R10] >= rig.gpr[R9] > 0


def test_code_that_a_device_wrote_over_code_is_run() -> None:
    rig = MachineRig()
    rig.put(0x20000, asm.li(R9, 1), asm.BLR)
    call = (*asm.load64(R4, 0x20000), asm.mtspr(Spr.LR, R4), 0x4E800021, asm.SC1)
    rig.run(*call, *call)
    assert rig.gpr[R9] == 1
    rig.device_writes(0x20000, asm.li(R9, 2), asm.BLR)
    rig.engine.resume([0])
    rig.until_exit()

    assert rig.gpr[R9] == 2


def test_code_whose_bytes_came_after_the_mark_is_run_once_the_device_marked_its_ring() -> None:
    rig = MachineRig()
    rig.put(0x20000, asm.li(R9, 1), asm.BLR)
    call = (*asm.load64(R4, 0x20000), asm.mtspr(Spr.LR, R4), 0x4E800021, asm.SC1)
    rig.run(*call, *call, *call)
    rig.marks[2] = 1
    rig.engine.resume([0])
    rig.until_exit()
    assert rig.gpr[R9] == 1
    rig.put(0x20000, asm.li(R9, 2), asm.BLR)
    rig.marks[5] = 1
    rig.engine.resume([0])
    rig.until_exit()

    assert rig.gpr[R9] == 2
    assert not any(rig.marks)


# -- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("little_endian", [False, True])
def test_a_load_and_a_store_outside_ram_are_device_accesses(little_endian: bool) -> None:
    rig = MachineRig()
    rig.put(0x20000, asm.lwz(R6, 8, R4), asm.stwu(R6, 16, R4), asm.lwbrx(R7, 0, R4), DONE, little_endian=little_endian)
    rig.begin(
        *load_msr(R5, Msr.SF | Msr.ME | (Msr.LE if little_endian else 0)),
        asm.mtspr(Spr.SRR1, R5),
        *asm.load64(R5, 0x20000),
        asm.mtspr(Spr.SRR0, R5),
        *asm.load64(R4, DEVICE),
        asm.RFID,
    )

    assert rig.until_exit() == MmioLoad(DEVICE + 8, 4)
    rig.engine.resume([0, 0x11223344])
    assert rig.until_exit() == MmioStore(DEVICE + 16, 4, 0x11223344)
    rig.engine.resume([0])
    assert rig.until_exit() == MmioLoad(DEVICE + 16, 4)
    rig.engine.resume([0, 0x55667788])
    assert isinstance(rig.until_exit(), Hypercall)
    assert rig.gpr[R6] == (0x11223344 if little_endian else 0x44332211)
    assert rig.gpr[R7] == (0x88776655 if little_endian else 0x55667788)
    assert rig.gpr[R4] == DEVICE + 16


def test_where_no_device_answers_a_load_gives_all_ones() -> None:
    rig = MachineRig()
    rig.run(*asm.load64(R4, DEVICE), asm.lbz(R6, 0, R4), DONE)
    rig.engine.resume([-4])
    rig.until_exit()

    assert rig.gpr[R6] == 0xFF


def test_an_access_that_no_device_does_is_an_alignment_interrupt() -> None:
    rig = MachineRig()
    handler(rig, Vector.ALIGNMENT, DONE)
    rig.run(*asm.load64(R4, DEVICE), asm.lwarx(R6, 0, R4), DONE)

    assert rig.spr(Spr.DAR) == DEVICE


def test_a_fetch_outside_ram_crashes_the_guest_with_its_address() -> None:
    rig = MachineRig()
    exit_ = rig.run(*asm.load64(R4, DEVICE), asm.mtspr(Spr.LR, R4), asm.BLR)

    assert isinstance(exit_, Crash)
    assert f"{DEVICE:#x}" in exit_.reason


def test_the_guests_own_cache_inhibited_calls_are_big_endian() -> None:
    rig = MachineRig()
    exit_ = rig.run(
        asm.li(R3, H_LOGICAL_CI_STORE.number), asm.li(R4, 2), *asm.load64(R5, DEVICE), asm.li(R6, 0x1122), DONE,
        asm.li(R3, H_LOGICAL_CI_LOAD.number), asm.li(R4, 4), *asm.load64(R5, DEVICE), DONE, DONE,
    )  # fmt: skip
    assert exit_ == Hypercall(H_LOGICAL_CI_STORE.number, (2, DEVICE, 0x2211))
    rig.engine.resume([0])
    assert rig.until_exit() == Hypercall(H_LOGICAL_CI_LOAD.number, (4, DEVICE))
    rig.engine.resume([0, 0x11223344])
    assert rig.gpr[R4] == 0x44332211


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_saved_processor_goes_on_in_another_engine() -> None:
    program = (
        *load_msr(R4, Msr.SF | Msr.ME | Msr.EE | Msr.FP),
        *asm.load64(R5, 900 * TICKS_PER_US),
        asm.mtspr(Spr.DEC, R5),
        asm.mtspr(Spr.SPRG0, R5),
        asm.mtmsrd(R4),
        asm.addi(R3, R3, 1),
        asm.b(-1),
    )
    ends = []
    for moved in (False, True):
        rig = MachineRig()
        handler(rig, Vector.DECREMENTER, DONE)
        rig.begin(*program)
        rig.engine.run(SLICE_NS)
        if moved:
            other = MachineRig()
            other.ram[:] = rig.ram[:]
            other.engine.load(rig.engine.save())
            rig = other
        rig.until_exit()
        ends.append((rig.gpr, rig.spr(Spr.SPRG0), rig.msr))

    assert ends[0] == ends[1]


@pytest.mark.parametrize("state", [b"", b"\x80", b"\x00" * 100, b"\xc1"])
def test_what_is_no_state_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError):
        MachineRig().engine.load(state)


def test_save_and_load_keep_every_register() -> None:
    rig = MachineRig()
    rig.begin(asm.b(0), gprs={n: 0x1111 * n for n in range(32)}, secure=True)
    rig.engine._registers.cr, rig.engine._registers.lr = 0x12345678, 0xABC
    rig.engine._registers._vsrs.raw = bytes(n % 251 for n in range(1024))
    rig.engine.set_line(True)
    rig.engine.run(SLICE_NS)
    saved = rig.engine.save()
    other = MachineRig()
    other.engine.load(saved)

    assert other.engine.save() == saved


def test_carry_overflow_and_the_rest_of_xer_go_with_a_saved_processor() -> None:
    xer = 0xE00C_007F
    rig = MachineRig()
    rig.run(*asm.load64(R4, xer), asm.mtspr(Spr.XER, R4), DONE, asm.mfspr(R9, Spr.XER), DONE)
    rig.engine.resume([0])
    other = MachineRig()
    other.ram[:] = rig.ram[:]
    other.engine.load(rig.engine.save())
    other.until_exit()

    assert other.gpr[R9] == xer


def test_a_start_forgets_carry_and_overflow() -> None:
    rig = MachineRig()
    rig.run(*asm.load64(R4, 0xE00C_0000), asm.mtspr(Spr.XER, R4), DONE)
    rig.run(asm.mfspr(R9, Spr.XER), DONE)

    assert rig.gpr[R9] == 0


def test_a_start_forgets_everything() -> None:
    rig = MachineRig()
    rig.run(*load_msr(R4, Msr.SF | Msr.ME | Msr.FP), asm.mtmsrd(R4), asm.mtspr(Spr.SPRG0, R4), DONE)
    rig.engine.start(ENTRY, {1: 5}, secure=False)

    assert rig.gpr[R1] == 5
    assert rig.gpr[R4] == 0
    assert rig.spr(Spr.SPRG0) == 0
    assert rig.msr == Msr.SF | Msr.ME


def test_a_relocated_interrupt_keeps_translation_on() -> None:
    rig = MachineRig()
    rig.engine._interrupts.mode = InterruptMode(ail=3)
    registers = rig.engine._registers
    rig.begin(asm.NOP)
    rig.engine._interrupts.mode = InterruptMode(ail=3)
    registers.msr = Msr.SF | Msr.ME | Msr.IR | Msr.DR
    rig.engine._interrupts.deliver(Vector.PROGRAM, 0x1234)

    assert registers.pc == RELOCATED_BASE + Vector.PROGRAM
    assert registers.msr & (Msr.IR | Msr.DR) == Msr.IR | Msr.DR
    assert PAGE_SHIFT == 16
