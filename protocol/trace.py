"""What a trace file holds: entries in the order in which one process noted them.

An entry is its length as a little-endian u32 and one MessagePack Struct of those below, the first field its tag. A file
is appended to: each time that recording begins there is a `Began`, and with it a new numbering of links. A file that
was cut off ends in the middle of an entry, and all before it is whole.

Time is the host's monotonic clock, the same for all processes of a machine. `time_ns` is the VM's own time, in the file
of its processor. `cause` is that of the messages (protocol.wire): one id from a guest's call to the device and back.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.wire import MAX_MESSAGE_BYTES

VERSION = 1
FORMAT = "pefbox-trace"
LENGTH = struct.Struct("<I")
MAX_ENTRY_BYTES = MAX_MESSAGE_BYTES + 1024
"""A longer one is no entry: the largest holds a frame of a link."""

Ns = Annotated[int, Meta(ge=0)]


class Entry(msgspec.Struct, array_like=True, frozen=True, tag_field="entry", gc=False):
    """Base of the entries."""


class Began(Entry, frozen=True, tag=0):
    """Recording begins. `wall_ns` is the time since 1970 at `t_ns`; `seed` is the cluster's."""

    format: str
    version: int
    t_ns: Ns
    wall_ns: Ns
    cluster: str
    host: str
    process: str
    role: str
    pid: int
    seed: int


class VmKnown(Entry, frozen=True, tag=1):
    """A VM that the process has to do with; `time` is its clock, as the cluster file calls it."""

    lpid: int
    name: str
    incarnation: int
    time: str


class LinkOpened(Entry, frozen=True, tag=2):
    """Messages name their link by `index`."""

    index: int
    id: str
    kind: str
    vm: str | None
    peer: str


class MessageSeen(Entry, frozen=True, tag=3):
    """A message left (`outward`) or came. `withheld` says that `frame` is not all that travelled (S1)."""

    t_ns: Ns
    link: int
    outward: bool
    frame: bytes
    time_ns: int | None = None
    withheld: bool = False


class PageChanged(Entry, frozen=True, tag=4):
    """A guest frame of a secure VM changed its state by `event` (services.ultravisor.page_state)."""

    t_ns: Ns
    lpid: int
    gfn: int
    before: str
    event: str
    after: str
    cause: int


class InterruptStep(IntEnum):
    """How far an interrupt is."""

    RAISED = 0
    """Its source came up: for a device's completion the cause is that of the request."""
    ACCEPTED = 1
    """The guest took it (H_XIRR); the cause is that of raising it."""


class InterruptMoved(Entry, frozen=True, tag=5):
    """An interrupt of `source`."""

    t_ns: Ns
    lpid: int
    source: int
    step: InterruptStep
    cause: int


class RequestStep(IntEnum):
    """How far a device request is."""

    BEGUN = 0
    ENDED = 1


class RequestMoved(Entry, frozen=True, tag=6):
    """A request of a device's queue, named by its first descriptor.

    `n_bytes` are those that the driver offers, and at the end those that the device wrote.
    """

    t_ns: Ns
    lpid: int
    device: str
    queue: int
    head: int
    step: RequestStep
    n_bytes: int
    cause: int


class MigrationStepped(Entry, frozen=True, tag=7):
    """A migration is in another `status`, at its `side`: source or destination."""

    t_ns: Ns
    lpid: int
    side: str
    status: str
    cause: int


class Lost(Entry, frozen=True, tag=8):
    """So many entries are missing here, for `reason`."""

    t_ns: Ns
    n_entries: int
    reason: str


AnyEntry = (
    Began | VmKnown | LinkOpened | MessageSeen | PageChanged | InterruptMoved | RequestMoved | MigrationStepped | Lost
)

_encoder = msgspec.msgpack.Encoder()


def encode_entry(entry: AnyEntry) -> bytes:
    """The entry behind its length."""
    data = _encoder.encode(entry)
    return LENGTH.pack(len(data)) + data
