"""What a hostile qemu sends on its network links instead of frames, and how it floods them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

import trio

from protocol import messages as m
from protocol.ethernet import HEADER_BYTES, MAX_FRAME_BYTES
from protocol.hcalls import HCALLS
from protocol.ucalls import UCALLS
from protocol.wire import MAX_MESSAGE_BYTES, MessageKind, bundle, encode
from services.runtime.link import Link

MTU = 1500
BROADCAST = b"\xff" * 6
_SOURCE = b"\x02\xbad\0\0\x01"
_NUMBER = m.NET_FRAMES.number

Message = Sequence[bytes]
"""The parts of one ZeroMQ message."""


class NetLie(Enum):
    """What is wrong with the messages; each is sent once."""

    GARBAGE = "bytes that are no message"
    NOT_A_BODY = "a body that is no list, or a list of something else"
    WRONG_TYPES = "frames that are no bytes"
    TOO_MANY = "no frame at all, and more than are declared"
    TOO_LONG = "a frame longer than any network's"
    NO_FRAMES = "well-formed messages with what is no frame of this network"
    OTHER_NUMBERS = "messages, hypercalls and ultracalls of other links"
    CALLS = "calls where only events are declared"
    REPLIES = "replies to calls that nobody made"
    PARTS = "more parts than a message has"
    OVERSIZE = "a message longer than any: the connection breaks"


class FloodOf(Enum):
    """What comes without end."""

    FRAMES = "full messages of the longest frames, each from another address"
    SMALL = "one short frame a message"
    REFUSED = "what is refused"


def _event(body: object, number: int = _NUMBER) -> Message:
    return (encode(MessageKind.EVENT, number, 0, 0, body),)


def _call(number: int, body: object) -> Message:
    return (encode(MessageKind.CALL, number, 7, 0, body),)


def frame(n_bytes: int, source: bytes = _SOURCE, destination: bytes = BROADCAST) -> bytes:
    """A frame of an unknown protocol that everybody gets."""
    return (destination + source + b"\x88\xb5").ljust(n_bytes, b"h")[:n_bytes]


_BODIES: tuple[object, ...] = (None, 7, "text", {"frames": []}, [], [[frame(60)], 1], [7])
_LISTS: tuple[object, ...] = (["text"], [1, 2], [None], [[frame(60)]], {"a": b""})
_OTHER_MESSAGES = [number for number in m.MESSAGES if number != _NUMBER]
_MESSAGES: dict[NetLie, Callable[[], list[Message]]] = {
    NetLie.GARBAGE: lambda: [(b"",), (b"\xc1",), (os.urandom(1000),), (b"\x91" * 50_000,), (bundle([b"a", b"b"]),)],
    NetLie.NOT_A_BODY: lambda: [_event(body) for body in _BODIES],
    NetLie.WRONG_TYPES: lambda: [_event([frames]) for frames in _LISTS],
    NetLie.TOO_MANY: lambda: [_event([[]]), _event([[frame(60)] * (m.MAX_NET_FRAMES + 1)]), _event([[b""] * 60_000])],
    NetLie.TOO_LONG: lambda: [_event([[frame(60), frame(n_bytes)]]) for n_bytes in (MAX_FRAME_BYTES + 1, 100_000)],
    NetLie.NO_FRAMES: lambda: (
        [_event([[frame(n_bytes)]]) for n_bytes in (0, 1, HEADER_BYTES - 1, HEADER_BYTES + MTU + 1, MAX_FRAME_BYTES)]
        + [_event([[frame(60, source=BROADCAST)]])]
    ),
    NetLie.OTHER_NUMBERS: lambda: [
        *(_event([], number) for number in (*_OTHER_MESSAGES, 0, -1, 1 << 63)),
        *(_call(number, [1, 2, 3]) for number in (*_OTHER_MESSAGES, *HCALLS.by_number, *UCALLS.by_number)),
    ],
    NetLie.CALLS: lambda: [_call(_NUMBER, [[frame(60)]]), _call(_NUMBER, 7)],
    NetLie.REPLIES: lambda: [
        (encode(MessageKind.REPLY, _NUMBER, correlation, 0, [0]),) for correlation in (1, 2, 1 << 63, -1)
    ],
    NetLie.PARTS: lambda: [(b"", b""), (*_event([[frame(60)]]), b""), (b"part",) * 1000],
    NetLie.OVERSIZE: lambda: [(bytes(MAX_MESSAGE_BYTES + 1),)],
}


def messages_of(lie: NetLie) -> list[Message]:
    """What is sent for `lie`."""
    return _MESSAGES[lie]()


def _addresses() -> Iterator[bytes]:
    return (b"\x02" + random.randbytes(5) for _ in itertools.count())


def _flood_messages(what: FloodOf) -> list[Message]:
    addresses = _addresses()
    if what is FloodOf.FRAMES:
        longest = HEADER_BYTES + MTU
        return [_event([[frame(longest, next(addresses)) for _ in range(m.MAX_NET_FRAMES)]]) for _ in range(100)]
    if what is FloodOf.SMALL:
        return [_event([[frame(60, next(addresses))]]) for _ in range(5000)]
    return [_event(7)]


async def flood(links: Sequence[Link], what: FloodOf, seconds: float) -> int:
    """Send as fast as the sockets take it; returns how many messages that were."""
    messages = itertools.cycle(_flood_messages(what))
    sent = 0
    with trio.move_on_after(seconds):
        while True:
            for link in links:
                while link._channel._try_send(next(messages)):
                    sent += 1
                    if sent % 64 == 0:
                        await trio.lowlevel.checkpoint()
            await trio.sleep(0.0005)
    return sent
