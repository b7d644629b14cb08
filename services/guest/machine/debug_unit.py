"""The debugging side of the machine engine: `services.guest.debug_engine.EngineDebug`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.guest.exits import Exit, Pause
from services.guest.machine.debug import DebugFetches, access_range, branches_to_itself, do_branch_to_itself
from services.guest.machine.mmu import REAL_MASK, Mmu, SegmentFault, StorageFault, Use
from services.guest.machine.partition import Absent, OutsideRam, Partition
from services.guest.machine.power_registers import PowerRegisters
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import Msr, Spr
from services.guest.machine.translator import Stop as Miss
from services.guest.machine.translator import Translator
from services.runtime.gdb.target import NO_MEMORY, Point, Refused, Stop, StopKind
from shared.gdb_registers import POWER, Values

_MAX_TRIES = 64
"""Of one step: what it lacks is brought one page at a time, and a tick may stop the engine before it began."""
_COMMANDS = """spr                  the special purpose registers that are not zero
spr NAME|NUMBER      one of them
spr NAME|NUMBER VALUE  change it
translate ADDRESS    the guest physical address behind an effective one
"""


@dataclass(frozen=True, slots=True)
class EngineSteps:
    """What the engine lends for a step."""

    begin: Callable[[], None]
    """Show the guest the present, and open a slice."""
    execute: Callable[[], int]
    serve: Callable[[int], Exit | None]
    flush_tlb: Callable[[], None]
    accesses_device: Callable[[], bool]
    """Whether a load or store waits for its device, which puts its outcome into registers."""


class MachineDebug:
    """Of one engine."""

    description = POWER

    def __init__(
        self,
        registers: RegisterFile,
        translator: Translator,
        partition: Partition,
        mmu: Mmu,
        fetches: DebugFetches,
        power: PowerRegisters,
        steps: EngineSteps,
    ) -> None:
        self.stop = Stop(StopKind.TRAP)
        self._registers = registers
        self._translator = translator
        self._mmu = mmu
        self._probe = Mmu(partition.load_u64, _leave_alone)
        self._fetches = fetches
        self._power = power
        self._steps = steps
        self._stepping = False
        self._is_served = False
        """Whether an exit of the step under way has been served, after which it is done."""
        self._met_at: int | None = None
        """Where a watchpoint stopped the engine, before the access."""

    def restart(self) -> None:
        """The processor has begun anew: a step that led here is done."""
        self._is_served, self._met_at = self._stepping, None

    def forget_step(self) -> None:
        """As EngineDebug."""
        self._stepping = self._is_served = False

    # -- registers and addresses ------------------------------------------------------------------------------

    @property
    def pc(self) -> int:
        """As EngineDebug."""
        return self._registers.pc

    def values(self) -> Values:
        """As EngineDebug."""
        return self._power.values()

    def set_register(self, number: int, value: int) -> None:
        """As EngineDebug."""
        if self._steps.accesses_device():
            raise Refused("a load or store waits for its device: no register can be changed before it has its answer")
        self._power.set(number, value)

    def translate(self, address: int) -> int:
        """As EngineDebug: as the kernel's loads would be, or else its fetches."""
        registers = self._registers
        if not registers.msr & Msr.DR:
            return address & REAL_MASK
        self._probe.table = self._mmu.table
        for use in (Use.LOAD, Use.FETCH):
            try:
                return self._probe.translate(address, use, registers.spr[Spr.PIDR], problem=False)[0]
            except (StorageFault, SegmentFault):
                continue
            except (Absent, OutsideRam) as error:
                raise Refused(f"{address:#x}: a page table of the guest is out of reach: {error}", NO_MEMORY) from None
        raise Refused(f"the guest has mapped nothing at {address:#x}", NO_MEMORY)

    def memory_changed(self) -> None:
        """As EngineDebug: code is compared with what was translated when its page is fetched again."""
        self._steps.flush_tlb()

    def monitor(self, words: list[str]) -> str:
        """As EngineDebug."""
        match words:
            case ["spr", *rest]:
                return self._power.spr_command(rest)
            case ["translate", address]:
                return f"{self.translate(_address(address)):#x}\n"
            case _:
                raise Refused(f"commands of this processor:\n{_COMMANDS}")

    # -- points -----------------------------------------------------------------------------------------------

    @property
    def passes(self) -> bool:
        """As EngineDebug."""
        pc = self._registers.pc
        return self._fetches.is_breakpoint(pc) or pc == self._met_at

    def set_points(self, points: frozenset[Point]) -> None:
        """As EngineDebug."""
        self._fetches.set_points(points)
        self._follow()

    def _follow(self) -> None:
        self._translator.debug = self._fetches if self._fetches.is_on else None
        self._steps.flush_tlb()

    def met_watched(self, miss: Miss) -> Exit | None:
        """The engine stopped at an access to a page that has a watchpoint; None when it may go on behind it."""
        word = self._translator.instruction(self._registers.pc)
        address, n_bytes = access_range(word, self._translator.data_address(miss))
        assert miss.use is not Use.FETCH
        hit = self._fetches.watch_of(address, n_bytes, miss.use)
        if hit is not None:
            self.stop, self._met_at = hit, self._registers.pc
            return Pause.TRAP
        if self._fetches.is_stepping:
            self._begin_step(watching=False)
            return None
        exit_ = self._one(watching=False)
        return None if exit_ is Pause.TRAP else exit_

    def met_trap(self) -> Exit:
        """The engine stopped at a trap of a point or step."""
        self.stop = Stop(StopKind.TRAP)
        return Pause.TRAP

    # -- steps ------------------------------------------------------------------------------------------------

    def step(self) -> Exit:
        """As EngineDebug."""
        if self._is_served:
            self._is_served = self._stepping = False
            return self.met_trap()
        self._steps.begin()
        watching = self._registers.pc != self._met_at
        self._met_at = None
        self._stepping = True
        exit_ = self._one(watching=watching)
        if isinstance(exit_, Pause):
            self._stepping = False
            return Pause.TRAP
        self._is_served = True
        return exit_

    def _one(self, *, watching: bool) -> Exit:
        """Pause.TRAP when the instruction at the program counter is done or a watchpoint stopped it; else its exit."""
        self.stop = Stop(StopKind.TRAP)
        if self._branched_to_itself():
            return Pause.TRAP
        at = self._registers.pc
        self._begin_step(watching=watching)
        try:
            for _ in range(_MAX_TRIES):
                exit_ = self._steps.serve(self._steps.execute())
                if exit_ is not None:
                    return exit_
                if self._registers.pc != at:
                    break
            return Pause.TRAP
        finally:
            self._fetches.end_step()
            self._follow()

    def _begin_step(self, *, watching: bool) -> None:
        self._fetches.begin_step(watching=watching)
        self._follow()

    def _branched_to_itself(self) -> bool:
        try:
            word = self._translator.instruction(self._registers.pc)
        except (StorageFault, SegmentFault, Absent, OutsideRam):
            return False
        if not branches_to_itself(word):
            return False
        do_branch_to_itself(word, self._registers)
        return True


def _address(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise Refused(f"{text!r} is no number") from None
    if not 0 <= value < 1 << 64:
        raise Refused(f"{text} is no address of 64 bits")
    return value


def _leave_alone(_gpa: int, _value: int) -> None:
    """A debugger's look is no reference of the guest's."""
