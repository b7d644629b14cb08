"""The model kernel as an engine of the processor loop.

Between two steps of the kernel (a safe point) its whole state is `KernelState` and guest RAM; the generator of the
running step is all that lives on a Python stack.
"""

from __future__ import annotations

from protocol.errors import GuestFault
from services.guest.address_space import AddressSpace
from services.guest.exits import Crash, Exit, Idle, Pause
from services.guest.model import image
from services.guest.model.cpu import LATER_NS, MAX_BUSY_ROUNDS, Busy, Clock, NoDevice, Panic, Step
from services.guest.model.debug import ModelDebug
from services.guest.model.kernel import Kernel
from services.guest.model.state import KernelState, decode_state, encode_state

MAX_REASON_CHARS = 400
SAFE_POINT_EXITS = 8
SAFE_POINT_NS = 2_000_000
"""After so many exits or so long the end of a step ends `run` too, so that whoever wants to save finds a safe point.
No step makes more than about 85 exits: safe points are at most 100 exits apart."""


class ModelEngine:
    """One processor with the model kernel on it: `services.guest.engine.Engine`.

    `memory` is guest memory, `clock` the guest's time base, `old_firmware` says of what age the boot stage is. The
    kernel's sources are read here, so that nothing is opened once the process is confined.
    """

    n_instructions: int | None = None
    trail: str | None = None
    """As Engine: the model charges costs, it retires nothing."""
    ticks = False

    def __init__(self, memory: AddressSpace, clock: Clock, *, old_firmware: bool = False) -> None:
        self._memory = memory
        self._clock = clock
        self._old_firmware = old_firmware
        self._kernel = Kernel(memory, clock, KernelState(), old_firmware=old_firmware)
        self.debug = ModelDebug(self, clock)
        self._is_left = False
        """Whether a debugger's step was left by an exit."""
        self._step: Step[None] | None = None
        self._result: list[int] | None = None
        self._awaited = False
        self._line: bool | None = None
        self._n_exits = 0
        self._safe_ns = clock.now_ns()
        image.sources_digest()

    def start(self, pc: int, gprs: dict[int, int], *, secure: bool) -> None:
        """Forget everything and begin: the boot stage at pc 0x100 (r3 = device tree), the kernel at kbase (r3 = device
        tree, r4 = kbase)."""
        self._drop_step()
        self._kernel.start(pc, gprs, secure=secure)

    def run(self, slice_ns: int) -> Exit:
        """Run steps until one needs something, nothing is left to do, or the slice is over.

        With `slice_ns` 0 it returns at each safe point.
        """
        if self._awaited:
            raise RuntimeError("the last exit has no outcome yet: resume comes before run")
        self._take_line()
        end_ns = self._clock.now_ns() + slice_ns
        while True:
            if self._step is None:
                work = self._kernel.next_step()
                if isinstance(work, Idle | Crash):
                    return work
                self._step = work
            exit_ = self._advance()
            if exit_ is not None:
                self._n_exits += 1
                return exit_
            now_ns = self._clock.now_ns()
            if now_ns >= end_ns or self._n_exits >= SAFE_POINT_EXITS or now_ns >= self._safe_ns + SAFE_POINT_NS:
                self._n_exits, self._safe_ns = 0, now_ns
                return Pause.SLICE_END

    def step(self) -> Exit:
        """As `services.guest.debug_engine.EngineDebug`: the rest of the kernel's step, or the next one."""
        self._take_line()
        was_left, self._is_left = self._is_left, False
        if self._step is None:
            if was_left:
                return Pause.TRAP
            work = self._kernel.next_step()
            if isinstance(work, Idle) and work.until_ns is None:
                # Whoever steps would wait for an interrupt that may never come; the next step looks again.
                return Pause.TRAP
            if isinstance(work, Idle | Crash):
                self._is_left = True
                return work
            self._step = work
        exit_ = self._advance()
        self._is_left = exit_ is not None
        return Pause.TRAP if exit_ is None else exit_

    def forget_step(self) -> None:
        """As `services.guest.debug_engine.EngineDebug`."""
        self._is_left = False

    @property
    def state(self) -> KernelState:
        """Of the kernel."""
        return self._kernel.state

    def _advance(self) -> Exit | None:
        """Let the step go on; None when it ended."""
        assert self._step is not None
        result, self._result = self._result, None
        try:
            exit_ = next(self._step) if result is None else self._step.send(result)
        except StopIteration:
            self._step = None
            self._kernel.state.calls.busy_rounds = 0
            return None
        except Busy as busy:
            self._step = None
            self._later(busy)
            return None
        except (Panic, GuestFault, NoDevice) as error:
            self._step = None
            self._kernel.state.crash = str(error)[:MAX_REASON_CHARS]
            return None
        self._awaited = not isinstance(exit_, Pause)
        return exit_

    def _later(self, busy: Busy) -> None:
        state = self._kernel.state
        state.calls.busy_rounds += 1
        state.wake_ns = self._clock.now_ns() + LATER_NS
        if state.calls.busy_rounds > MAX_BUSY_ROUNDS:
            state.crash = f"{busy} after {MAX_BUSY_ROUNDS} rounds"

    def resume(self, result: list[int]) -> None:
        """The outcome of the last exit; the step goes on at the next `run`."""
        if not self._awaited:
            raise RuntimeError("no exit waits for an outcome")
        self._awaited = False
        self._result = result

    def set_line(self, level: bool) -> None:
        """The external interrupt line; taken at the start of the next slice."""
        self._line = level

    def _take_line(self) -> None:
        if self._line is not None:
            self._kernel.state.line, self._line = self._line, None

    def rest(self) -> None:
        """Nothing ticks here."""

    def watch_writes(self, marks: memoryview) -> None:
        """No code of this kernel lies in RAM."""

    def flush_translations(self) -> None:
        """Nothing is cached here: `AddressSpace` looks at the map on every access."""

    @property
    def pidr(self) -> int:
        """As Engine."""
        return self._kernel.state.pidr

    @property
    def secure(self) -> bool:
        """As Engine."""
        return self._kernel.state.secure

    @property
    def at_safe_point(self) -> bool:
        """Between two steps."""
        return self._step is None

    def save(self) -> bytes:
        """The state at a safe point, at most 64 KiB, without page content."""
        if self._step is not None:
            raise RuntimeError("a step is running: no safe point")
        self._take_line()
        return encode_state(self._kernel.state)

    def load(self, state: bytes) -> None:
        """Continue from a `save`; raises ValueError."""
        loaded = decode_state(state)
        self._drop_step()
        self._kernel = Kernel(self._memory, self._clock, loaded, old_firmware=self._old_firmware)

    def _drop_step(self) -> None:
        if self._step is not None:
            self._step.close()
        self._step = self._result = self._line = None
        self._awaited = False

    @property
    def call_counts(self) -> dict[str, int]:
        """Calls made since the start, by name."""
        return dict(self._kernel.state.calls.counts)
