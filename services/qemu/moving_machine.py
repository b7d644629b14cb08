"""The machine of this process as a migration moves it: memory, devices, DMA windows and run state together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import HostFault, MalformedMessage
from protocol.geometry import PAGE_SHIFT
from protocol.messages import TceWindowBody
from protocol.startup import VmEntry
from services.qemu.board import Board, BoardState
from services.qemu.edu import EduFunction
from services.qemu.machine import Machine
from services.qemu.qmp import RunState
from services.qemu.virtio_device import VirtioDevice
from shared.host_view import HostState
from shared.touched import touched_in_file

VERSION = 1
_MOVABLE = frozenset({RunState.RUNNING, RunState.PAUSED})


class MachineState(msgspec.Struct, forbid_unknown_fields=True):
    """What qemu sends of a machine. `windows` are in the order in which they were made; `running`, or paused."""

    version: int
    board: BoardState
    windows: list[TceWindowBody]
    running: bool


class MovingMachine:
    """Implements migration.machine.MovableMachine."""

    def __init__(
        self, vm: VmEntry, machine: Machine, board: Board, ram: memoryview, ram_fd: int, host_view: memoryview
    ) -> None:
        """`ram_fd` is the file that `ram` maps."""
        self.vm = vm
        self.ram, self.host_view = ram, host_view
        self._ram_fd = ram_fd
        self._machine, self._board = machine, board
        self._before: RunState | None = None
        """The run state before `switching`."""
        self._runs: bool | None = None
        """As `is_running`, since `switching` or since a state was loaded."""

    def write_page(self, gfn: int, content: bytes | memoryview) -> None:
        """As MovableMachine. A write to the file: half the time of first stores to the mapping, and never a signal."""
        try:
            n_bytes = os.pwrite(self._ram_fd, content, gfn << PAGE_SHIFT)
        except OSError as error:
            raise HostFault(f"the frame of gfn {gfn:#x} cannot be written: {error.strerror}") from None
        if n_bytes != len(content):
            raise HostFault(f"the frame of gfn {gfn:#x} cannot be written: no room")

    def touched(self) -> bytearray:
        """As MovableMachine."""
        return touched_in_file(self._ram_fd, len(self.host_view))

    @property
    def is_running(self) -> bool:
        """As MovableMachine."""
        return self._machine.is_running if self._runs is None else self._runs

    @property
    def runs_here(self) -> bool:
        """As MovableMachine."""
        return (self._before or self._machine.state) is RunState.RUNNING

    @property
    def can_move(self) -> str | None:
        """As MovableMachine."""
        if self._machine.state not in _MOVABLE:
            return f"the machine is {self._machine.state.value}"
        assigned = [function.device.name for function in self._board.functions if isinstance(function, EduFunction)]
        if assigned:
            return f"device {assigned[0]} is assigned to the VM: its state cannot be read"
        return None

    @property
    def secure(self) -> bool:
        """As MovableMachine: a secure VM shares its ultravisor's bounce pages at least, and a normal one no page."""
        return HostState.SHARED in bytes(self.host_view)

    @asynccontextmanager
    async def orders(self) -> AsyncIterator[None]:
        """As MovableMachine."""
        async with self._machine.orders:
            if self._machine.state not in _MOVABLE:
                raise HostFault(f"the machine is {self._machine.state.value} now")
            yield

    async def hold_devices(self) -> None:
        """As MovableMachine."""
        for device in self._virtio():
            await device.hold()
        await self._board.drained()

    def release_devices(self) -> None:
        """As MovableMachine."""
        for device in self._virtio():
            device.release()

    def save_devices(self) -> bytes:
        """As MovableMachine."""
        windows = [window for domain in self._board.bridge.domains for window in domain.windows_in_use]
        return msgspec.msgpack.encode(MachineState(VERSION, self._board.save(), windows, self.is_running))

    async def make_windows(self, state: bytes) -> None:
        """As MovableMachine. Here are the default windows of a machine that was just made."""
        wanted, bridge = _decode(state).windows, self._board.bridge
        for domain in bridge.domains:
            for window in domain.windows_in_use:
                if window not in wanted:
                    await self._machine.remove_window(window.liobn)
        for window in wanted:
            domain_of_it = bridge.domain_with(window.liobn)
            if domain_of_it is None:
                raise MalformedMessage(f"a DMA window {window.liobn:#x}, which this machine cannot have")
            if window not in domain_of_it.windows_in_use and not await self._machine.create_window(window):
                raise HostFault(f"kvm makes no DMA window {window.liobn:#x}")

    async def load_devices(self, state: bytes) -> None:
        """As MovableMachine."""
        decoded = _decode(state)
        try:
            self._board.load(decoded.board)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MalformedMessage(f"the state of the devices: {error}") from None
        self._runs = decoded.running

    def switching(self) -> None:
        """As MovableMachine."""
        self._runs = self._machine.is_running
        self._before, self._machine.state = self._machine.state, RunState.FINISH_MIGRATE

    def stays(self) -> None:
        """As MovableMachine."""
        if self._before is not None:
            self._machine.state, self._before, self._runs = self._before, None, None

    def left(self) -> None:
        """As MovableMachine."""
        self._machine.state = RunState.POSTMIGRATE

    def arrived(self, *, running: bool) -> None:
        """As MovableMachine."""
        self._runs = None
        self._machine.arrived(RunState.RUNNING if running else RunState.PAUSED)
        for device in self._virtio():
            device.release()

    def _virtio(self) -> list[VirtioDevice]:
        devices = (function.device for function in self._board.functions)
        return [device for device in devices if isinstance(device, VirtioDevice)]


def _decode(state: bytes) -> MachineState:
    try:
        decoded = msgspec.msgpack.decode(state, type=MachineState)
    except DECODE_ERRORS as error:
        raise MalformedMessage(f"the state of the devices: {error}") from None
    if decoded.version != VERSION:
        raise MalformedMessage(f"the state of the devices is of version {decoded.version}, here it is {VERSION}")
    return decoded
