"""A machine engine over memory of its own, whose hypervisor is a dict of map entries."""

from __future__ import annotations

import mmap
from collections.abc import Callable

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.messages import Access
from services.guest.address_space import AddressSpace
from services.guest.clock import GuestClock, InstructionClock
from services.guest.exits import Exit, Pause
from services.guest.machine.engine import MachineEngine
from services.guest.machine.registers import Msr
from shared.partition_map import MapKind, PartitionMap
from tests.unit.power_asm import program

RAM_BYTES = 16 << 20
N_PAGES = RAM_BYTES >> PAGE_SHIFT
SLICE_NS = 1_000_000
ENTRY = 0x10000
MAX_RUNS = 10_000


class MachineRig:
    """An engine, its memory and map. `faults` are those that the map did not give, which are then given by identity.

    With `absent` no page is mapped at first.
    """

    def __init__(self, clock: GuestClock | None = None, *, absent: bool = False) -> None:
        self.clock = clock or InstructionClock()
        self.ram = mmap.mmap(-1, RAM_BYTES)
        self.dirty = bytearray(N_PAGES)
        self.map = PartitionMap(memoryview(bytearray(N_PAGES * 8)))
        self.faults: list[tuple[int, Access]] = []
        self.on_fault: Callable[[int, Access], None] = self.give
        self.lacking: list[tuple[int, int]] = []
        self.space = AddressSpace(memoryview(self.ram), memoryview(self.dirty), self._fault)
        self.space.use_map(self.map, None)
        if not absent:
            for gfn in range(N_PAGES):
                self.map.set(gfn, MapKind.NORMAL, gfn)
        self.marks = bytearray(N_PAGES)
        self.engine = MachineEngine(self.space, self.clock, lambda word, at: self.lacking.append((word, at)))
        self.engine.watch_writes(memoryview(self.marks))

    def _fault(self, gfn: int, access: Access) -> None:
        self.faults.append((gfn, access))
        self.on_fault(gfn, access)

    def give(self, gfn: int, _access: Access) -> None:
        """Map `gfn` to its own frame."""
        self.map.set(gfn, MapKind.NORMAL, gfn)

    @staticmethod
    def refuse(gfn: int, access: Access) -> None:
        """What a hypervisor without memory answers."""
        raise GuestFault(f"no memory at gfn {gfn:#x} ({access.name.lower()})")

    def put(self, gpa: int, *words: int, little_endian: bool = False) -> None:
        """Instructions at a guest real address, stored by somebody else than the engine."""
        code = program(*words, little_endian=little_endian)
        self.ram[gpa : gpa + len(code)] = code

    def device_writes(self, gpa: int, *words: int) -> None:
        """Instructions that a device reads from its disk into RAM."""
        self.marks[gpa >> PAGE_SHIFT] = 1
        self.put(gpa, *words)

    def begin(self, *words: int, gprs: dict[int, int] | None = None, secure: bool = False) -> None:
        """Start a program at ENTRY in real mode."""
        self.put(ENTRY, *words)
        self.engine.start(ENTRY, gprs or {}, secure=secure)

    def until_exit(self) -> Exit:
        """Run over slice ends to the next exit that has content."""
        for _ in range(MAX_RUNS):
            exit_ = self.engine.run(SLICE_NS)
            if exit_ is not Pause.SLICE_END:
                return exit_
        raise AssertionError("the program does not come to an exit")

    def run(self, *words: int, gprs: dict[int, int] | None = None, secure: bool = False) -> Exit:
        """Start a program and run to its first exit."""
        self.begin(*words, gprs=gprs, secure=secure)
        return self.until_exit()

    @property
    def gpr(self) -> list[int]:
        """The general registers."""
        return list(self.engine._registers.gpr)

    @property
    def n_instructions(self) -> int:
        """Retired since the start, which the clock `instructions` counts."""
        counted = self.engine.n_instructions
        assert counted is not None
        return counted

    def spr(self, number: int) -> int:
        """A special purpose register."""
        return int(self.engine._registers.spr[number])

    @property
    def msr(self) -> int:
        """The engine's own MSR."""
        return self.engine._registers.msr


LITTLE = int(Msr.LE)
"""The MSR's byte order bit."""
PAGE = PAGE_BYTES
