"""A VM in KVM without processes: its real parts, a guest and a qemu that obey, an ultravisor that answers as told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import msgspec

from protocol import messages as m
from protocol.codes import UCode
from protocol.declare import Call
from protocol.hcalls import H_SVM_INIT_DONE, H_SVM_INIT_START
from services.kvm.memory import VmMemory
from services.kvm.ultravisor_port import UltravisorPort
from services.kvm.vm import Vm
from services.runtime.link import DEFERRED, Link
from shared.stream_buffer import StreamBuffer
from tests.unit.ultravisor_rig import LOG, MEMORY_BYTES, PlayedGuest, PlayedLink, Registers, vm_entry


class PlayedUltravisor:
    """The port of kvm to an ultravisor: `codes` are its answers by call, U_SUCCESS otherwise, `outputs` the rest."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Registers]] = []
        self.codes: dict[int, int] = {}
        self.outputs: dict[int, Registers] = {}

    async def ucall(self, call: Call, args: Registers, _cause: int) -> Registers:
        """As UltravisorPort."""
        self.calls.append((call.name, list(args)))
        return [self.codes.get(call.number, UCode.U_SUCCESS), *self.outputs.get(call.number, [])]

    ucall_lasting = ucall

    async def ucalls(self, call: Call, args_of_each: Sequence[Registers], cause: int) -> list[Registers]:
        """As UltravisorPort."""
        return [await self.ucall(call, args, cause) for args in args_of_each]

    def names(self) -> list[str]:
        """The ultracalls that came."""
        return [name for name, _ in self.calls]


class KvmRig:
    """A VM of 64 pages."""

    def __init__(
        self,
        *,
        secure_allowed: bool = True,
        time: str = "wall",
        incoming: bool = False,
        qemu: PlayedLink | None = None,
        guest: PlayedGuest | None = None,
        stream: StreamBuffer | None = None,
    ) -> None:
        self.ultravisor, self.guest, self.qemu = PlayedUltravisor(), guest or PlayedGuest(), qemu or PlayedLink()
        fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, MEMORY_BYTES)
        self.memory = VmMemory("vm1", fd, MEMORY_BYTES)
        self.ram_fd = fd
        entry = msgspec.structs.replace(vm_entry(secure_allowed=secure_allowed, time=time), incoming=incoming)
        port = cast(UltravisorPort, self.ultravisor)
        to_guest, to_qemu = cast(Link, self.guest), cast(Link, self.qemu)
        self.vm = Vm(entry, self.memory, to_guest, to_qemu, port, lambda _liobn, _fd: None, lambda: None, LOG, stream)
        self.vm.register_guest(to_guest)
        self.vm.register_qemu(to_qemu)

    async def start(self) -> None:
        """Memory and VM_START, as qemu orders them."""
        for message, body in ((m.MEMSLOT_SET, m.MemslotBody(0, 0, MEMORY_BYTES)), (m.VM_START, m.StartBody(0, 0, {}))):
            assert (await self.qemu.deliver(message, body)).code == 0

    async def hcall(self, call: Call, *args: int) -> int:
        """A hypercall that the ultravisor passed on or issued; its code."""
        if call.number in self.vm.hcalls.waiting:
            return (await self.vm.reflected_waiting(call, 0, list(args), 0))[0]
        answers: list[Registers] = []
        self.vm.reflected_at_once(call, 0, list(args), 0, answers.append)
        assert answers, DEFERRED
        return answers[0][0]

    async def secure(self) -> None:
        """The VM as a secure one, all its pages SECURE."""
        assert await self.hcall(H_SVM_INIT_START) == 0
        assert await self.hcall(H_SVM_INIT_DONE) == 0

    def refuse(self, call: Call, code: int) -> None:
        """The ultravisor answers `code` to `call` from now on."""
        self.ultravisor.codes[call.number] = code


@contextmanager
def kvm_rig(**options: Any) -> Iterator[KvmRig]:  # noqa: ANN401
    """A rig, closed at the end."""
    rig = KvmRig(**options)
    try:
        yield rig
    finally:
        rig.vm.close()
        os.close(rig.ram_fd)
