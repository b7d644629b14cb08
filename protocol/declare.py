"""How a call is declared, once, so that marshalling, filtering, tracing and documentation follow from it.

A `Call` is one hypercall, ultracall or RTAS service: number, name, arguments and results in register order,
which arguments are guest addresses with their length and direction, who may call it, what its errors mean and
where that is written. The tables are `protocol.hcalls`, `protocol.ucalls` and `protocol.rtas`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from protocol.codes import HCode, RtasStatus, UCode

Code = HCode | UCode | RtasStatus


class Space(Enum):
    """Which number space a call lives in, and so which codes it returns."""

    HCALL = "hypercall"
    UCALL = "ultracall"
    RTAS = "RTAS service"

    @property
    def unknown(self) -> Code:
        """What a caller gets for a number that nobody handles."""
        return _UNKNOWN[self]

    @property
    def busy(self) -> Code:
        """What a caller gets when too many of its calls are open."""
        return _BUSY[self]

    def code(self, value: int) -> str:
        """The name of result `value`, or the bare number when the space has no such code."""
        try:
            return _CODES[self](value).name
        except ValueError:
            return str(value)


_UNKNOWN: dict[Space, Code] = {
    Space.HCALL: HCode.H_FUNCTION,
    Space.UCALL: UCode.U_FUNCTION,
    Space.RTAS: RtasStatus.PARAMETER_ERROR,
}
_BUSY: dict[Space, Code] = {
    Space.HCALL: HCode.H_BUSY,
    Space.UCALL: UCode.U_BUSY,
    Space.RTAS: RtasStatus.BUSY,
}
_CODES: dict[Space, type[HCode] | type[UCode] | type[RtasStatus]] = {
    Space.HCALL: HCode,
    Space.UCALL: UCode,
    Space.RTAS: RtasStatus,
}


class Caller(Enum):
    """Who may issue a call (pef.md: the caller gate of the ultravisor looks at MSR S, HV and PR)."""

    VM = "normal VM"
    SVM = "secure VM"
    HYPERVISOR = "hypervisor"
    ULTRAVISOR = "ultravisor"
    FIRMWARE = "host firmware"


class Kind(Enum):
    """What a register holds; decides how it is printed and how it is checked."""

    U64 = "u64"
    WORD = "u32"
    FLAGS = "flags"
    GPA = "gpa"
    GFN = "gfn"
    RA = "ra"
    LPID = "lpid"
    LIOBN = "liobn"
    IOBA = "ioba"
    TCE = "tce"
    COUNT = "count"
    SIZE = "bytes"
    SHIFT = "shift"
    CPU = "vcpu"
    PID = "pid"
    SPR = "spr"
    TOKEN = "token"
    TEXT = "text"


class Direction(Enum):
    """Which way the memory behind an address argument goes, seen from the caller."""

    IN = "in"
    OUT = "out"
    INOUT = "in/out"


@dataclass(frozen=True, slots=True)
class Memory:
    """Guest memory behind an address argument: `count` units of `unit_bytes`.

    `count` is a number, or the name of the argument that holds it. A count above `max_count` is refused before any
    of the memory is touched.
    """

    direction: Direction
    count: int | str
    unit_bytes: int = 1
    max_count: int | None = None


@dataclass(frozen=True, slots=True)
class Reg:
    """One argument or result register."""

    name: str
    kind: Kind = Kind.U64
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One declared call. `args` and `results` are in register order, the result code in R3 not counted."""

    number: int
    name: str
    space: Space
    args: tuple[Reg, ...]
    results: tuple[Reg, ...]
    callers: frozenset[Caller]
    errors: dict[Code, str] = field(hash=False)
    source: str
    open_ended: bool = False
    """May stay unanswered without limit (H_CEDE, H_CONFER, H_JOIN)."""
    optional_args: int = 0
    """So many of the last arguments may be left out (RTAS counts its words)."""
    optional_results: int = 0
    """So many of the last results are given only to a caller that has room for them."""
    hardware: tuple[Reg, ...] = ()
    """Registers of the processor that come before the arguments: no program chooses them with the call."""
    private: bool = False
    """What a secure VM says and gets by it stays between VM and ultravisor: no trace holds it (S1)."""

    @property
    def n_args(self) -> int:
        """Number of argument registers after the call number."""
        return len(self.args)

    @property
    def n_rets(self) -> int:
        """Number of return words of an RTAS service, the status counted."""
        return 1 + len(self.results)

    def fits(self, n_args: int, n_rets: int) -> bool:
        """Whether an RTAS argument block with these counts calls this service as it is declared."""
        return (
            self.n_args - self.optional_args <= n_args <= self.n_args
            and self.n_rets - self.optional_results <= n_rets <= self.n_rets
        )

    def describe(self, values: Iterable[int]) -> str:
        """The call with the registers of a message as a person reads it: `H_PUT_TCE(liobn=0x80000000, ...)`."""
        pairs = zip((*self.hardware, *self.args), values, strict=False)
        return f"{self.name}({', '.join(f'{reg.name}={_show(reg, value)}' for reg, value in pairs)})"

    def describe_result(self, code: int, values: Iterable[int]) -> str:
        """The result as a person reads it: `H_SUCCESS tce=0x1003`."""
        pairs = zip(self.results, values, strict=False)
        return " ".join([self.space.code(code), *(f"{reg.name}={_show(reg, value)}" for reg, value in pairs)])


def _show(reg: Reg, value: int) -> str:
    return str(value) if reg.kind in _DECIMAL else f"{value:#x}"


_DECIMAL = frozenset({Kind.COUNT, Kind.SIZE, Kind.SHIFT, Kind.CPU, Kind.PID, Kind.LPID})


class CallTable:
    """The declared calls of one space, by number and by name."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.by_number: dict[int, Call] = {}
        self.by_name: dict[str, Call] = {}

    def declare(
        self,
        number: int,
        name: str,
        *,
        args: tuple[Reg, ...] = (),
        results: tuple[Reg, ...] = (),
        callers: Iterable[Caller],
        errors: dict[Code, str] | None = None,
        source: str,
        open_ended: bool = False,
        optional_args: int = 0,
        optional_results: int = 0,
        hardware: tuple[Reg, ...] = (),
        private: bool = False,
    ) -> Call:
        """Add a call; a number or name that is taken is a mistake in the table and raises ValueError."""
        if number in self.by_number or name in self.by_name:
            raise ValueError(f"{self.space.value} {name} ({number:#x}) is declared twice")
        call = Call(
            number=number,
            name=name,
            space=self.space,
            args=args,
            results=results,
            callers=frozenset(callers),
            errors=errors or {},
            source=source,
            open_ended=open_ended,
            optional_args=optional_args,
            optional_results=optional_results,
            hardware=hardware,
            private=private,
        )
        self.by_number[number] = call
        self.by_name[name] = call
        return call

    def __iter__(self) -> Iterator[Call]:
        return iter(self.by_number.values())

    def __len__(self) -> int:
        return len(self.by_number)
