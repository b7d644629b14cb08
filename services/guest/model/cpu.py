"""What the kernel asks of its processor: calls, RTAS, MMIO, memory with declared costs.

The call helpers are generators that yield an exit and receive `[code, outputs...]`. Busy results are retried here
under one policy: IMMEDIATE_TRIES in a row, then `Busy` ends the step and the kernel runs it again LATER_NS later, at
most MAX_BUSY_ROUNDS times before it gives up. So a step makes its changes repeatable.
"""

from __future__ import annotations

from collections.abc import Generator
from struct import Struct
from typing import NoReturn, Protocol, TypeVar

from protocol.codes import HCode, RtasStatus, UCode
from protocol.declare import Call
from protocol.errors import PefboxError
from protocol.hcalls import H_RTAS
from services.guest.address_space import AddressSpace
from services.guest.exits import Exit, Hypercall, MmioLoad, MmioStore, Pause, Ultracall
from services.guest.model.state import Calls, Machine

T = TypeVar("T")
Step = Generator[Exit, list[int], T]

IMMEDIATE_TRIES = 4
LATER_NS = 1_000_000
MAX_BUSY_ROUNDS = 2_000

CALL_COST = 1_000
MMIO_COST = 1_000
STEP_COST = 500
BYTES_PER_INSTRUCTION = 8

_BUSY_HCALL = frozenset({HCode.H_BUSY, *(code for code in HCode if code.name.startswith("H_LONG_BUSY"))})
_BUSY_UCALL = frozenset({UCode.U_BUSY, UCode.U_RETRY})
_RTAS_HEAD = Struct(">III")
RTAS_ARGS_OFFSET = 0x1000
"""The argument block lies here in the RTAS area."""
RTAS_AREA_BYTES = 0x10000
_S32_SIGN = 1 << 31


class Clock(Protocol):
    """The guest's time base."""

    def now_ns(self) -> int:
        """Nanoseconds of guest time."""

    def charge(self, cost: int) -> None:
        """`cost` instructions retired; a wall clock ignores it."""


class Panic(PefboxError):
    """The kernel cannot go on; the reason is shown to the operator."""


class OutOfMemory(Panic):
    """No run of free pages is long enough; a command of the prompt ends in it, nothing else can go on."""


class Busy(PefboxError):
    """A call stays busy; the step is run again later."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name} stays busy")


class NoDevice(PefboxError):
    """MMIO that no device answers."""


class Cpu:
    """The processor as the kernel sees it. `machine` gives the RTAS area and tokens, `calls` counts."""

    def __init__(self, memory: AddressSpace, clock: Clock, machine: Machine, calls: Calls) -> None:
        self.memory = memory
        self.clock = clock
        self.machine = machine
        self.calls = calls

    # -- calls --------------------------------------------------------------------------------------------------

    def hcall(self, call: Call, *args: int) -> Step[list[int]]:
        """A hypercall: `[code, outputs...]`; raises Busy when it stays busy."""
        return (yield from self._call(Hypercall(call.number, args), call.name, _BUSY_HCALL))

    def ucall(self, call: Call, *args: int) -> Step[list[int]]:
        """An ultracall: `[code, outputs...]`; raises Busy when it stays busy."""
        return (yield from self._call(Ultracall(call.number, args), call.name, _BUSY_UCALL))

    def hcall_once(self, call: Call, *args: int) -> Step[list[int]]:
        """A hypercall whose busy result the caller handles itself."""
        self._count(call.name)
        result = yield Hypercall(call.number, args)
        return result

    def ucall_once(self, call: Call, *args: int) -> Step[list[int]]:
        """An ultracall whose every result the caller handles itself."""
        self._count(call.name)
        result = yield Ultracall(call.number, args)
        return result

    def _call(self, exit_: Exit, name: str, busy: frozenset[HCode] | frozenset[UCode]) -> Step[list[int]]:
        for _ in range(IMMEDIATE_TRIES):
            self._count(name)
            result = yield exit_
            if result[0] not in busy:
                return result
            yield Pause.SLICE_END
        raise Busy(name)

    def _count(self, name: str, cost: int = CALL_COST) -> None:
        counts = self.calls.counts
        counts[name] = counts.get(name, 0) + 1
        self.clock.charge(cost)

    def rtas(self, service: str, args: tuple[int, ...], n_rets: int) -> Step[list[int]]:
        """An RTAS service by its name in /rtas: `[status, words...]`, status as a signed number.

        A service that the tree does not name gives PARAMETER_ERROR without a call. Raises Busy.
        """
        token = self.machine.rtas_tokens.get(service)
        if token is None:
            return [int(RtasStatus.PARAMETER_ERROR)] + [0] * (n_rets - 1)
        block = self.machine.rtas_base + RTAS_ARGS_OFFSET
        words = Struct(f">{n_rets}I")
        request = _RTAS_HEAD.pack(token, len(args), n_rets) + Struct(f">{len(args)}I").pack(*args)
        for _ in range(IMMEDIATE_TRIES):
            self.memory.store(block, request + bytes(words.size))
            result = yield from self.hcall(H_RTAS, block)
            if result[0] != HCode.H_SUCCESS:
                return [int(RtasStatus.HARDWARE_ERROR)] + [0] * (n_rets - 1)
            rets = list(words.unpack(self.memory.load(block + len(request), words.size)))
            rets[0] = rets[0] - 2 * _S32_SIGN if rets[0] & _S32_SIGN else rets[0]
            if rets[0] != RtasStatus.BUSY and not HCode.H_LONG_BUSY_ORDER_1_MSEC <= rets[0] <= 9905:
                return rets
        raise Busy(service)

    # -- MMIO ---------------------------------------------------------------------------------------------------

    def mmio_load(self, gpa: int, size: int) -> Step[int]:
        """A device register of `size` bytes; raises NoDevice."""
        self._count("MMIO_LOAD", MMIO_COST)
        result = yield MmioLoad(gpa, size)
        if result[0] != HCode.H_SUCCESS or len(result) < 2:
            raise NoDevice(f"no device answers at {gpa:#x}")
        return result[1] & (1 << 8 * size) - 1

    def mmio_store(self, gpa: int, size: int, value: int) -> Step[None]:
        """Write a device register; raises NoDevice."""
        self._count("MMIO_STORE", MMIO_COST)
        result = yield MmioStore(gpa, size, value)
        if result[0] != HCode.H_SUCCESS:
            raise NoDevice(f"no device answers at {gpa:#x}")

    # -- memory with its cost -------------------------------------------------------------------------------------

    def load(self, gpa: int, n_bytes: int) -> bytes:
        """`n_bytes` from `gpa`."""
        self.clock.charge(1 + n_bytes // BYTES_PER_INSTRUCTION)
        return self.memory.load(gpa, n_bytes)

    def store(self, gpa: int, data: bytes) -> None:
        """Store `data` at `gpa`."""
        self.clock.charge(1 + len(data) // BYTES_PER_INSTRUCTION)
        self.memory.store(gpa, data)

    def copy(self, dst: int, src: int, n_bytes: int) -> None:
        """Copy between ranges that do not overlap."""
        self.clock.charge(1 + n_bytes // BYTES_PER_INSTRUCTION)
        self.memory.copy(dst, src, n_bytes)

    def fill(self, gpa: int, n_bytes: int, value: int = 0) -> None:
        """Set a range to one byte."""
        self.clock.charge(1 + n_bytes // BYTES_PER_INSTRUCTION)
        self.memory.fill(gpa, n_bytes, value)


def panic(reason: str) -> NoReturn:
    """End the kernel."""
    raise Panic(reason)
