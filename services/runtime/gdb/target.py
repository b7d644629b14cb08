"""What GDB's protocol is served over: something with registers and memory that runs and stops."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol

from protocol.errors import UserError
from shared.gdb_registers import Description, Values


class Refused(UserError):
    """The target does not do that; its text is one line for whoever debugs. `code` is the E number of packets that
    carry no text."""

    def __init__(self, reason: str, code: int = 1) -> None:
        self.code = code
        super().__init__(reason)


NO_MEMORY = 14
"""EFAULT, as stubs answer an address that gives nothing."""


SMALLEST_PAGE_BYTES = 4096
"""No page of any guest's translation is smaller: this much is there whole or not at all."""


class Unsupported(Exception):
    """Nothing of this kind exists here, so that GDB finds another way."""


class PointKind(IntEnum):
    """What stops the target, by the number in Z packets. The two kinds of breakpoint are one here."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4

    @property
    def is_watch(self) -> bool:
        """Whether it is about data."""
        return self >= PointKind.WRITE


@dataclass(frozen=True, slots=True)
class Point:
    """A breakpoint at `address`, or a watchpoint on `n_bytes` from there."""

    kind: PointKind
    address: int
    n_bytes: int


class StopKind(Enum):
    """Why it stopped: the signal that GDB shows."""

    TRAP = 5
    """A breakpoint, a watchpoint or a step."""
    INTERRUPT = 2
    CRASHED = 11


@dataclass(frozen=True, slots=True)
class Stop:
    """It stands still; `watch` is the point that an access met, `address` where. `text` is for the user."""

    kind: StopKind
    watch: PointKind | None = None
    address: int = 0
    text: str = ""


class Target(Protocol):
    """One processor and its memory. Everything may raise Refused.

    `resume` is called only while it stands still, all else that looks at it or changes it too.
    """

    @property
    def description(self) -> Description:
        """Its registers."""

    async def halt(self) -> Stop:
        """Have it stand still, if it does not."""

    async def registers(self) -> Values:
        """All of them."""

    async def set_register(self, number: int, value: int) -> None:
        """Change one."""

    async def read(self, address: int, n_bytes: int) -> bytes:
        """Memory; at least one byte of what was asked for."""

    async def write(self, address: int, data: bytes) -> None:
        """Change memory."""

    async def insert(self, point: Point) -> None:
        """Stop there from now on. Raises Unsupported for a kind that it has not."""

    async def remove(self, point: Point) -> None:
        """Stop there no more."""

    async def resume(self, *, step: bool) -> Stop:
        """Run, or do one step; returns when it stands still again."""

    async def interrupt(self) -> None:
        """Have a `resume` that is under way end."""

    async def release(self) -> None:
        """Forget every point and let it run: nobody debugs it any more. Lasts as long as that takes."""

    async def kill(self) -> None:
        """End the VM."""

    async def monitor(self, words: list[str]) -> str:
        """A command of its own; what it has to say."""
