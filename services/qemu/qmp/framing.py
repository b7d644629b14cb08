"""Where one QMP message ends and the next begins: a stream of bytes in, complete JSON texts out.

QMP has no frame of its own: messages are JSON objects one after the other, with or without white space between them,
so the end of a message is its matching brace. The framer counts braces outside strings and nothing else; whether the
text in between is JSON is for the decoder. It holds at most MAX_MESSAGE_BYTES and the piece it was last fed.

Recovery, for a client that lost its place: the byte 0xFF, or a control character that JSON does not allow at that
point, ends whatever was being read with one error. A message that is too long or too deep is reported once and then
skipped to its real end without being kept.

Source: QEMU `docs/interop/qmp-spec.rst`, "Protocol Specification".
"""

from __future__ import annotations

import enum
import re

MAX_MESSAGE_BYTES = 64 * 1024
MAX_DEPTH = 32

_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_GARBAGE_END = re.compile(rb"[{\[\x00-\x1f\xff]")
_STRUCTURE = re.compile(rb'["{}\[\]\x00-\x08\x0b\x0c\x0e-\x1f\xff]')
_STRING_STOP = re.compile(rb'["\\\x00-\x1f\xff]')


class Malformed(enum.StrEnum):
    """Why a piece of input is no message; the value is the sentence that the client gets."""

    NOT_AN_OBJECT = "Input is not a JSON object"
    INVALID_JSON = "Input is not valid JSON"
    STRAY_BYTE = "Input holds a byte that JSON does not allow there; reading starts anew after it"
    TOO_LONG = f"Input is longer than {MAX_MESSAGE_BYTES} bytes"
    TOO_DEEP = f"Input is nested deeper than {MAX_DEPTH} levels"


class Framer:
    """Cuts a byte stream into messages. Feed a piece, then ask for messages until there is none."""

    def __init__(self) -> None:
        self._data = b""
        self._at = 0
        self._message = bytearray()
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._skipping = False
        self._garbage = False

    def feed(self, data: bytes) -> None:
        """The next piece of the stream; what was fed before must have been asked for to its end."""
        self._data = self._data[self._at :] + data
        self._at = 0

    def next_message(self) -> bytes | Malformed | None:
        """The next complete message, an error in its place, or None when more input is needed."""
        while self._at < len(self._data):
            found = self._read_message() if self._depth else self._read_gap()
            if found is not None:
                return found
        return None

    def _read_gap(self) -> Malformed | None:
        match = (_GARBAGE_END if self._garbage else _NOT_SPACE).search(self._data, self._at)
        if match is None:
            self._at = len(self._data)
            return None
        self._at = match.end()
        byte = match.group()[0]
        if byte in b"{[":
            self._begin(byte)
            return None
        if self._garbage:
            self._garbage = False
            return None
        if byte < 0x20 or byte == 0xFF:
            return Malformed.STRAY_BYTE
        self._garbage = True
        return Malformed.NOT_AN_OBJECT

    def _begin(self, byte: int) -> None:
        self._garbage = self._in_string = self._escaped = self._skipping = False
        self._depth = 1
        self._message = bytearray((byte,))

    def _read_message(self) -> bytes | Malformed | None:
        """Go on to the next byte that matters, or to the end of the piece."""
        start = self._at
        stops = _STRING_STOP if self._in_string else _STRUCTURE
        match = stops.search(self._data, start + self._escaped_length())
        self._at = match.end() if match else len(self._data)
        refusal = self._keep(start)
        found = self._act_on(match.group()[0]) if match else None
        return refusal or found

    def _escaped_length(self) -> int:
        """1 when the byte at hand is escaped, and is one that a backslash may stand before."""
        if not self._escaped:
            return 0
        self._escaped = False
        byte = self._data[self._at]
        return 0 if byte < 0x20 or byte == 0xFF else 1

    def _keep(self, start: int) -> Malformed | None:
        if self._skipping:
            return None
        if len(self._message) + self._at - start > MAX_MESSAGE_BYTES:
            return self._skip(Malformed.TOO_LONG)
        self._message += self._data[start : self._at]
        return None

    def _skip(self, reason: Malformed) -> Malformed:
        self._skipping = True
        self._message = bytearray()
        return reason

    def _act_on(self, byte: int) -> bytes | Malformed | None:
        if byte == 0x22:
            self._in_string = not self._in_string
        elif byte == 0x5C:
            self._escaped = True
        elif byte in b"{[":
            return self._open()
        elif byte in b"}]":
            return self._close()
        else:
            return self._break_off()
        return None

    def _open(self) -> Malformed | None:
        self._depth += 1
        if self._depth > MAX_DEPTH and not self._skipping:
            return self._skip(Malformed.TOO_DEEP)
        return None

    def _close(self) -> bytes | None:
        self._depth -= 1
        if self._depth or self._skipping:
            return None
        message, self._message = bytes(self._message), bytearray()
        return message

    def _break_off(self) -> Malformed | None:
        self._depth = 0
        self._message = bytearray()
        return None if self._skipping else Malformed.STRAY_BYTE
