"""When the engine itself faults, its process ends by that signal and names the guest code that ran."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig

PROGRAM = """
import ctypes
import structlog
from services.guest.machine.engine import report_crash
from services.guest.clock import InstructionClock, WallClock
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, MachineRig

rig = MachineRig(CLOCK)
engine = rig.engine
report = report_crash(engine, structlog.get_logger())
rig.put(ENTRY, asm.li(3, 1), asm.b(1), asm.lbz(4, 0, 3), asm.b(0))
engine.start(ENTRY, {}, secure=False)
fill = engine._translator._page

def fault_on_data(address, use, access):
    return fill(address, use, access) if use.value == "fetch" else ctypes.string_at(0)

engine._translator._page = fault_on_data
rig.until_exit()
"""


@pytest.mark.parametrize(("clock", "last_address"), [("InstructionClock()", "0x10008"), ("WallClock()", "0x1000")])
def test_a_fault_of_the_engine_ends_the_process_and_names_the_guests_address(clock: str, last_address: str) -> None:
    """Without a count of blocks the program counter tells where the guest was, at or before the instruction."""
    program = PROGRAM.replace("CLOCK", clock)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == -signal.SIGSEGV
    assert "the engine crashed" in ended.stdout
    assert "SIGSEGV" in ended.stdout
    assert last_address in ended.stdout


def test_between_two_slices_the_last_block_is_still_known() -> None:
    """A fault may come before the first block of a slice: the report then names where the guest was."""
    rig = MachineRig()
    rig.begin(asm.b(0))
    rig.engine.run(SLICE_NS)
    assert rig.engine.last_block == ENTRY
    rig.engine._slices.begin(SLICE_NS, 0)
    rig.engine._slices.begin_run()
    assert rig.engine.last_block == ENTRY
