"""The host's view of a VM for GDB: what qemu may see of it.

Of a normal VM that is everything, as QEMU has it from KVM: registers, memory through the guest's own tables,
breakpoints, steps. Of a secure VM it is the run state and the bytes of its frames: ciphertext but for shared pages,
found by guest physical address (of which the four highest bits do not count, so that Linux's linear mapping is found
by its own addresses). The processor refuses the rest itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import GuestFault, PeerGone, PefboxError
from protocol.geometry import PAGE_SHIFT
from protocol.refusals import HELD_UP_STATES
from services.qemu.machine import Machine
from services.qemu.qmp import RunState
from services.runtime.gdb.target import (
    NO_MEMORY,
    SMALLEST_PAGE_BYTES,
    Point,
    PointKind,
    Refused,
    Stop,
    StopKind,
    Unsupported,
)
from services.runtime.link import Link
from shared.gdb_registers import Description, Order, Values, unpack
from shared.guest_ram import GuestRam
from shared.host_view import HostState

_VCPU = 0
_REAL_MASK = (1 << 60) - 1
_CALL_SECONDS = 5.0
_AGAIN_SECONDS = 0.1
_SECURE = "the VM is secure: its registers and its code are for its owner's debugger alone"


class HostTarget:
    """Of one VM; `description` is of the registers that its kind of processor has."""

    def __init__(
        self, machine: Machine, link: Link, ram: GuestRam, host_view: memoryview, description: Description
    ) -> None:
        self.description = description
        self._machine = machine
        self._link = link
        self._ram = ram
        self._view = host_view
        self._points: frozenset[Point] = frozenset()
        self._stop: Stop | None = None
        self._is_attached = False
        self._values: Values | None = None
        """As long as it stands still; every value is missing in a secure VM."""
        self._secure = False

    # -- run state --------------------------------------------------------------------------------------------

    async def halt(self) -> Stop:
        """As Target; a machine that has not started yet is waited for."""
        if self._stop is None:
            await self._machine.until_started()
            self._is_attached = True
            await self._order(self._machine.hold)
            self._stop = self._stop_of_state() or Stop(StopKind.INTERRUPT)
        return self._stop

    @staticmethod
    async def _order(order: Callable[[], Awaitable[None]]) -> None:
        """Change the run state. A debugger that goes meanwhile must not leave machine and processor in two states."""
        with trio.CancelScope(shield=True):
            await order()

    async def resume(self, *, step: bool) -> Stop:
        """As Target."""
        await self.halt()
        await self.registers()
        if self._secure and step:
            return Stop(StopKind.TRAP, text=_SECURE)
        if not self._secure:
            await self._debug(self._points, step=step)
        self._values = self._stop = None
        self._machine.debug_stop = None
        await self._order(self._machine.go)
        await self._machine.until_stopped()
        stop = self._stop_of_debug() or self._stop_of_state() or Stop(StopKind.INTERRUPT)
        # The processor stands, and so shall the machine around it.
        await self._order(self._machine.hold)
        self._stop = stop
        return stop

    def _stop_of_debug(self) -> Stop | None:
        body, self._machine.debug_stop = self._machine.debug_stop, None
        if body is None:
            return None
        return Stop(StopKind.TRAP, PointKind(body.watch) if body.watch else None, body.address)

    def _stop_of_state(self) -> Stop | None:
        state = self._machine.state
        if state in (RunState.PAUSED, RunState.RUNNING):
            return None
        return Stop(StopKind.CRASHED, text=f"the machine is in state '{state}'")

    async def interrupt(self) -> None:
        """As Target."""
        await self._order(self._machine.hold)

    async def release(self) -> None:
        """As Target; a machine that its user has paused stays so. Lasts until kvm has taken it, or is dead."""
        if not self._is_attached:
            return
        self._points, self._values, self._stop = frozenset(), None, None
        while True:
            if await self._is_let_go():
                break
            await trio.sleep(_AGAIN_SECONDS)
        self._is_attached = False

    async def _is_let_go(self) -> bool:
        """Whether processor and machine have taken it; nobody else would tell them again."""
        # From its answer on the processor stops for nobody. Without one the machine is let go all the same.
        forgotten = self._secure or await _is_taken(self._forget_points)
        return await _is_taken(self._machine.let_go) and forgotten

    async def _forget_points(self) -> None:
        code = (await self._call(m.VCPU_DEBUG, m.DebugBody(_VCPU, []))).code
        if code == HCode.H_BUSY:
            raise Refused("the processor is held up")

    async def kill(self) -> None:
        """As Target."""
        await self._machine.quit()

    # -- registers --------------------------------------------------------------------------------------------

    async def registers(self) -> Values:
        """As Target: of a secure VM there are none."""
        if self._values is None:
            reply = await self._call(m.VCPU_REGISTERS, m.RunBody(_VCPU))
            self._secure = reply.code == HCode.H_PERMISSION
            if self._secure:
                # GDB attaches to nothing without a program counter, so that one reads as 0.
                names = (register.name for register in self.description.registers)
                self._values = Values(False, tuple(0 if name == "pc" else None for name in names))
            else:
                self._values = self._decode(reply)
        return self._values

    def _decode(self, reply: m.DebugRegisters) -> Values:
        if reply.code != HCode.H_SUCCESS:
            raise Refused(f"the processor gives no registers: code {reply.code}")
        try:
            return unpack(self.description, reply.little_endian, reply.values, reply.missing)
        except ValueError as error:
            raise Refused(f"the processor gives no registers: {error}") from None

    async def order(self) -> Order | None:
        """The byte order of the processor; None of a secure VM's, which the host cannot know."""
        values = await self.registers()
        return None if self._secure else values.order

    async def set_register(self, number: int, value: int) -> None:
        """As Target."""
        await self._need_normal()
        data = value.to_bytes(self.description.registers[number].n_bytes, "big")
        reply = await self._call(m.VCPU_SET_REGISTER, m.DebugRegisterBody(_VCPU, number, data))
        self._values = None
        if reply.code != HCode.H_SUCCESS:
            raise Refused(f"{self.description.registers[number].name} cannot be changed now: code {reply.code}")

    async def _need_normal(self) -> None:
        await self.registers()
        if self._secure:
            raise Refused(_SECURE)

    # -- memory -----------------------------------------------------------------------------------------------

    async def read(self, address: int, n_bytes: int) -> bytes:
        """As Target: of a secure page what any reader on the host finds, its encrypted image."""
        gpa, n_bytes = await self._place(address, n_bytes)
        try:
            with self._link.patience.fail_after(_CALL_SECONDS):
                return await self._ram.read(gpa, n_bytes)
        except GuestFault as fault:
            raise Refused(str(fault), NO_MEMORY) from None
        except trio.TooSlowError:
            raise Refused(f"kvm does not bring the page of {gpa:#x}", NO_MEMORY) from None

    async def write(self, address: int, data: bytes) -> None:
        """As Target; an encrypted page that was changed would only end the VM, so it is refused."""
        while data:
            gpa, n_bytes = await self._place(address, len(data))
            if self._secure and self._view[gpa >> PAGE_SHIFT] != HostState.SHARED:
                raise Refused(f"the page of {gpa:#x} is secure: the host cannot change it", NO_MEMORY)
            try:
                await self._ram.write(gpa, data[:n_bytes])
            except GuestFault as fault:
                raise Refused(str(fault), NO_MEMORY) from None
            address, data = address + n_bytes, data[n_bytes:]

    async def _place(self, address: int, n_bytes: int) -> tuple[int, int]:
        """Where `address` is, and how many bytes from there lie in one page of guest and host."""
        gpa = await self._translate(address)
        n_bytes = min(n_bytes, SMALLEST_PAGE_BYTES - gpa % SMALLEST_PAGE_BYTES)
        try:
            self._ram.check(gpa, n_bytes)
        except GuestFault as fault:
            raise Refused(str(fault), NO_MEMORY) from None
        return gpa, n_bytes

    async def _translate(self, address: int) -> int:
        await self.registers()
        if self._secure:
            return address & _REAL_MASK
        reply = await self._call(m.VCPU_TRANSLATE, m.DebugAddressBody(_VCPU, address))
        if reply.code != HCode.H_SUCCESS:
            raise Refused(f"the guest has mapped nothing at {address:#x}", NO_MEMORY)
        return reply.gpa

    # -- points and commands ----------------------------------------------------------------------------------

    async def insert(self, point: Point) -> None:
        """As Target."""
        await self._need_normal()
        points = self._points | {point}
        await self._debug(points, step=False)
        self._points = points

    async def remove(self, point: Point) -> None:
        """As Target."""
        self._points -= {point}

    async def _debug(self, points: frozenset[Point], *, step: bool) -> None:
        if len(points) > m.MAX_DEBUG_POINTS:
            raise Refused(f"more than {m.MAX_DEBUG_POINTS} breakpoints and watchpoints")
        bodies = [m.DebugPoint(point.kind, point.address, point.n_bytes) for point in points]
        code = (await self._call(m.VCPU_DEBUG, m.DebugBody(_VCPU, bodies, step))).code
        if code == HCode.H_NOT_AVAILABLE:
            raise Unsupported
        if code == HCode.H_BUSY:
            raise Refused("the guest's owner debugs it now, and a processor has one set of debug registers")
        if code == HCode.H_PERMISSION:
            raise Refused(_SECURE)
        if code != HCode.H_SUCCESS:
            raise Refused("this kind of processor has no such breakpoints: step it")

    async def monitor(self, words: list[str]) -> str:
        """As Target: the processor's own commands."""
        await self._need_normal()
        words = [word[:256] for word in words[:16]]
        reply = await self._call(m.VCPU_DEBUG_COMMAND, m.DebugCommandBody(_VCPU, words))
        if reply.code != HCode.H_SUCCESS:
            raise Refused(reply.text or f"refused: code {reply.code}")
        return reply.text

    async def _call(self, message: m.Message[m.BodyT, m.ReplyT], body: m.BodyT) -> m.ReplyT:
        with self._link.patience.bound(_CALL_SECONDS):
            return await self._link.call(message, body)
        raise Refused(f"kvm does not answer {message.name}")


async def _is_taken(order: Callable[[], Awaitable[None]]) -> bool:
    """False when kvm or the processor is only held up, and has to be told again."""
    try:
        await order()
    except PeerGone as gone:
        return gone.state not in HELD_UP_STATES
    except PefboxError:
        return False
    return True
