"""What a debugger asks of an engine. The processor stands still meanwhile, but for `step`."""

from __future__ import annotations

from typing import Protocol

from services.guest.exits import Exit
from services.runtime.gdb.target import Point, Stop
from shared.gdb_registers import Description, Values


class EngineDebug(Protocol):
    """The debugging side of one engine; it costs nothing until points are set. Everything may raise Refused."""

    @property
    def description(self) -> Description:
        """The registers that it has."""

    @property
    def pc(self) -> int:
        """Where it stands."""

    @property
    def passes(self) -> bool:
        """Whether it stands where a point stopped it, or would: going on begins with a step, over that point."""

    @property
    def stop(self) -> Stop:
        """Why `Engine.run` or `step` ended with Pause.TRAP."""

    def values(self) -> Values:
        """All registers."""

    def set_register(self, number: int, value: int) -> None:
        """Change one."""

    def translate(self, address: int) -> int:
        """The guest physical address behind one that the kernel uses now."""

    def set_points(self, points: frozenset[Point]) -> None:
        """Stop at these and at no others. Raises Unsupported for a kind that the engine has not."""

    def step(self) -> Exit:
        """In the place of `Engine.run`: go on by one instruction, or what is one for this engine.

        Pause.TRAP says that it is done, Pause.SLICE_END that it is not yet. After any other exit, which is served as
        always, the next call goes on with the same step. A step takes no interrupt, and no point stops it but a
        watchpoint that it had not met before.
        """

    def forget_step(self) -> None:
        """The step under way, if there is one, is not gone on with."""

    def memory_changed(self) -> None:
        """A debugger stored to memory past the engine."""

    def monitor(self, words: list[str]) -> str:
        """A command of the engine's own; raises Refused with what there is."""
