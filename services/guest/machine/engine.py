"""Real POWER machine code as an engine of the processor loop: `services.guest.engine.Engine` over `unicorn`.

    run: show the time -> deliver a due interrupt -> execute for a slice -> serve why it ended

What ended an execution is served outside the engine: a miss that the map does not give, an interrupt of the guest's
own, an emulated instruction go on in the same `run`; calls, device accesses and idling leave it. With a clock that
counts instructions the engine is stopped by its count alone, so that every exit comes at an exact instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import unicorn as uc
from unicorn.unicorn_py3.unicorn import uclib

from protocol.hcalls import H_CEDE
from services.guest.address_space import AddressSpace
from services.guest.clock import GuestClock
from services.guest.exits import Crash, Exit, Hypercall, Idle, MmioLoad, MmioStore, Pause, Ultracall
from services.guest.machine.calls import Calls
from services.guest.machine.code_pages import CodePages, ShadowsFull
from services.guest.machine.crash_report import CrashReport
from services.guest.machine.debug import DebugFetches, Watched
from services.guest.machine.debug_unit import EngineSteps, MachineDebug
from services.guest.machine.devices import DeviceAccesses
from services.guest.machine.engine_memory import EngineMemory
from services.guest.machine.hooks import EXCEPTION_CALLBACK, FILL_CALLBACK, TLB_FLUSH, add_hook
from services.guest.machine.instructions import EngineException, Instructions
from services.guest.machine.interrupts import InterruptMode, Interrupts, Vector
from services.guest.machine.invalidation import Invalidation, OfPage, OfProcess, Whole
from services.guest.machine.layout import probe, stop_between_blocks_only
from services.guest.machine.mmu import Mmu, ProcessTable, SegmentFault, StorageFault, Use
from services.guest.machine.native_exceptions import NativeExceptions
from services.guest.machine.partition import Absent, OutsideRam, Partition
from services.guest.machine.power_registers import PowerRegisters
from services.guest.machine.register_file import RegisterFile
from services.guest.machine.registers import EVERY_FACILITY, WORD_BYTES, Dsisr, Lpcr, Msr, Spr, Srr1
from services.guest.machine.replaced import is_trap_level
from services.guest.machine.second_level_tlb import SecondLevelTlb
from services.guest.machine.slices import make_slices
from services.guest.machine.state import VERSION, MachineState, TableState, TrailState, decode_state, encode_state
from services.guest.machine.time_base import NS_PER_US, TICKS_PER_US, TimeBase
from services.guest.machine.trail import Trail
from services.guest.machine.translator import Stop, Translator
from services.runtime.log import Log

MAX_LACKING_LINES = 100
_HYPERCALL_LEVEL = 1
_ULTRACALL_LEVEL = 2
_DEBUG_TRAP = -1
"""In the place of an exception's number: a trap of a debugger's."""
_STEP_NS = 1_000_000
_EE = int(Msr.EE)
_LPCR = Lpcr.UPRT | Lpcr.HR | Lpcr.GTSE

Awaited = Hypercall | Ultracall | MmioLoad | MmioStore
Lacking = Callable[[int, int], None]


class MachineEngine:
    """One processor with machine code on it.

    `memory` is guest memory, `clock` the guest's time base; `lacking(word, address)` hears of instructions that the
    engine does not have. Raises HostFault when the installed engine is not understood.
    """

    def __init__(self, memory: AddressSpace, clock: GuestClock, lacking: Lacking) -> None:
        self._uc = uc.Uc(uc.UC_ARCH_PPC, uc.UC_MODE_PPC64 | uc.UC_MODE_BIG_ENDIAN)
        self._memory = EngineMemory(self._uc, memory)
        layout = probe()
        self._registers = RegisterFile(self._uc, layout)
        if layout.no_exit_request is not None:
            stop_between_blocks_only(self._uc, layout.no_exit_request)
        self._partition = Partition(memory)
        self._mmu = Mmu(self._partition.load_u64, self._partition.store_u64)
        self._code = CodePages(self._memory, self._ask_again)
        self._slices = make_slices(self._uc, clock)
        self._callbacks = FILL_CALLBACK(self._on_miss), EXCEPTION_CALLBACK(self._on_exception)
        self._second_level = SecondLevelTlb(self._registers.watched(layout), self._callbacks[0])
        self._translator = Translator(self._registers, self._mmu, self._partition, self._code, self._second_level)
        self._time = TimeBase(clock, self._registers)
        self._interrupts = Interrupts(self._registers)
        self._exceptions = NativeExceptions(
            self._registers.of_exceptions(), self._interrupts, self._callbacks[1], self._second_level.native.data
        )
        self._instructions = Instructions(
            self._registers, self._interrupts, self._time, self._translator.instruction, lacking, self
        )
        self._calls = Calls(self._registers, self._interrupts, self._mmu, self._flush_tlb)
        self._devices = DeviceAccesses(self._registers, self._interrupts, self._translator)
        self._fetches = DebugFetches(self._registers, self._code)
        self.debug = MachineDebug(
            self._registers,
            self._translator,
            self._partition,
            self._mmu,
            self._fetches,
            PowerRegisters(self._registers, self._interrupts, self._time),
            EngineSteps(self._begin_step, self._execute, self._serve, self._flush_tlb, self._accesses_device),
        )
        self._line = False
        self._awaited: Awaited | None = None
        self._exception: int | None = None
        self._trail = Trail()
        memory.on_map = self._follow_space
        self._install_hooks()

    def _install_hooks(self) -> None:
        self._uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self._uc.ctl_exits_enabled(True)
        add_hook(self._uc, uc.UC_HOOK_TLB_FILL, self._second_level.native)
        add_hook(self._uc, uc.UC_HOOK_INTR, self._exceptions.native)

    def _on_miss(self, _engine: int, address: int, kind: int, entry: Any, _data: int) -> bool:  # noqa: ANN401
        self._second_level.notice_flushes()
        return self._translator.fill(address, kind, entry)

    def _on_exception(self, _engine: int, number: int, _data: int) -> None:
        # System calls are frequent enough to be served without leaving the engine.
        if number == EngineException.SYSTEM_CALL:
            level = self._registers.error_code
            if level == 0:
                self._interrupts.deliver(Vector.SYSTEM_CALL, self._registers.pc)
                return
            if is_trap_level(level) and self._is_done(self._instructions.serve_trap):
                return
        elif number == EngineException.ILLEGAL and self._is_done(self._instructions.emulate):
            return
        elif number == EngineException.PROGRAM and self._is_debug_trap():
            self._registers.pc -= WORD_BYTES
            number = _DEBUG_TRAP
        self._exception = number
        uclib.uc_emu_stop(self._uc._uch)

    def _is_debug_trap(self) -> bool:
        return self._translator.debug is not None and self._fetches.stops_at(self._registers.pc - WORD_BYTES)

    @staticmethod
    def _is_done(emulate: Callable[[], bool]) -> bool:
        """False to look at it again outside the engine, into which nothing may be raised."""
        try:
            return emulate()
        except BaseException:
            return False

    def _flush_tlb(self) -> None:
        uclib.uc_ctl(self._uc._uch, TLB_FLUSH)
        self._code.tlb_flushed()
        self._second_level.forget()

    def switch_process(self, pid: int) -> None:
        """As Translations: what the second-level TLB holds names its process."""
        self._registers.spr[Spr.PIDR] = pid
        self._second_level.notice_flushes()
        self._flush_first_level()

    def invalidate(self, what: Invalidation) -> None:
        """As Translations."""
        if what is Whole.NOTHING:
            return
        if what is Whole.EVERYTHING:
            self._flush_tlb()
            return
        second = self._second_level
        second.notice_flushes()
        if isinstance(what, OfPage):
            second.forget_page(what.address, what.shift, what.pid)
        elif isinstance(what, OfProcess):
            second.forget_process(what.pid)
        self._flush_first_level()

    def _ask_again(self, pages: Iterable[int]) -> None:
        """What leads to these engine-physical pages has changed."""
        self._second_level.notice_flushes()
        for page in pages:
            self._second_level.forget_place(page)
        self._flush_first_level()

    def _flush_first_level(self) -> None:
        uclib.uc_ctl(self._uc._uch, TLB_FLUSH)
        self._second_level.expect_flush()

    def _follow_space(self) -> None:
        """Another map or secure memory is in use: nothing that was translated holds any more."""
        self._memory.follow_space()
        self._partition.follow_space()
        self._flush_all()

    def _flush_all(self) -> None:
        self._uc.ctl_flush_tb()
        self._flush_tlb()
        self._code.clear()

    # -- Engine ---------------------------------------------------------------------------------------------------

    def start(self, pc: int, gprs: dict[int, int], *, secure: bool) -> None:
        """Forget everything and begin at `pc` in real mode, big-endian, 64 bits."""
        registers = self._registers
        self._awaited = None
        registers.clear()
        registers.msr = Msr.SF | Msr.ME
        registers.spr[Spr.LPCR] |= _LPCR
        registers.spr[Spr.HFSCR] = EVERY_FACILITY
        for number, value in gprs.items():
            registers.gpr[number] = value
        registers.pc = pc
        self._mmu.table = None
        self._interrupts.mode = InterruptMode(secure=secure)
        self._time.reset()
        self._code.hide_msr = secure
        self._trail = Trail()
        self._slices.reset()
        self._flush_all()
        self.debug.restart()

    def run(self, slice_ns: int) -> Exit:
        """Execute for at most a slice (services.guest.machine.slices)."""
        if self._awaited is not None:
            raise RuntimeError("the last exit has no outcome yet: resume comes before run")
        self._code.look_at_writes()
        left_ns = self._time.begin() * NS_PER_US // TICKS_PER_US
        if self._take_interrupt():
            self._slices.begin_masked(slice_ns)
        else:
            self._slices.begin(slice_ns, left_ns)
        while not self._slices.used_up:
            exit_ = self._serve(self._execute())
            if exit_ is not None:
                self._slices.stir()
                return exit_
        return Pause.SLICE_END

    def resume(self, result: list[int]) -> None:
        """The outcome of the last call or device access."""
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            raise RuntimeError("no exit waits for an outcome")
        if isinstance(awaited, Hypercall | Ultracall):
            self._calls.give(awaited, result)
        else:
            self._devices.finish(awaited, result)

    @property
    def ticks(self) -> bool:
        """As Engine."""
        return self._slices.ticks

    def rest(self) -> None:
        """As Engine."""
        self._slices.rest()

    def set_line(self, level: bool) -> None:
        """The external interrupt line; taken at the start of the next slice."""
        self._line = level
        self._slices.stir()

    def watch_writes(self, marks: memoryview) -> None:
        """Look at `marks` before each slice: code that a device replaced is translated anew."""
        self._code.watch(marks)

    def flush_translations(self) -> None:
        """Forget the TLB; translated code stays, since it is found by where it lies."""
        self._slices.stir()
        self._flush_tlb()

    @property
    def pidr(self) -> int:
        """As Engine."""
        return self._registers.spr[Spr.PIDR]

    @property
    def at_safe_point(self) -> bool:
        """Whenever no exit waits for its outcome."""
        return self._awaited is None

    def save(self) -> bytes:
        """The state at a safe point, without page content."""
        if self._awaited is not None:
            raise RuntimeError("an exit waits for its outcome: no safe point")
        table = self._mmu.table
        return encode_state(
            MachineState(
                version=VERSION,
                secure=self._interrupts.mode.secure,
                line=self._line,
                ail=self._interrupts.mode.ail,
                little_endian_interrupts=self._interrupts.mode.little_endian,
                table=None if table is None else TableState(table.gpa, table.size_bytes),
                ticks=self._time.ticks(),
                deadline=self._time.deadline,
                trail=self._save_trail(),
                registers=self._registers.save(),
            )
        )

    def _save_trail(self) -> TrailState | None:
        n_instructions = self._slices.n_instructions
        return None if n_instructions is None else TrailState(n_instructions, self._trail.n_exits, self._trail.digest)

    def load(self, state: bytes) -> None:
        """Continue from a `save`; raises ValueError."""
        loaded = decode_state(state)
        self.start(loaded.registers.pc, {}, secure=loaded.secure)
        self._registers.load(loaded.registers)
        self._interrupts.mode = InterruptMode(loaded.ail, loaded.little_endian_interrupts, loaded.secure)
        table = loaded.table
        self._mmu.table = None if table is None else ProcessTable(table.gpa, table.size_bytes)
        self._line = loaded.line
        self._time.set_ticks(loaded.ticks)
        self._time.deadline = loaded.deadline
        done = loaded.trail
        if done is not None:
            self._slices.reset(done.n_instructions)
            self._trail = Trail(done.n_exits, done.digest)

    @property
    def secure(self) -> bool:
        """MSR.S."""
        return self._interrupts.mode.secure

    @property
    def n_instructions(self) -> int | None:
        """As Engine: counted by the clock `instructions`."""
        return self._slices.n_instructions

    @property
    def trail(self) -> str | None:
        """What two equal runs have in common: at which instructions their calls and device accesses came."""
        return None if self.n_instructions is None else str(self._trail)

    @property
    def last_block(self) -> int | None:
        """Effective address of the straight piece of code that was begun last; None with a clock that shows time."""
        return self._slices.last_block

    @property
    def last_pc(self) -> int:
        """The program counter as the engine last wrote it, at or before the instruction that runs."""
        return self._registers.pc

    # -- execution ------------------------------------------------------------------------------------------------

    def _accesses_device(self) -> bool:
        return isinstance(self._awaited, MmioLoad | MmioStore)

    def _begin_step(self) -> None:
        """As `run` begins; a step takes no interrupt."""
        self._code.look_at_writes()
        self._time.begin()
        self._slices.begin(_STEP_NS, 0)

    def _take_interrupt(self) -> bool:
        """Deliver what is due; True when something waits, since MSR.EE does not let it."""
        due = Vector.EXTERNAL if self._line else Vector.DECREMENTER if self._time.expired else None
        if due is None:
            return False
        if not self._registers.msr & _EE:
            return True
        self._interrupts.deliver(due, self._registers.pc)
        return False

    def _execute(self) -> int:
        """Run until something stops the engine; its own status."""
        self._exception = None
        registers = self._registers
        self._slices.begin_run()
        status: int = uclib.uc_emu_start(self._uc._uch, registers.pc, 0, 0, 0)
        stop = self._translator.stop
        self._slices.end_run(registers.pc, fetch=stop is not None and stop.use is Use.FETCH)
        self._time.end()
        return status

    def _serve(self, status: int) -> Exit | None:
        """Why the execution ended; None to go on."""
        stop, self._translator.stop = self._translator.stop, None
        if stop is not None:
            return self._serve_stop(stop)
        if self._exception is not None:
            return self._serve_exception(self._exception)
        if status != uc.UC_ERR_OK:
            return Crash(f"engine: {uc.UcError(status)} at {self._registers.pc:#x}")
        return None

    def _serve_stop(self, stop: Stop) -> Exit | None:
        try:
            return self._serve_reason(stop)
        except Absent as absent:
            # The instruction's own page left the map while it ran; it is tried again once that is back.
            self._partition.resolve(absent)
            return None

    def _serve_reason(self, stop: Stop) -> Exit | None:
        """As `_serve_stop`; raises Absent before anything has changed."""
        registers, interrupts = self._registers, self._interrupts
        reason, pc = stop.reason, registers.pc
        fetch = stop.use is Use.FETCH
        if isinstance(reason, Absent):
            self._partition.resolve(reason)
        elif isinstance(reason, StorageFault):
            if fetch:
                interrupts.instruction_storage(pc, reason.cause)
            else:
                store = Dsisr.STORE if stop.use is Use.STORE else 0
                interrupts.data_storage(pc, self._translator.data_address(stop), reason.cause | store)
        elif isinstance(reason, SegmentFault):
            if fetch:
                interrupts.deliver(Vector.INSTRUCTION_SEGMENT, pc)
            else:
                interrupts.data_segment(pc, self._translator.data_address(stop))
        elif isinstance(reason, OutsideRam):
            if fetch:
                return Crash(f"fetch at {pc:#x}, which is no memory")
            access = self._devices.begin(stop, reason.gpa)
            return None if access is None else self._await(access)
        elif isinstance(reason, ShadowsFull):
            self._flush_all()
        elif isinstance(reason, Watched):
            return self.debug.met_watched(stop)
        else:
            raise reason
        return None

    def _serve_exception(self, number: int) -> Exit | None:
        if number == _DEBUG_TRAP:
            return self.debug.met_trap()
        if number == EngineException.SYSTEM_CALL:
            level = self._registers.error_code
            if level in (_HYPERCALL_LEVEL, _ULTRACALL_LEVEL) and self._registers.msr & Msr.PR:
                # A process of the guest is not the guest: as KVM does, its kernel hears of it.
                self._interrupts.deliver(Vector.PROGRAM, self._registers.pc - WORD_BYTES, Srr1.PRIVILEGED)
                return None
            if level == _HYPERCALL_LEVEL:
                return self._hypercall()
            if level == _ULTRACALL_LEVEL:
                return self._await(self._calls.ultracall())
        while True:
            try:
                if self._instructions.serve(number):
                    return None
            except Absent as absent:
                # The instruction's own page left while it ran; it is looked at again once it is back.
                self._partition.resolve(absent)
                continue
            return Crash(f"engine exception {number} at {self._registers.pc:#x}")

    def _hypercall(self) -> Exit:
        call = self._calls.hypercall()
        if call.number == H_CEDE.number:
            return self._cede()
        return self._await(call)

    def _cede(self) -> Exit:
        """H_CEDE enables external interrupts; what is due already ends it at once."""
        self._registers.gpr[3] = 0
        self._registers.msr |= _EE
        if self._line or self._time.expired:
            return Pause.SLICE_END
        return Idle(self._time.deadline_ns())

    def _await(self, exit_: Awaited) -> Exit:
        self._awaited = exit_
        n_instructions = self._slices.n_instructions
        if n_instructions is not None:
            self._trail.add(n_instructions, exit_)
        return exit_


def make_machine_engine(memory: AddressSpace, clock: GuestClock, log: Log) -> MachineEngine:
    """An engine that tells `log` of instructions it lacks, up to a limit."""
    n_told = 0

    def lacking(word: int, address: int) -> None:
        nonlocal n_told
        n_told += 1
        if n_told <= MAX_LACKING_LINES:
            # S1: of a secure VM not even one word of its memory is written down.
            shown = "secret" if engine.secure else f"{word:#010x}"
            log.warning("illegal instruction", instruction=shown, address=f"{address:#x}")

    engine = MachineEngine(memory, clock, lacking)
    return engine


def report_crash(engine: MachineEngine, log: Log) -> CrashReport:
    """Have `log` told where the guest was when `engine` ends this process by a fault; to be kept as long as it."""

    def crashed(name: str) -> None:
        block = {} if engine.last_block is None else {"block": f"{engine.last_block:#x}"}
        log.error("the engine crashed", signal=name, pc=f"{engine.last_pc:#x}", **block)

    return CrashReport(crashed)
