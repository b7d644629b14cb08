"""Why an engine handed control back to the processor loop.

`Engine.run` returns one of these; the loop serves it and gives the outcome to `Engine.resume`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Hypercall:
    """`sc 1`: to kvm, or to the ultravisor when S is set. Resumed with `[code, outputs...]`."""

    number: int
    args: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ultracall:
    """`sc 2`: to the ultravisor. Resumed with `[code, outputs...]`."""

    number: int
    args: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MmioLoad:
    """A load outside RAM. Resumed with `[code, value]`."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class MmioStore:
    """A store outside RAM. Resumed with `[code]`."""

    gpa: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do before an interrupt, or the time base reaches `until_ns` when that is given (H_CEDE).

    `device_open` says that a device request is open, over which the clock `instructions` may not jump.
    """

    until_ns: int | None = None
    device_open: bool = False


@dataclass(frozen=True, slots=True)
class Crash:
    """The kernel cannot go on."""

    reason: str


class Pause(Enum):
    """Exits without content."""

    SLICE_END = "slice end"
    TRAP = "trap"


Exit = Hypercall | Ultracall | MmioLoad | MmioStore | Idle | Crash | Pause
