"""What a debugger's session says: on the stream between its process and the launcher, and on to the operator.

A message is a MessagePack Struct behind its length, as on `launcher.sock`. The launcher passes what concerns the prompt
on in both directions, and acts itself on what says whether the process is held. The stream's end is the session's: of
the process, of the launcher, or of the operator, whichever goes first. Nothing is held afterwards.
"""

from __future__ import annotations

import struct

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 20
MAX_TEXT_CHARS = 64 * 1024


class Said(msgspec.Struct, frozen=True, tag=True, tag_field="type", forbid_unknown_fields=True):
    """Base of the messages; the class name is the tag."""


# -- operator -> process --------------------------------------------------------------------------------------


class Line(Said, frozen=True):
    """What the operator typed at the prompt."""

    text: str


class Interrupt(Said, frozen=True):
    """Ctrl-C: hold the process where it is."""


# -- process -> operator --------------------------------------------------------------------------------------


class Output(Said, frozen=True):
    """Text of the debugger."""

    text: str


class Prompt(Said, frozen=True):
    """The process is held and waits for a line."""

    text: str


# -- process -> launcher --------------------------------------------------------------------------------------


class Listening(Said, frozen=True):
    """debugpy waits for clients."""


class Held(Said, frozen=True):
    """The process stands still at `where`."""

    where: str


class GoesOn(Said, frozen=True):
    """The process runs again."""


class Detached(Said, frozen=True):
    """The debugger has left the process, which runs."""


class Refused(Said, frozen=True):
    """There will be no session: the one line that says why."""

    reason: str


ToProcess = Line | Interrupt
FromProcess = Output | Prompt | Listening | Held | GoesOn | Detached | Refused

_encoder = msgspec.msgpack.Encoder()
_to_process: msgspec.msgpack.Decoder[ToProcess] = msgspec.msgpack.Decoder(ToProcess)
_from_process: msgspec.msgpack.Decoder[FromProcess] = msgspec.msgpack.Decoder(FromProcess)


def sendable(text: str) -> str:
    """`text`, with what is no Unicode (lone surrogates) written as Python would."""
    return text.encode(errors="backslashreplace").decode()


def frame(said: ToProcess | FromProcess) -> bytes:
    """The message with its length in front."""
    data = _encoder.encode(said)
    return LENGTH.pack(len(data)) + data


class Frames:
    """Takes a stream apart."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that are complete with `data`; raises MalformedMessage for one that is too long."""
        self._data += data
        bodies = []
        while len(self._data) >= LENGTH.size:
            (n_bytes,) = LENGTH.unpack_from(self._data)
            if n_bytes > MAX_FRAME_BYTES:
                raise MalformedMessage(f"a frame of {n_bytes} bytes, more than {MAX_FRAME_BYTES}")
            end = LENGTH.size + n_bytes
            if len(self._data) < end:
                break
            bodies.append(bytes(self._data[LENGTH.size : end]))
            del self._data[:end]
        return bodies


def decode_to_process(body: bytes) -> ToProcess:
    """What the operator says; raises MalformedMessage."""
    try:
        return _to_process.decode(body)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None


def decode_from_process(body: bytes) -> FromProcess:
    """What the process says; raises MalformedMessage."""
    try:
        return _from_process.decode(body)
    except DECODE_ERRORS as error:
        raise MalformedMessage(str(error)) from None
