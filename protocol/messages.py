"""Messages between processes that are no hypercall or ultracall: faults, invalidations, exits, run state.

Each is declared once as a `Message`: number, name, body and reply Struct. A message with `reply=None` is an event.
`leaf` says that its handler answers without calling anyone who could be waiting for it, so the reader of the link
runs it itself; every other call is a task of its own.

Hypercalls and ultracalls travel under their own numbers with a list of registers as body (`REGISTERS`) and
`[code, outputs...]` as reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Generic, Self, TypeVar

import msgspec
from msgspec import Meta

from protocol.codes import HCode, RtasStatus
from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.ethernet import MAX_FRAME_BYTES
from protocol.geometry import MAX_VM_BYTES, PAGE_SHIFT, STREAM_BUFFER_BYTES

Register = Annotated[int, Meta(ge=0)]
"""An unsigned 64-bit register; MessagePack has no larger integer."""

Gfn = Annotated[int, Meta(ge=0, lt=MAX_VM_BYTES >> PAGE_SHIFT)]
Vcpu = Annotated[int, Meta(ge=0, lt=4096)]
GprNumber = Annotated[int, Meta(ge=0, lt=32)]
Source = Annotated[int, Meta(ge=0, lt=1 << 24)]

MAX_REGISTERS = 16
_registers_decoder: msgspec.msgpack.Decoder[list[int]] = msgspec.msgpack.Decoder(
    Annotated[list[Register], Meta(max_length=MAX_REGISTERS)]
)
_result_decoder: msgspec.msgpack.Decoder[list[int]] = msgspec.msgpack.Decoder(
    Annotated[list[int], Meta(min_length=1, max_length=MAX_REGISTERS)]
)


def decode_registers(body: msgspec.Raw | bytes) -> list[int]:
    """Argument registers of a call body; raises MalformedMessage."""
    try:
        return _registers_decoder.decode(body)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None


def decode_result(body: msgspec.Raw | bytes) -> list[int]:
    """`[code, outputs...]` of a reply body; raises MalformedMessage."""
    try:
        return _result_decoder.decode(body)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None


class Body(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Base of all bodies: positional on the wire, unknown fields refused."""

    @classmethod
    def refused(cls, code: int) -> Self:
        """The reply of this type that says only `code`: its first field, the others at their defaults."""
        return cls(code)


BodyT = TypeVar("BodyT", bound=Body)
ReplyT = TypeVar("ReplyT", bound=Body)


class Empty(Body, frozen=True):
    """A body without content."""


class Status(Body, frozen=True):
    """A reply that says only how it went."""

    code: int = HCode.H_SUCCESS


@dataclass(frozen=True, slots=True)
class Message(Generic[BodyT, ReplyT]):
    """One declared message."""

    number: int
    name: str
    body: type[BodyT]
    reply: type[ReplyT] | None
    leaf: bool = False

    def decode_body(self, raw: msgspec.Raw | bytes) -> BodyT:
        """The body Struct; raises MalformedMessage."""
        return _decode(self.name, self.body, raw)

    def decode_reply(self, raw: msgspec.Raw | bytes) -> ReplyT:
        """The reply Struct; raises MalformedMessage."""
        if self.reply is None:
            raise MalformedMessage(f"{self.name} has no reply")
        return _decode(self.name, self.reply, raw)


AnyBodyT = TypeVar("AnyBodyT", bound=Body)


def _decode(name: str, kind: type[AnyBodyT], raw: msgspec.Raw | bytes) -> AnyBodyT:
    try:
        return _decoder_of(kind).decode(raw)
    except DECODE_ERRORS as error:
        raise MalformedMessage(f"{name}: {error}") from None


_decoders: dict[type[Body], msgspec.msgpack.Decoder] = {}  # type: ignore[type-arg]


def _decoder_of(kind: type[AnyBodyT]) -> msgspec.msgpack.Decoder[AnyBodyT]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    return decoder


MESSAGES: dict[int, Message[Body, Body]] = {}


def _declare(
    number: int, name: str, body: type[BodyT], reply: type[ReplyT], *, leaf: bool = False
) -> Message[BodyT, ReplyT]:
    return _register(Message(number, name, body, reply, leaf))


def _event(number: int, name: str, body: type[BodyT]) -> Message[BodyT, Empty]:
    return _register(Message(number, name, body, None, leaf=True))


def _register(message: Message[BodyT, ReplyT]) -> Message[BodyT, ReplyT]:
    if message.number in MESSAGES:
        raise ValueError(f"message {message.name} ({message.number:#x}) is declared twice")
    MESSAGES[message.number] = message  # type: ignore[assignment]
    return message


# -- guest -> kvm (normal VM), guest -> ultravisor (SVM) ------------------------------------------------------


class Access(IntEnum):
    """What a faulting instruction wanted."""

    READ = 0
    WRITE = 1
    EXECUTE = 2


class MapFaultBody(Body, frozen=True):
    """A guest touched a GFN that its partition-scoped map does not give it."""

    vcpu: Vcpu
    gfn: Gfn
    access: Access


class CrashBody(Body, frozen=True):
    """The guest cannot go on; `reason` is printable text for the operator."""

    vcpu: Vcpu
    reason: Annotated[str, Meta(max_length=512)]


MAP_FAULT = _declare(0x10001, "MAP_FAULT", MapFaultBody, Status)
GUEST_CRASHED = _event(0x10002, "GUEST_CRASHED", CrashBody)


# -- kvm -> guest, ultravisor -> guest ------------------------------------------------------------------------


class StartBody(Body, frozen=True):
    """Start a processor: program counter and the general registers that the ABI of the entry names.

    SVM_START has it take the ultravisor's map first, and run with S set.
    """

    vcpu: Vcpu
    pc: Register
    gprs: Annotated[dict[GprNumber, Register], Meta(max_length=32)]


class RunBody(Body, frozen=True):
    """Stop or continue a processor."""

    vcpu: Vcpu


class LineBody(Body, frozen=True):
    """The level of a processor's external interrupt line."""

    vcpu: Vcpu
    level: bool


class Range(Body, frozen=True):
    """`n` GFNs from `gfn`."""

    gfn: Gfn
    n: Annotated[int, Meta(ge=1)]


MAX_INVALIDATION_RANGES = 512


class InvalidateBody(Body, frozen=True):
    """Forget every translation of these GFNs; the acknowledgement promises that none is used any more."""

    ranges: Annotated[list[Range], Meta(max_length=MAX_INVALIDATION_RANGES)]


VCPU_START = _declare(0x10101, "VCPU_START", StartBody, Status, leaf=True)
VCPU_STOP = _declare(0x10102, "VCPU_STOP", RunBody, Status, leaf=True)
VCPU_CONTINUE = _declare(0x10103, "VCPU_CONTINUE", RunBody, Status, leaf=True)
VCPU_LINE = _event(0x10104, "VCPU_LINE", LineBody)
MAP_INVALIDATE = _declare(0x10105, "MAP_INVALIDATE", InvalidateBody, Status, leaf=True)
SVM_START = _declare(0x10106, "SVM_START", StartBody, Status, leaf=True)
SVM_ENDED = _declare(0x10107, "SVM_ENDED", Empty, Status, leaf=True)


# -- migration: the processor's state ---------------------------------------------------------------------------


MAX_PROCESSOR_STATE_BYTES = 96 << 10
ProcessorState = Annotated[bytes, Meta(max_length=MAX_PROCESSOR_STATE_BYTES)]


class SavedProcessor(Body, frozen=True):
    """A processor's state, apart from memory. `code` is H_BUSY when it came to no safe point."""

    code: int
    state: ProcessorState = b""


class LoadProcessorBody(Body, frozen=True):
    """A processor goes on from `state`, as soon as nobody holds it any more."""

    vcpu: Vcpu
    state: ProcessorState


VCPU_SAVE = _declare(0x10108, "VCPU_SAVE", RunBody, SavedProcessor)
"""Of a normal VM: stop at the next safe point, as VCPU_STOP, and say what the state is there."""
VCPU_LOAD = _declare(0x10109, "VCPU_LOAD", LoadProcessorBody, Status, leaf=True)
"""Of a normal VM that has not started: it is stopped, and VCPU_CONTINUE lets it run."""
SVM_FREEZE = _declare(0x1010A, "SVM_FREEZE", RunBody, SavedProcessor)
"""As VCPU_SAVE for a secure VM; only SVM_THAW lets it run, whatever kvm orders."""
SVM_LOAD = _declare(0x1010B, "SVM_LOAD", LoadProcessorBody, Status, leaf=True)
"""Take secure memory and map as for SVM_START; the processor is frozen."""
SVM_THAW = _declare(0x1010C, "SVM_THAW", RunBody, Status, leaf=True)
"""The processor may run here, unless kvm has stopped it."""


# -- a debugger of the host on a normal VM ----------------------------------------------------------------------


MAX_DEBUG_POINTS = 64
MAX_REGISTERS_BYTES = 4096


class DebugRegisters(Body, frozen=True):
    """A processor's registers (shared.gdb_registers): big-endian `values` in a row, numbers of those that are
    `missing`, and the byte order that the processor has now."""

    code: int
    little_endian: bool = False
    values: Annotated[bytes, Meta(max_length=MAX_REGISTERS_BYTES)] = b""
    missing: Annotated[list[Annotated[int, Meta(ge=0, lt=1024)]], Meta(max_length=1024)] = []


class DebugRegisterBody(Body, frozen=True):
    """The big-endian `value` of one register, as long as the register is."""

    vcpu: Vcpu
    number: Annotated[int, Meta(ge=0, lt=1024)]
    value: Annotated[bytes, Meta(min_length=1, max_length=16)]


class DebugAddressBody(Body, frozen=True):
    """An effective address."""

    vcpu: Vcpu
    address: Register


class DebugAddressReply(Body, frozen=True):
    """The guest physical address; H_NOT_FOUND where the guest has mapped nothing."""

    code: int
    gpa: Register = 0


class DebugPoint(Body, frozen=True):
    """A breakpoint or watchpoint: `kind` as in GDB's Z packets."""

    kind: Annotated[int, Meta(ge=0, le=4)]
    address: Register
    n_bytes: Annotated[int, Meta(ge=0, le=4096)]


class DebugBody(Body, frozen=True):
    """What stops the processor from its next VCPU_CONTINUE on: these points, and with `step` one instruction."""

    vcpu: Vcpu
    points: Annotated[list[DebugPoint], Meta(max_length=MAX_DEBUG_POINTS)]
    step: bool = False


class DebugCommandBody(Body, frozen=True):
    """A command of the processor's own, as GDB's `monitor` has it."""

    vcpu: Vcpu
    words: Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=16)]


MAX_DEBUG_TEXT_CHARS = 16 << 10


class DebugCommandReply(Body, frozen=True):
    """What it has to say; with H_PARAMETER why there is no such command."""

    code: int
    text: Annotated[str, Meta(max_length=MAX_DEBUG_TEXT_CHARS)] = ""


class WatchMet(IntEnum):
    """The watchpoint that an access met, by the number that GDB's Z packets have for it."""

    NONE = 0
    WRITE = 2
    READ = 3
    ACCESS = 4


class DebugStopBody(Body, frozen=True):
    """The processor stopped, as by VCPU_STOP, at a point or behind a step; `address` is that of the access that met
    `watch`."""

    vcpu: Vcpu
    watch: WatchMet = WatchMet.NONE
    address: Register = 0


VCPU_REGISTERS = _declare(0x1010D, "VCPU_REGISTERS", RunBody, DebugRegisters, leaf=True)
"""Of a normal VM, as KVM_GET_REGS and its kin."""
VCPU_SET_REGISTER = _declare(0x1010E, "VCPU_SET_REGISTER", DebugRegisterBody, Status, leaf=True)
VCPU_TRANSLATE = _declare(0x1010F, "VCPU_TRANSLATE", DebugAddressBody, DebugAddressReply, leaf=True)
"""Of a normal VM, as KVM_TRANSLATE: through the guest's own tables."""
VCPU_DEBUG = _declare(0x10110, "VCPU_DEBUG", DebugBody, Status, leaf=True)
"""Of a normal VM, as KVM_SET_GUEST_DEBUG. H_BUSY while the guest's owner debugs it, H_NOT_AVAILABLE where the processor
has no such points, H_PARAMETER where it does not take these."""
VCPU_DEBUG_COMMAND = _declare(0x10111, "VCPU_DEBUG_COMMAND", DebugCommandBody, DebugCommandReply, leaf=True)
"""Of a normal VM: special purpose registers, which KVM_GET_ONE_REG gives one by one."""
VCPU_DEBUG_STOP = _event(0x10112, "VCPU_DEBUG_STOP", DebugStopBody)
"""As KVM_EXIT_DEBUG; from a guest to kvm, and on to qemu."""


# -- kvm -> qemu: exits to user space -------------------------------------------------------------------------


class MmioLoadBody(Body, frozen=True):
    """A load of `size` bytes at guest physical `gpa`."""

    gpa: Register
    size: Annotated[int, Meta(ge=1, le=8)]


class MmioLoadReply(Body, frozen=True):
    """The value, right aligned; `code` is H_PARAMETER where no device answers."""

    code: int
    value: Register = 0


class MmioStoreBody(Body, frozen=True):
    """A store of the low `size` bytes of `value`."""

    gpa: Register
    size: Annotated[int, Meta(ge=1, le=8)]
    value: Register


class HcallBody(Body, frozen=True):
    """A hypercall that user space answers: firmware's, and what concerns the device tree."""

    number: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
    args: Annotated[list[Register], Meta(max_length=9)]


class HcallReply(Body, frozen=True):
    """Its result code."""

    code: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)]


Word = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Words = Annotated[list[Word], Meta(max_length=16)]


class RtasBody(Body, frozen=True):
    """An RTAS service: token, argument words and how many return words the caller has room for."""

    vcpu: Vcpu
    token: Word
    args: Words
    n_rets: Annotated[int, Meta(ge=0, le=16)]


class RtasReply(Body, frozen=True):
    """The return words, the status first."""

    rets: Words

    @classmethod
    def refused(cls, code: int) -> Self:
        """Busy where the next try may be answered, else a hardware error: RTAS has no codes of hypercalls."""
        status = RtasStatus.BUSY if code == HCode.H_BUSY else RtasStatus.HARDWARE_ERROR
        return cls([status & 0xFFFFFFFF])


class VmEventKind(IntEnum):
    """What kvm tells qemu about its VM."""

    CRASHED = 0
    """The guest gave up or was ended; `reason` says why."""
    SECURE = 1
    """The VM has turned itself secure; told only where the machine is made to (`DmaMachine.tell_secure`)."""


class VmEventBody(Body, frozen=True):
    """Something happened to the VM that qemu shows to its user."""

    kind: VmEventKind
    reason: Annotated[str, Meta(max_length=512)]


EXIT_MMIO_LOAD = _declare(0x10201, "EXIT_MMIO_LOAD", MmioLoadBody, MmioLoadReply)
EXIT_MMIO_STORE = _declare(0x10202, "EXIT_MMIO_STORE", MmioStoreBody, Status)
EXIT_RTAS = _declare(0x10203, "EXIT_RTAS", RtasBody, RtasReply)
EXIT_HCALL = _declare(0x10204, "EXIT_HCALL", HcallBody, HcallReply)
VM_EVENT = _event(0x10205, "VM_EVENT", VmEventBody)
DOORBELL_RUNG = _event(0x10206, "DOORBELL_RUNG", MmioStoreBody)


# -- qemu -> kvm ----------------------------------------------------------------------------------------------


MAX_PAGES = 256


class PagesBody(Body, frozen=True):
    """PAGES_WANTED: GFNs that the host is about to touch and that its view calls absent.

    PAGES_DISCARD: GFNs that the guest has in its balloon; their frames go back to the host, content and all.
    H_PERMISSION: the VM is secure, its pages are not the host's to discard. H_BUSY: a later try may succeed.
    """

    gfns: Annotated[list[Gfn], Meta(min_length=1, max_length=MAX_PAGES)]


class IrqSourceBody(Body, frozen=True):
    """An interrupt source: a number, and whether it is level triggered (LSI) or an edge (MSI)."""

    source: Source
    level_triggered: bool


class IrqBody(Body, frozen=True):
    """A source's new level, or an edge when `level` is true and the source is edge triggered."""

    source: Source
    level: bool


class MemslotBody(Body, frozen=True):
    """A memory slot: guest RAM at `gpa`, `size_bytes` long; size 0 removes it."""

    slot: Annotated[int, Meta(ge=0, lt=512)]
    gpa: Register
    size_bytes: Register


class TceWindowBody(Body, frozen=True):
    """A TCE table: `n_tces` entries of `1 << page_shift` bytes from bus address `base`."""

    liobn: Word
    page_shift: Annotated[int, Meta(ge=12, le=34)]
    base: Register
    n_tces: Annotated[int, Meta(ge=1, le=1 << 24)]


class DoorbellBody(Body, frozen=True):
    """A device register whose store has no effect that the guest could wait for (as KVM's ioeventfd).

    While it is `on`, kvm answers such a store itself and rings the device by DOORBELL_RUNG.
    """

    gpa: Register
    size_bytes: Annotated[int, Meta(ge=1, le=8)]
    on: bool


class LiobnBody(Body, frozen=True):
    """One TCE table."""

    liobn: Word


class TerminalBody(Body, frozen=True):
    """Bytes that RTAS displays on the first terminal."""

    data: Annotated[bytes, Meta(max_length=16)]


PAGES_WANTED = _declare(0x10301, "PAGES_WANTED", PagesBody, Status)
IRQ_SOURCE = _declare(0x10302, "IRQ_SOURCE", IrqSourceBody, Status, leaf=True)
IRQ_SET = _event(0x10303, "IRQ_SET", IrqBody)
MEMSLOT_SET = _declare(0x10304, "MEMSLOT_SET", MemslotBody, Status)
VM_START = _declare(0x10305, "VM_START", StartBody, Status)
VM_STOP = _declare(0x10306, "VM_STOP", Empty, Status)
VM_CONTINUE = _declare(0x10307, "VM_CONTINUE", Empty, Status)
VM_RESET = _declare(0x10308, "VM_RESET", Empty, Status)
TCE_WINDOW_CREATE = _declare(0x10309, "TCE_WINDOW_CREATE", TceWindowBody, Status, leaf=True)
TCE_WINDOW_REMOVE = _declare(0x1030A, "TCE_WINDOW_REMOVE", LiobnBody, Status, leaf=True)
VM_POWEROFF = _declare(0x1030B, "VM_POWEROFF", Empty, Status)
TERMINAL_OUTPUT = _event(0x1030C, "TERMINAL_OUTPUT", TerminalBody)
DOORBELL_SET = _event(0x1030D, "DOORBELL_SET", DoorbellBody)
PAGES_DISCARD = _declare(0x1030E, "PAGES_DISCARD", PagesBody, Status)


# -- qemu -> kvm: migration -----------------------------------------------------------------------------------


StreamOffset = Annotated[int, Meta(ge=0, lt=STREAM_BUFFER_BYTES)]
StreamLength = Annotated[int, Meta(ge=0, le=STREAM_BUFFER_BYTES)]
MAX_DIRTY_LOG_PAGES = 1 << 18


class StreamPlaceBody(Body, frozen=True):
    """A place in the VM's stream buffer, which kvm, qemu and ultravisor have in common."""

    offset: StreamOffset
    n_bytes: StreamLength


class SavedVm(Body, frozen=True):
    """kvm's state of the VM is `n_bytes` long and lies where the caller wanted it."""

    code: int
    n_bytes: StreamLength = 0


class DirtyLogBody(Body, frozen=True):
    """`n` GFNs from `gfn`, a multiple of 8."""

    gfn: Gfn
    n: Annotated[int, Meta(ge=1, le=MAX_DIRTY_LOG_PAGES)]


class DirtyLog(Body, frozen=True):
    """A bit a GFN, the lowest of the first byte for the first: written since this was last asked.

    H_BUSY: a writer did not acknowledge, and nothing is lost.
    """

    code: int
    bitmap: Annotated[bytes, Meta(max_length=MAX_DIRTY_LOG_PAGES // 8)] = b""


class MigrationUcallBody(Body, frozen=True):
    """One of MIGRATION_UCALLS for this VM; `args` are those after the lpid."""

    number: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
    args: Annotated[list[Register], Meta(max_length=4)]


class MigrationUcallReply(Body, frozen=True):
    """What the ultracall returned; U_PARAMETER for one that is no step of a migration."""

    code: int
    results: Annotated[list[Register], Meta(max_length=4)] = []


VM_FREEZE = _declare(0x1030F, "VM_FREEZE", Empty, Status)
"""Stop a normal VM at a safe point and keep its processor's state. VM_CONTINUE lets it run again."""
VM_SAVE = _declare(0x10310, "VM_SAVE", StreamPlaceBody, SavedVm)
"""Write kvm's state of the VM, whose processor stands still; `n_bytes` is the room."""
VM_LOAD = _declare(0x10311, "VM_LOAD", StreamPlaceBody, Status)
"""Take over what VM_SAVE wrote on another host. The VM is paused then: VM_CONTINUE lets it run."""
DIRTY_LOG = _declare(0x10312, "DIRTY_LOG", DirtyLogBody, DirtyLog)
MIGRATION_UCALL = _declare(0x10313, "MIGRATION_UCALL", MigrationUcallBody, MigrationUcallReply)


# -- qemu <-> qemu: VMs of one network ------------------------------------------------------------------------

MAX_NET_FRAMES = 64


class NetFramesBody(Body, frozen=True):
    """Ethernet frames in the order in which they were sent; what is no frame of the network is dropped by itself."""

    frames: Annotated[
        list[Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES)]], Meta(min_length=1, max_length=MAX_NET_FRAMES)
    ]


NET_FRAMES = _event(0x10401, "NET_FRAMES", NetFramesBody)


# -- qemu -> qemu: migration ----------------------------------------------------------------------------------


class MigrationKeyBody(Body, frozen=True):
    """The key of the bulk channel, new for each migration."""

    key: Annotated[bytes, Meta(min_length=32, max_length=32)]


MIGRATION_KEY = _declare(0x10501, "MIGRATION_KEY", MigrationKeyBody, Status, leaf=True)
