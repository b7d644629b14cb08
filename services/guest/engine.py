"""What the processor loop asks of an engine, be it real POWER code or the model kernel.

The loop alternates `run` and, for exits that have an outcome, `resume`. An engine never touches a socket; partition
faults of its loads and stores are resolved inside its `AddressSpace`.
"""

from __future__ import annotations

from typing import Protocol

from services.guest.debug_engine import EngineDebug
from services.guest.exits import Exit


class Engine(Protocol):
    """One virtual processor with the kernel on it."""

    def start(self, pc: int, gprs: dict[int, int], *, secure: bool) -> None:
        """Forget everything and begin at `pc`; `secure` is MSR.S."""

    def run(self, slice_ns: int) -> Exit:
        """Execute until something must be served, at most about `slice_ns` (1 ms)."""

    def resume(self, result: list[int]) -> None:
        """The outcome of the last Hypercall, Ultracall, MmioLoad or MmioStore exit: `[code, outputs...]`."""

    @property
    def ticks(self) -> bool:
        """Whether a timer goes on for the engine while it is left."""

    def rest(self) -> None:
        """The processor is going to sleep for long: what ticks may stop until the next `run`."""

    def set_line(self, level: bool) -> None:
        """The level of the external interrupt input; taken at the start of the next slice."""

    def watch_writes(self, marks: memoryview) -> None:
        """Devices set a byte of `marks`, one a GFN, when they wrote the frame; the engine clears it. For engines that
        keep translations of code in RAM."""

    def flush_translations(self) -> None:
        """The partition-scoped map changed: forget cached translations."""

    @property
    def n_instructions(self) -> int | None:
        """Instructions retired since the last start; None where nobody counts them."""

    @property
    def pidr(self) -> int:
        """The processor's PIDR: which process runs, 0 for the kernel itself."""

    @property
    def trail(self) -> str | None:
        """What two equal runs have in common: at which instructions their exits came; None as `n_instructions`."""

    @property
    def secure(self) -> bool:
        """MSR.S: what the last `start` said, or the state that was loaded."""

    @property
    def debug(self) -> EngineDebug:
        """What a debugger uses."""

    @property
    def at_safe_point(self) -> bool:
        """Whether `save` may be called now."""

    def save(self) -> bytes:
        """The engine's whole state apart from guest RAM; at a safe point only."""

    def load(self, state: bytes) -> None:
        """Continue from a `save` at the clock's present; raises ValueError when the state is of another version or does
        not decode."""
