"""The machine engine on secure memory: which memory an access reaches, and that none is left when the VM ends."""

from __future__ import annotations

import mmap

import pytest
import structlog
import structlog.testing

from protocol.messages import Access
from services.guest.clock import InstructionClock
from services.guest.machine.engine import make_machine_engine
from services.guest.machine.registers import Msr
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, N_PAGES, RAM_BYTES, SLICE_NS, MachineRig
from tests.unit.power_asm import R3, R4, R5, R9

NORMAL_SIDE, SECURE_SIDE = 0x11, 0x22
DATA_GFN = 3
DATA = DATA_GFN << 16


class SecureRig(MachineRig):
    """All pages are secure, the program's too; normal RAM and secure memory hold different bytes at DATA."""

    def __init__(self) -> None:
        super().__init__()
        self.secure_ram = mmap.mmap(-1, RAM_BYTES)
        self.secure_map = PartitionMap(memoryview(bytearray(N_PAGES * ENTRY_BYTES)))
        for gfn in range(N_PAGES):
            self.secure_map.set(gfn, MapKind.SECURE, gfn)
        self.ram[DATA], self.secure_ram[DATA] = NORMAL_SIDE, SECURE_SIDE
        self.secure_dirty = bytearray(N_PAGES)

    def give(self, gfn: int, _access: Access) -> None:
        """As an ultravisor that pages in."""
        self.secure_map.set(gfn, MapKind.SECURE, gfn)

    def enter(self, *words: int) -> None:
        """Become secure and begin `words`."""
        code = asm.program(*words)
        self.secure_ram[ENTRY : ENTRY + len(code)] = code
        self.space.use_map(self.secure_map, memoryview(self.secure_ram), memoryview(self.secure_dirty))
        self.engine.start(ENTRY, {}, secure=True)

    def leave(self) -> None:
        """The ultravisor ended the secure VM."""
        self.space.use_map(None, None)
        self.secure_ram.close()


LOAD = (*asm.load64(R4, DATA), asm.lbz(R5, 0, R4))


def test_a_store_marks_the_dirty_map_that_goes_with_the_map_in_force() -> None:
    """S1: what a secure VM writes is marked where kvm, which reads the other map, does not see it."""
    store = (*asm.load64(R4, DATA), asm.std(R5, 0, R4), asm.SC1)
    rig = SecureRig()
    rig.enter(*store, *store)
    for _ in range(2):
        rig.until_exit()
        assert [gfn for gfn, mark in enumerate(rig.secure_dirty) if mark] == [DATA_GFN]
        rig.secure_dirty[DATA_GFN] = 0
        rig.engine.flush_translations()
        rig.engine.resume([0])
    assert not any(rig.dirty)

    rig.leave()
    rig.space.use_map(rig.map, None)
    rig.run(*store)

    assert rig.dirty[DATA_GFN]
    assert not any(rig.secure_dirty)


def test_a_secure_page_is_reached_in_secure_memory_and_a_shared_one_in_normal_ram() -> None:
    rig = SecureRig()
    rig.enter(*LOAD, asm.SC1, *LOAD, asm.SC1)
    rig.until_exit()
    assert rig.gpr[R5] == SECURE_SIDE

    rig.secure_map.set(DATA_GFN, MapKind.SHARED, DATA_GFN)
    rig.engine.flush_translations()
    rig.engine.resume([0])
    rig.until_exit()
    assert rig.gpr[R5] == NORMAL_SIDE


def test_s1_a_store_of_a_secure_vm_reaches_no_normal_memory() -> None:
    rig = SecureRig()
    before = rig.ram[:]
    rig.enter(*asm.load64(R4, DATA), asm.li(R5, 0x5A5A), asm.std(R5, 8, R4), asm.SC1)
    rig.until_exit()

    assert rig.secure_ram[DATA + 8 : DATA + 16] == (0x5A5A).to_bytes(8, "big")
    assert rig.ram[:] == before


def test_a_page_that_was_paged_out_is_asked_for_before_the_access_goes_on() -> None:
    rig = SecureRig()
    rig.enter(*LOAD, asm.b(-1))
    rig.engine.run(SLICE_NS)
    rig.secure_map.clear(DATA_GFN)
    rig.engine.flush_translations()
    rig.engine.run(SLICE_NS)

    assert rig.faults == [(DATA_GFN, Access.READ)]
    assert rig.gpr[R5] == SECURE_SIDE


def test_secure_memory_can_be_unmapped_as_soon_as_the_vm_ended() -> None:
    rig = SecureRig()
    rig.enter(asm.mfmsr(R9), *LOAD, asm.SC1)
    rig.until_exit()
    rig.leave()

    assert rig.secure_ram.closed
    rig.space.use_map(rig.map, None)
    rig.run(asm.mfmsr(R9), *LOAD, asm.SC1)
    assert rig.gpr[R5] == NORMAL_SIDE
    assert not rig.gpr[R9] & Msr.S


def test_an_engine_that_is_unwound_inside_a_fault_starts_anew() -> None:
    """L1: a start or an end of the VM takes the processor out of a fault by an exception."""

    class Unwound(BaseException):
        """What the processor raises."""

    def unwind(_gfn: int, _access: Access) -> None:
        raise Unwound

    rig = SecureRig()
    rig.enter(*LOAD, asm.SC1)
    rig.secure_map.clear(DATA_GFN)
    rig.on_fault = unwind
    with pytest.raises(Unwound):
        rig.until_exit()
    rig.leave()
    rig.space.use_map(rig.map, None)

    rig.run(asm.li(R3, 7), asm.SC1)
    assert rig.gpr[R3] == 7


@pytest.mark.parametrize("secure", [False, True])
def test_s1_the_log_has_no_word_of_a_secure_vm(secure: bool) -> None:
    rig = MachineRig()
    with structlog.testing.capture_logs() as lines:
        engine = make_machine_engine(rig.space, InstructionClock(), structlog.get_logger())
        rig.put(ENTRY, 0x00C0FFEE)
        engine.start(ENTRY, {}, secure=secure)
        engine.run(SLICE_NS)

    first = lines[0]
    assert first["event"] == "illegal instruction"
    assert first["address"] == f"{ENTRY:#x}"
    assert first["instruction"] == ("secret" if secure else "0x00c0ffee")
