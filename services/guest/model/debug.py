"""The debugging side of the model kernel: `services.guest.debug_engine.EngineDebug`.

It has no instructions, so what a debugger sees is what there is: guest memory, and its state as registers by name. A
step is one step of the kernel, from one safe point to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from services.guest.exits import Exit
from services.guest.model.cpu import Clock
from services.guest.model.state import KernelState
from services.runtime.gdb.target import Point, Refused, Stop, StopKind, Unsupported
from shared.gdb_registers import MODEL, Values

_SF, _S, _EE = 1 << 63, 1 << 22, 1 << 15
_MASK64 = (1 << 64) - 1
_STATE: dict[str, Callable[[KernelState], int]] = {
    "phase": lambda state: state.phase,
    "secure": lambda state: state.secure,
    "interrupts_on": lambda state: state.interrupts_on,
    "line": lambda state: state.line,
    "up": lambda state: state.up,
    "kbase": lambda state: state.kbase,
    "fdt": lambda state: state.machine.fdt,
    "initrd": lambda state: state.machine.initrd,
    "page_table": lambda state: state.pages.table,
    "free_pages": lambda state: state.pages.n_free,
    "pidr": lambda state: state.pidr,
    "wake_ns": lambda state: state.wake_ns,
    "calls": lambda state: sum(state.calls.counts.values()),
    "busy_rounds": lambda state: state.calls.busy_rounds,
}
_COMMANDS = """state                the phase of the kernel, by name, and what it runs
calls                the calls that it made, by name
"""


class Stepped(Protocol):
    """The engine."""

    @property
    def state(self) -> KernelState:
        """Of the kernel."""

    def step(self) -> Exit:
        """As EngineDebug."""

    def forget_step(self) -> None:
        """As EngineDebug."""


class ModelDebug:
    """Of one engine."""

    description = MODEL
    stop = Stop(StopKind.TRAP)
    passes = False

    def __init__(self, engine: Stepped, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    @property
    def pc(self) -> int:
        """Where the kernel's image lies, or 0 for the boot stage."""
        return self._engine.state.kbase

    def values(self) -> Values:
        """As EngineDebug: POWER's own registers are not there, but for what has a meaning."""
        state = self._engine.state
        values = {name: int(read(state)) & _MASK64 for name, read in _STATE.items()}
        values["pc"] = state.kbase
        values["msr"] = _SF | (_S if state.secure else 0) | (_EE if state.interrupts_on else 0)
        values["now_ns"] = self._clock.now_ns() & _MASK64
        return Values(False, tuple(values.get(register.name) for register in MODEL.registers))

    def set_register(self, number: int, value: int) -> None:
        """None can be."""
        raise Refused("the registers of the model kernel show its state and cannot be changed")

    def translate(self, address: int) -> int:
        """It uses guest physical addresses."""
        return address

    def set_points(self, points: frozenset[Point]) -> None:
        """There is no code to stop at, and nobody looks at accesses."""
        if any(point.kind.is_watch for point in points):
            raise Unsupported
        if points:
            raise Refused("the model kernel has no instructions to stop at: stepi does one step of it")

    def step(self) -> Exit:
        """As EngineDebug."""
        return self._engine.step()

    def forget_step(self) -> None:
        """As EngineDebug."""
        self._engine.forget_step()

    def memory_changed(self) -> None:
        """Nothing of memory is kept."""

    def monitor(self, words: list[str]) -> str:
        """As EngineDebug."""
        match words:
            case ["state"]:
                state = self._engine.state
                return f"phase {state.phase.name} workload {state.workload} crash {state.crash or 'none'}\n"
            case ["calls"]:
                counts = self._engine.state.calls.counts
                return "".join(f"{name:<24} {count:>10}\n" for name, count in sorted(counts.items()))
            case _:
                raise Refused(f"commands of the model kernel:\n{_COMMANDS}")
