"""The control socketpair between the launcher and each process: SOCK_SEQPACKET, one MessagePack Struct a packet.

Sequence of a start: process `Hello` -> launcher `Start` (with descriptors) -> process confines itself, `Confined`
-> launcher `Keys` -> process opens its links, `Ready`. Descriptors that one process makes for another go through the
launcher as `Give`, which it checks against `GIFTS` and passes on as `Gift`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.roles import Role
from protocol.startup import Keys, LinkEntry, ProcessConfig, VmEntry

MAX_PACKET_BYTES = 160 * 1024
MAX_DESCRIPTORS = 96
"""A start message of an ultravisor carries three for each VM of its host."""
HEARTBEAT_SECONDS = 0.2
UNRESPONSIVE_SECONDS = 1.5
"""A hang is noticed within 2 s: up to a heartbeat until the ping, this long without answer, a heartbeat to judge it."""


class Packet(msgspec.Struct, frozen=True, tag=True, tag_field="type", forbid_unknown_fields=True):
    """Base of the control packets; the class name is the tag."""


# -- launcher -> process --------------------------------------------------------------------------------------


class Start(Packet, frozen=True):
    """The start configuration; its descriptors come with the packet in the order of `config.descriptors`."""

    config: ProcessConfig


class TakeKeys(Packet, frozen=True):
    """The secret keys, sent only after `Confined`."""

    keys: Keys


class AddVm(Packet, frozen=True):
    """A new VM, or the next incarnation of one; descriptors as in `Start`."""

    vm: VmEntry
    links: list[LinkEntry]
    keys: Keys
    descriptors: list[str]


class ReplaceLinks(Packet, frozen=True):
    """A peer is in its next incarnation: these links take the place of those to it on the same networks.

    A link for a migration comes by itself, and takes the place of an earlier one.
    """

    links: list[LinkEntry]
    keys: Keys


class RemoveVm(Packet, frozen=True):
    """Forget a VM: end it, release what it held; then `Answer` with the same id. Everything else goes on meanwhile."""

    id: int
    vm: str


class PeerState(Packet, frozen=True):
    """What became of a process that this one has a link to."""

    peer: str
    state: str


class Gift(Packet, frozen=True):
    """A descriptor from another process, or the launcher's own: a qemu's end of the channel of a migration, the
    connection of a debugger (`GDB_TAG`).

    One file comes with the packet.
    """

    tag: str
    vm: str
    giver: str


class Ping(Packet, frozen=True):
    """Answered by the service loop with `Pong`."""

    sequence: int


class Query(Packet, frozen=True):
    """A question or order from the operator; answered by `Answer` with the same id."""

    id: int
    what: str
    arguments: dict[str, Any]


class DebugMode(Enum):
    """What comes into a process by `Debug`."""

    PROMPT = "prompt"
    """The stream of a session at the prompt (protocol.debugging)."""
    DAP = "dap"
    """The stream on which debugpy's clients are told of; debugpy listens from then on."""
    DAP_CLIENT = "dap-client"
    """A connection of a client that speaks the Debug Adapter Protocol."""


class Debug(Packet, frozen=True):
    """A debugger enters; its stream comes with the packet. Only to a process that was started debuggable."""

    mode: DebugMode


class HoldTime(Packet, frozen=True):
    """To a guest: its processor stands still, or may run again, since a debugger holds a process that it depends on."""

    on: bool


class Stop(Packet, frozen=True):
    """End in good order."""


# -- process -> launcher --------------------------------------------------------------------------------------


class Hello(Packet, frozen=True):
    """All imports are done."""

    pid: int


class Confined(Packet, frozen=True):
    """What protects this process, and what is missing: name -> `on` or the reason why not."""

    protections: dict[str, str]


class Ready(Packet, frozen=True):
    """Links are open and served."""


class Give(Packet, frozen=True):
    """A descriptor for another process of the VM (one file with the packet)."""

    tag: str
    vm: str


class Pong(Packet, frozen=True):
    """The service loop lives."""

    sequence: int


class Answer(Packet, frozen=True):
    """The result of a query or of `RemoveVm`, or the one line that says why not."""

    id: int
    result: Any = None
    error: str | None = None


class Notice(Packet, frozen=True):
    """Something that the launcher acts on or shows: `what` is one of `NOTICES`."""

    what: str
    vm: str | None
    detail: str = ""


class BreakHit(Packet, frozen=True):
    """A break stopped a message before it was served: it is kept as `message` until the operator lets it pass."""

    id: int
    message: int
    vm: str | None
    text: str


class Failed(Packet, frozen=True):
    """The process cannot start or go on: one line for the operator."""

    reason: str


GDB_TAG = "gdb"
"""Of a connected socket on which a guest or a qemu serves GDB."""
KILLED_BY_DEBUGGER = "killed by its debugger"
"""With the notice `vm-off` of a guest: its owner ends it."""
NOTICES = frozenset({"guest-must-die", "vm-failed", "vm-off", "vm-state", "migrate"})

_Debugging = Debug | HoldTime
ToProcess = Start | TakeKeys | AddVm | ReplaceLinks | RemoveVm | PeerState | Gift | Ping | Query | _Debugging | Stop
FromProcess = Hello | Confined | Ready | Give | Pong | Answer | Notice | BreakHit | Failed

GIFTS: dict[str, tuple[Role, tuple[Role, ...]]] = {
    "host-view": (Role.KVM, (Role.QEMU,)),
    "normal-map": (Role.KVM, (Role.GUEST,)),
    "tce-table": (Role.KVM, (Role.QEMU,)),
    "guest-dirty-map": (Role.GUEST, (Role.KVM,)),
    "secure-dirty-map": (Role.GUEST, (Role.ULTRAVISOR,)),
    "device-dirty-map": (Role.QEMU, (Role.KVM,)),
    "device-writes": (Role.QEMU, (Role.GUEST,)),
}
"""Which role may give a descriptor of this tag, and who gets it. Tags may carry a suffix after a colon.

Secure memory and the secure map are not here: they go over a socketpair that only ultravisor and guest hold.
"""

_encoder = msgspec.msgpack.Encoder()
_to_process: msgspec.msgpack.Decoder[ToProcess] = msgspec.msgpack.Decoder(ToProcess)
_from_process: msgspec.msgpack.Decoder[FromProcess] = msgspec.msgpack.Decoder(FromProcess)


def encode(packet: ToProcess | FromProcess) -> bytes:
    """One packet."""
    return _encoder.encode(packet)


def decode_to_process(data: bytes) -> ToProcess:
    """A packet of the launcher; raises MalformedMessage."""
    return _decode(_to_process, data)


def decode_from_process(data: bytes) -> FromProcess:
    """A packet of a process; raises MalformedMessage."""
    return _decode(_from_process, data)


PacketT = TypeVar("PacketT")


def _decode(decoder: msgspec.msgpack.Decoder[PacketT], data: bytes) -> PacketT:
    try:
        return decoder.decode(data)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None
