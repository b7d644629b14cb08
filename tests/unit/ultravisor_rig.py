"""An ultravisor without processes: its real parts, a kvm that a test can make lie, a guest that takes what it is sent.

The links are played, so every call runs at once in the test's own thread; only what a peer could send crosses them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import structlog
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import hcalls as h
from protocol import messages as m
from protocol import ucalls as u
from protocol.codes import HCode
from protocol.declare import Call
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from protocol.registers import to_register
from protocol.startup import GuestEntry, VmEntry
from protocol.wire import Envelope, MessageKind
from services.runtime.link import Link
from services.runtime.patience import Patience
from services.runtime.process import Runtime
from services.testing.image import PlayedImage, make_image
from services.ultravisor.audit import AuditLine, AuditLog
from services.ultravisor.guest_calls import GuestCalls
from services.ultravisor.hypervisor import Hypervisor
from services.ultravisor.hypervisor_calls import HypervisorCalls
from services.ultravisor.life import SvmLife
from services.ultravisor.migration.handshake import Host
from services.ultravisor.migration.ledger import FileLedger
from services.ultravisor.migration_calls import MigrationCalls
from services.ultravisor.normal_ram import NormalRam
from services.ultravisor.partition import Partition
from services.ultravisor.secure_memory import SecureAccount
from services.ultravisor.snapshot_calls import SnapshotCalls
from shared.real_address import real_address
from shared.stream_buffer import StreamBuffer, make_stream_buffer

LPID = 5
MEMORY_BYTES = 4 << 20
N_PAGES = MEMORY_BYTES // PAGE_BYTES
LOG = structlog.wrap_logger(structlog.ReturnLogger())

Registers = list[int]
Served = Callable[[Registers], Awaitable[Registers | None]]
"""What kvm does with a hypercall `[args...]`: `[code, outputs...]`, or None for no answer at all."""


def envelope(number: int = 0, correlation: int = 0) -> Envelope:
    """The frame around a call whose body is handed over beside it."""
    return Envelope(1, MessageKind.CALL, number, correlation, 0, msgspec.Raw(b"\xc0"))


class PlayedLink:
    """The ultravisor's end of a link, where a test puts in what the peer sends."""

    def __init__(self) -> None:
        self.patience = Patience()
        self._handlers: dict[int, Callable[[Envelope, Any], Awaitable[Any]]] = {}

    def on(self, call: Any, handler: Callable[[Envelope, Any], Any]) -> None:  # noqa: ANN401
        """As Link.on."""

        async def serve(frame: Envelope, body: Any) -> Any:  # noqa: ANN401
            return handler(frame, body)

        self._handlers[call.number] = serve

    def on_waiting(self, call: Any, handler: Callable[[Envelope, Any], Awaitable[Any]]) -> None:  # noqa: ANN401
        """As Link.on_waiting."""
        self._handlers[call.number] = handler

    def on_together(self, call: Call, handler: Callable[[Any], Awaitable[list[Any]]]) -> None:
        """As Link.on_together."""

        async def serve(frame: Envelope, body: Any) -> Any:  # noqa: ANN401
            return (await handler([(frame, body)]))[0]

        self._handlers[call.number] = serve

    @property
    def served(self) -> set[int]:
        """Numbers of the calls that the ultravisor serves here."""
        return set(self._handlers)

    async def deliver(self, call: Call | m.Message[Any, Any], body: Any) -> Any:  # noqa: ANN401
        """The peer issues `call`; what the ultravisor answers, None when the answer comes later."""
        return await self._handlers[call.number](envelope(call.number), body)


class PlayedGuest(PlayedLink):
    """A guest: every call of the ultravisor is answered at once."""

    peer = "vm1/guest"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, m.Body]] = []
        self.events: list[tuple[str, m.Body]] = []
        self.replies: list[tuple[Envelope, Any]] = []
        self.codes: dict[int, int] = {}
        """What the guest answers, by message; H_SUCCESS otherwise."""
        self.held: dict[int, trio.Event] = {}
        """Messages that are answered only when their event is set."""
        self.processor = b"registers"
        """The state that it is frozen with."""

    async def call(self, message: m.Message[Any, Any], body: m.Body, _cause: int = 0) -> m.Status:
        await trio.lowlevel.checkpoint()
        self.calls.append((message.name, body))
        if message.number in self.held:
            await self.held[message.number].wait()
        code = self.codes.get(message.number, HCode.H_SUCCESS)
        if message is m.SVM_FREEZE:
            return cast(m.Status, m.SavedProcessor(code, b"" if code else self.processor))
        return m.Status(code)

    def names(self) -> list[str]:
        """The calls that came, in order."""
        return [name for name, _ in self.calls]

    def send_event(self, message: m.Message[Any, Any], body: m.Body, _cause: int = 0) -> bool:
        """As Link.send_event."""
        self.events.append((message.name, body))
        return True

    def reply(self, to: Envelope, body: Any) -> None:  # noqa: ANN401
        self.replies.append((to, body))


class PlayedKvm(PlayedLink):
    """A kvm. It obeys, unless a test puts a handler of its own into `lies`."""

    peer = "alpha/kvm"
    peer_state = "up"

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__()
        self.frames: list[tuple[int, int, Registers]] = []
        """Number, correlation id and body of everything that the ultravisor sent."""
        self.lies: dict[int, Served] = {}
        self.extra_outputs: Registers = []
        self.given: set[int] = set()
        """Frames that it gave the ultravisor."""
        self.hypervisor: Hypervisor
        self._nursery = nursery

    def send_call(self, number: int, correlation: int, body: Registers, _cause: int) -> None:
        """As Link.send_call."""
        self.frames.append((number, correlation, list(body)))
        self._nursery.start_soon(self._serve, number, correlation, list(body))

    def names(self) -> list[str]:
        """The hypercalls that came, in order."""
        return [h.HCALLS.by_number[number].name for number, _, _ in self.frames]

    async def _serve(self, number: int, cookie: int, body: Registers) -> None:
        await trio.lowlevel.checkpoint()
        result = await self.lies.get(number, self.obey(number))(body[2:])
        if result is not None:
            self.give_back(cookie, result)

    def give_back(self, cookie: int, result: Registers) -> Registers | None:
        """UV_RETURN; what the ultravisor answers to it."""
        registers = [to_register(result[0]), cookie, *result[1:], *self.extra_outputs]
        return self.hypervisor.take_return(envelope(), registers)

    def obey(self, number: int) -> Served:
        """The handler of a kvm that does what it is asked."""
        handlers: dict[int, Served] = {
            h.H_SVM_INIT_START.number: self._init_start,
            h.H_SVM_PAGE_IN.number: self._page_in,
            h.H_SVM_INIT_ABORT.number: self._init_abort,
        }
        return handlers.get(number, _success)

    async def _init_start(self, _args: Registers) -> Registers:
        code = await self.ucall(u.UV_REGISTER_MEM_SLOT, LPID, 0, MEMORY_BYTES, 0, 0)
        return [HCode.H_SUCCESS if not code else HCode.H_PARAMETER]

    async def _page_in(self, args: Registers) -> Registers:
        return [HCode.H_SUCCESS if not await self.page_in(args[0] >> PAGE_SHIFT) else HCode.H_PARAMETER]

    async def _init_abort(self, _args: Registers) -> Registers:
        for gfn in sorted(self.given):
            await self.page_out(gfn)
        await self.ucall(u.UV_SVM_TERMINATE, LPID)
        return [HCode.H_PARAMETER]

    # -- ultracalls of this kvm -------------------------------------------------------------------------------

    async def ucall(self, call: Call, *registers: int) -> int:
        """An ultracall; its code."""
        result: Registers = await self.deliver(call, list(registers))
        return result[0]

    async def page_in(self, gfn: int) -> int:
        """UV_PAGE_IN of a frame."""
        self.given.add(gfn)
        return await self.ucall(u.UV_PAGE_IN, *page_registers(gfn))

    async def page_out(self, gfn: int) -> int:
        """UV_PAGE_OUT of a frame."""
        return await self.ucall(u.UV_PAGE_OUT, *page_registers(gfn))

    async def page_inval(self, gfn: int) -> int:
        """UV_PAGE_INVAL of a frame."""
        return await self.ucall(u.UV_PAGE_INVAL, LPID, gpa_of(gfn), PAGE_SHIFT)

    async def terminate(self) -> int:
        """UV_SVM_TERMINATE."""
        return await self.ucall(u.UV_SVM_TERMINATE, LPID)


async def _success(_args: Registers) -> Registers:
    return [HCode.H_SUCCESS]


def answering(*result: int) -> Served:
    """A kvm that answers this and does nothing."""

    async def serve(_args: Registers) -> Registers:
        return list(result)

    return serve


async def silence(_args: Registers) -> None:
    """A kvm that never answers."""


def page_registers(gfn: int, flags: int = 0, order: int = PAGE_SHIFT) -> Registers:
    """lpid, real address, gpa, flags and order of UV_PAGE_IN and UV_PAGE_OUT."""
    return [LPID, real_address(LPID, gpa_of(gfn)), gpa_of(gfn), flags, order]


class UltravisorRig:
    """One host with one VM of 64 pages whose RAM is `ram_fd`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        key: RSAPrivateKey,
        secure_memory_bytes: int = 64 << 20,
        host: Host | None = None,
        ledger_fd: int | None = None,
        *,
        restoring: bool = False,
    ) -> None:
        """`host` is what it is to other ultravisors; without it nothing leaves or arrives. `ledger_fd` is one that it
        goes on with, and the caller's; `restoring` says how its VM begins.
        """
        self.account = SecureAccount(secure_memory_bytes)
        self.notices: list[tuple[str, str, str]] = []
        self.pidr = 0
        """Of the guest's processor."""
        self.ram_fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.ram_fd, MEMORY_BYTES)
        self._audit_fd = os.memfd_create("audit", os.MFD_CLOEXEC)
        self._guest_end, private = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        runtime = cast(Runtime, SimpleNamespace(log=LOG, protections={}, notice=self._notice, nursery=nursery))
        self.guest, self.kvm = PlayedGuest(), PlayedKvm(nursery)
        self.hypervisor = Hypervisor(cast(Link, self.kvm), LOG)
        self._ledger_fd = os.memfd_create("ledger", os.MFD_CLOEXEC) if ledger_fd is None else os.dup(ledger_fd)
        self.ledger = FileLedger(self._ledger_fd)
        audit = AuditLog(self._audit_fd, lambda: 0.0)
        self.life = SvmLife(runtime, self.hypervisor, self.account, key, audit, self.ledger)
        ram = NormalRam(os.dup(self.ram_fd), MEMORY_BYTES)
        self.partition = Partition(vm_entry(restoring=restoring), ram, cast(Link, self.guest), private)
        self.kvm.hypervisor = self.hypervisor
        HypervisorCalls({LPID: self.partition}, self.life).register(cast(Link, self.kvm), self.hypervisor)
        GuestCalls(self.partition, self.hypervisor, self.life).register(cast(Link, self.guest))
        stream = make_stream_buffer("vm1")
        self.partition.stream = StreamBuffer(os.dup(stream.fd))
        self.stream = StreamBuffer(os.dup(stream.fd))
        stream.close()
        self.migrations = MigrationCalls({LPID: self.partition}, self.life, self.account, host, self.ledger)
        self.migrations.register(cast(Link, self.kvm))
        SnapshotCalls(self.migrations).register(cast(Link, self.kvm))

    async def _notice(self, what: str, vm: str, reason: str) -> None:
        self.notices.append((what, vm, reason))

    # -- the VM -----------------------------------------------------------------------------------------------

    def load(self, image: PlayedImage) -> None:
        """Put an image into normal RAM, among other bytes of the host."""
        for gfn in range(N_PAGES):
            self.write(gfn, bytes([gfn + 1]) * PAGE_BYTES)
        for gpa, data in image.parts.items():
            os.pwrite(self.ram_fd, data, gpa)

    async def esm(self, image: PlayedImage) -> int:
        """UV_ESM of the guest."""
        return await self.ucall(u.UV_ESM, image.kbase, image.fdt_gpa)

    async def ucall(self, call: Call, *args: int) -> int:
        """An ultracall of the guest; its code."""
        own = [self.pidr] * len(call.hardware)
        result: Registers = await self.guest.deliver(call, [0, *own, *args])
        return result[0]

    async def secure(self, image: PlayedImage) -> None:
        """The VM with `image` loaded, as a secure one."""
        self.load(image)
        assert await self.esm(image) == 0

    async def share(self, gfn: int, n_pages: int = 1) -> int:
        """UV_SHARE_PAGE of the guest."""
        return await self.ucall(u.UV_SHARE_PAGE, gfn, n_pages)

    async def unshare(self, gfn: int, n_pages: int = 1) -> int:
        """UV_UNSHARE_PAGE of the guest."""
        return await self.ucall(u.UV_UNSHARE_PAGE, gfn, n_pages)

    async def fault(self, gfn: int) -> int:
        """A store of the guest to a page that its map does not give."""
        status: m.Status = await self.guest.deliver(m.MAP_FAULT, m.MapFaultBody(0, gfn, m.Access.WRITE))
        return status.code

    def state(self, gfn: int) -> str:
        """The ultravisor's state of a frame."""
        assert self.partition.svm is not None
        return self.partition.svm.states[gfn].name

    def page(self, gfn: int) -> memoryview:
        """The secure frame."""
        assert self.partition.svm is not None
        return self.partition.svm.secure_page(gfn)

    # -- the host ---------------------------------------------------------------------------------------------

    def read(self, gfn: int) -> bytes:
        """A normal frame."""
        return os.pread(self.ram_fd, PAGE_BYTES, gpa_of(gfn))

    def write(self, gfn: int, data: bytes) -> None:
        """Store into a normal frame."""
        os.pwrite(self.ram_fd, data, gpa_of(gfn))

    def ram(self) -> bytes:
        """All normal RAM."""
        return os.pread(self.ram_fd, MEMORY_BYTES, 0)

    def audit(self) -> list[AuditLine]:
        """The audit log."""
        text = os.pread(self._audit_fd, 1 << 20, 0)
        return [msgspec.json.decode(line, type=AuditLine) for line in text.splitlines()]

    def audited(self, event: str) -> list[dict[str, Any]]:
        """The facts of every line of an event."""
        return [line.facts for line in self.audit() if line.event == event]

    def close(self) -> None:
        """Release what the rig opened."""
        if self.partition.svm is not None:
            self.partition.svm.release()
        self.partition.close()
        self._guest_end.close()
        self.stream.close()
        os.close(self._ledger_fd)
        os.close(self.ram_fd)
        os.close(self._audit_fd)


def played_image(key: RSAPrivateKey, kernel: bytes, files: dict[str, bytes]) -> PlayedImage:
    """A secure image for the machine of `key`, in memory of MEMORY_BYTES."""
    form = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
    return make_image(pem, kernel, MEMORY_BYTES, files)


def vm_entry(*, secure_allowed: bool = True, time: str = "wall", restoring: bool = False) -> VmEntry:
    """The entry of `vm1` with LPID and MEMORY_BYTES."""
    return VmEntry(
        name="vm1",
        lpid=LPID,
        incarnation=1,
        memory_bytes=MEMORY_BYTES,
        ram_segment="",
        time=time,
        secure_allowed=secure_allowed,
        debuggable=False,
        guest=GuestEntry(),
        disks=[],
        devices=[],
        restoring=restoring,
    )


@contextmanager
def ultravisor_rig(
    nursery: trio.Nursery,
    key: RSAPrivateKey,
    secure_memory_bytes: int = 64 << 20,
    host: Host | None = None,
    ledger_fd: int | None = None,
    *,
    restoring: bool = False,
) -> Iterator[UltravisorRig]:
    """A rig, closed at the end."""
    rig = UltravisorRig(nursery, key, secure_memory_bytes, host, ledger_fd, restoring=restoring)
    try:
        yield rig
    finally:
        rig.close()
