"""A target for GDB that is a dict of registers and a piece of memory."""

from __future__ import annotations

import trio

from services.runtime.gdb.target import NO_MEMORY, Point, PointKind, Refused, Stop, StopKind, Unsupported
from shared.gdb_registers import Description, Feature, Register, Values

DESCRIPTION = Description(
    Feature("org.gnu.gdb.power.core", (Register("r0"), Register("r1"), Register("pc"), Register("cr", 32))),
    Feature("of.its.own", (Register("lr"), Register("half", 16))),
)
BASE, N_BYTES = 0x1000, 0x3000


class PlayedTarget:
    """Stops are what `stop_with` is given; `orders` is all that was asked for, in order."""

    description = DESCRIPTION

    def __init__(self, *, little_endian: bool = False) -> None:
        self.memory = bytearray(range(256)) * (N_BYTES // 256)
        self.little_endian = little_endian
        self.registers_now: list[int | None] = [1, None, 0x1234, 0x5678, 0x9ABC, 7]
        self.orders: list[object] = []
        self.points: set[Point] = set()
        self.released = 0
        self.may_be_released = trio.Event()
        self.may_be_released.set()
        self.resumed = trio.Event()
        self.refuses_registers = self.refuses_to_halt = False
        self._stop: Stop | None = None
        self._stopped = trio.Event()

    def stop_with(self, stop: Stop) -> None:
        self._stop = stop
        self._stopped.set()

    async def halt(self) -> Stop:
        self.orders.append("halt")
        if self.refuses_to_halt:
            raise Refused("somebody else debugs")
        return Stop(StopKind.INTERRUPT)

    async def registers(self) -> Values:
        if self.refuses_registers:
            raise Refused("no registers here", 3)
        return Values(self.little_endian, tuple(self.registers_now))

    async def set_register(self, number: int, value: int) -> None:
        if number == 1:
            raise Refused("r1 is not to be had")
        self.registers_now[number] = value

    async def read(self, address: int, n_bytes: int) -> bytes:
        self.orders.append(("read", address, n_bytes))
        if not BASE <= address < BASE + N_BYTES:
            raise Refused(f"nothing at {address:#x}", NO_MEMORY)
        return bytes(self.memory[address - BASE : address - BASE + n_bytes])

    async def write(self, address: int, data: bytes) -> None:
        if not BASE <= address <= BASE + N_BYTES - len(data):
            raise Refused(f"nothing at {address:#x}", NO_MEMORY)
        self.memory[address - BASE : address - BASE + len(data)] = data

    async def insert(self, point: Point) -> None:
        if point.kind is PointKind.READ:
            raise Unsupported
        self.points.add(point)

    async def remove(self, point: Point) -> None:
        self.points.discard(point)

    async def resume(self, *, step: bool) -> Stop:
        self.orders.append(("resume", step))
        self.resumed.set()
        await self._stopped.wait()
        self._stopped = trio.Event()
        assert self._stop is not None
        return self._stop

    async def interrupt(self) -> None:
        self.stop_with(Stop(StopKind.INTERRUPT))

    async def release(self) -> None:
        await self.may_be_released.wait()
        self.released += 1

    async def kill(self) -> None:
        self.orders.append("kill")

    async def monitor(self, words: list[str]) -> str:
        if words[:1] == ["bad"]:
            raise Refused("no such command")
        return f"{words}\n"
