"""A real service process under a played launcher: the control protocol of `protocol.control`, and nothing else."""

from __future__ import annotations

import array
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import trio

from protocol import control
from protocol.errors import HostFault, PefboxError
from protocol.roles import Role
from protocol.startup import Keys, LinkEntry, ProcessConfig, VmEntry
from services.testing.calls import ANSWER_SECONDS, bounded

_INT_BYTES = array.array("i").itemsize
_START_SECONDS = 30.0
_STOP_SECONDS = 5.0

OnGive = Callable[[str, str, int], None]
"""Told tag, VM and descriptor of what the process made for others; the descriptor is the callee's."""


class QueryFailed(PefboxError):
    """The process answered a query with this one line."""


class ServiceProcess:
    """One `python -m services.ROLE`. `notices` are what it told its launcher, in order."""

    def __init__(self, role: Role, target: str, on_give: OnGive) -> None:
        self.role = role
        self.target = target
        self.notices: list[control.Notice] = []
        self.protections: dict[str, str] = {}
        self._on_give = on_give
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", f"services.{role.value}", "--control-fd", str(theirs.fileno())]
            self._popen = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self._socket = trio.socket.from_stdlib_socket(ours)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, trio.Event] = {}
        self._answers: dict[int, control.Answer | None] = {}
        self._confined = trio.Event()
        self._ready = trio.Event()
        self._ended = trio.Event()
        self._failure = ""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    # -- start and stop ---------------------------------------------------------------------------------------

    async def start(self, config: ProcessConfig, files: Mapping[str, int], keys: Keys, nursery: trio.Nursery) -> None:
        """The whole start sequence; `files` are the descriptors that `config` names. Raises HostFault."""
        nursery.start_soon(self._read)
        await self.send(control.Start(config), [files[name] for name in config.descriptors])
        await self._until(self._confined)
        await self.send(control.TakeKeys(keys))
        await self._until(self._ready)

    async def stop(self) -> None:
        """Ask it to end; kill it when it does not within some seconds."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_STOP_SECONDS):
                await self._say_stop()
                await self._ended.wait()
            self._popen.kill()
            self._popen.wait()
            self._socket.close()

    async def _say_stop(self) -> None:
        try:
            await self.send(control.Stop())
        except OSError:
            return

    async def _until(self, event: trio.Event) -> None:
        with trio.move_on_after(_START_SECONDS):
            await event.wait()
        if not event.is_set() or self._ended.is_set():
            raise HostFault(f"{self.target} does not start: {self._failure or 'no word from it'}")

    # -- orders and questions ---------------------------------------------------------------------------------

    async def query(self, what: str, **arguments: Any) -> Any:  # noqa: ANN401
        """The answer to an operator's question; raises QueryFailed, HostFault when the process ends instead."""
        number = next(self._numbers)
        await self._ask(number, control.Query(number, what, arguments))
        answer = self._answers.pop(number)
        if answer is None:
            raise HostFault(f"{self.target} ended during {what}")
        if answer.error is not None:
            raise QueryFailed(answer.error)
        return answer.result

    async def barrier(self) -> None:
        """Returns when the process has taken everything sent to it so far."""
        number = next(self._numbers)
        await self._ask(number, control.Ping(number))
        self._answers.pop(number)

    async def add_vm(self, vm: VmEntry, links: list[LinkEntry], keys: Keys, files: Mapping[str, int]) -> None:
        """A VM begins there; returns when it is served."""
        await self.send(control.AddVm(vm, links, keys, list(files)), list(files.values()))
        await self.barrier()

    async def remove_vm(self, name: str) -> None:
        """A VM ends there; returns when all that it held is released."""
        number = next(self._numbers)
        await self._ask(number, control.RemoveVm(number, name))
        self._answers.pop(number)

    async def peer_state(self, peer: str, state: str) -> None:
        """Say what became of a process that it has a link to."""
        await self.send(control.PeerState(peer, state))

    async def send(self, packet: control.ToProcess, descriptors: list[int] | None = None) -> None:
        """One packet with copies of these descriptors."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        await self._socket.sendmsg([control.encode(packet)], rights)

    async def _ask(self, number: int, packet: control.ToProcess) -> None:
        done = self._waiting[number] = trio.Event()
        self._answers[number] = None
        await self.send(packet)
        with bounded(self.target, type(packet).__name__, ANSWER_SECONDS):
            await done.wait()

    # -- what it says -----------------------------------------------------------------------------------------

    async def _read(self) -> None:
        space = socket.CMSG_SPACE(control.MAX_DESCRIPTORS * _INT_BYTES)
        try:
            while True:
                data, ancillary, _, _ = await self._socket.recvmsg(control.MAX_PACKET_BYTES, space)
                if not data:
                    break
                self._take(control.decode_from_process(data), _descriptors(ancillary))
        except ConnectionResetError:
            pass
        self._ended.set()
        for event in (self._confined, self._ready, *self._waiting.values()):
            event.set()

    def _take(self, packet: control.FromProcess, descriptors: list[int]) -> None:
        match packet:
            case control.Give(tag, vm):
                self._on_give(tag, vm, descriptors[0])
            case control.Confined(protections):
                self.protections = protections
                self._confined.set()
            case control.Ready():
                self._ready.set()
            case control.Pong(number):
                self._answered(number, None)
            case control.Answer(number):
                self._answered(number, packet)
            case control.Notice():
                self.notices.append(packet)
            case control.Failed(reason):
                self._failure = reason
            case control.Hello():
                pass

    def _answered(self, number: int, answer: control.Answer | None) -> None:
        if number in self._waiting:
            self._answers[number] = answer
            self._waiting.pop(number).set()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data)
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return list(descriptors)
