"""When the engine itself faults, its process ends by that signal and names the guest code that ran."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig

PROGRAM = """
import ctypes
import structlog
from services.guest.machine.engine import report_crash
from tests.unit import power_asm as asm
from tests.unit.machine_rig import ENTRY, SLICE_NS, MachineRig

rig = MachineRig()
engine = rig.engine
report = report_crash(engine, structlog.get_logger())
rig.put(ENTRY, asm.li(3, 1), asm.b(1), asm.lbz(4, 0, 3), asm.b(0))
engine.start(ENTRY, {}, secure=False)
fill = engine._translator._page

def fault_on_data(address, use, access):
    return fill(address, use, access) if use.value == "fetch" else ctypes.string_at(0)

engine._translator._page = fault_on_data
engine.run(SLICE_NS)
"""


def test_a_fault_of_the_engine_ends_the_process_and_names_the_guests_address() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == -signal.SIGSEGV
    assert "the engine crashed" in ended.stdout
    assert "SIGSEGV" in ended.stdout
    assert "0x10008" in ended.stdout


def test_between_two_slices_the_last_block_is_still_known() -> None:
    """A fault may come before the first block of a slice: the report then names where the guest was."""
    rig = MachineRig()
    rig.begin(asm.b(0))
    rig.engine.run(SLICE_NS)
    assert rig.engine.last_block == ENTRY
    rig.engine._slices.begin(SLICE_NS, 0)
    rig.engine._slices.begin_run()
    assert rig.engine.last_block == ENTRY
