"""The virtual terminal of one VM: what its guest prints and what a person types.

Text that the guest printed stays for whoever attaches later: the last `OUTPUT_BYTES`, each byte with a sequence
number that counts from the start of the VM. When the buffer is full the oldest text is dropped and the guest goes on:
a console that nobody reads never holds up a guest, so H_PUT_TERM_CHAR never answers H_BUSY. Typed text is bounded the
other way: what does not fit is not taken, and whoever types is told so.
Source: PAPR 16.6 (H_PUT_TERM_CHAR, H_GET_TERM_CHAR), QEMU `hw/char/spapr_vty.c`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from protocol.codes import HCode
from protocol.errors import MalformedMessage

OUTPUT_BYTES = 64 * 1024
INPUT_BYTES = 4 * 1024
CALL_BYTES = 16
"""One call moves at most this many bytes, big-endian in two registers."""
VTY_UNIT = 0x7100_0000
"""Unit address of the terminal in the device tree."""
FIRMWARE_TERMNO = 0
"""Firmware prints before it reads the device tree; 0 means the first terminal."""

_SUCCESS: list[int] = [HCode.H_SUCCESS]
_PARAMETER: list[int] = [HCode.H_PARAMETER]
_NOTHING_TYPED: list[int] = [HCode.H_SUCCESS, 0, 0, 0]


class Text(NamedTuple):
    """Retained output: `data` begins with byte number `sequence`; the next read goes on at `next_sequence`."""

    sequence: int
    data: bytes

    @property
    def next_sequence(self) -> int:
        """The number of the byte after `data`."""
        return self.sequence + len(self.data)


class TerminalState(msgspec.Struct):
    """What survives a save."""

    start: int
    output: bytes
    typed: bytes


class Terminal:
    """The two buffers. `numbers` are the terminal numbers that a guest may name."""

    def __init__(self, numbers: frozenset[int] = frozenset({FIRMWARE_TERMNO, VTY_UNIT})) -> None:
        self._numbers = numbers
        self._start = 0
        self._output = bytearray()
        self._typed = bytearray()

    # -- guest --------------------------------------------------------------------------------------------------

    def h_put_term_char(self, termno: int, n_bytes: int, char0_7: int, char8_15: int) -> list[int]:
        """Print up to 16 bytes."""
        if termno not in self._numbers or not 0 <= n_bytes <= CALL_BYTES:
            return _PARAMETER
        self.put((char0_7 << 64 | char8_15).to_bytes(CALL_BYTES, "big")[:n_bytes])
        return _SUCCESS

    def put(self, data: bytes) -> None:
        """Print `data`; the oldest text makes room."""
        self._output += data
        excess = len(self._output) - OUTPUT_BYTES
        if excess > 0:
            del self._output[:excess]
            self._start += excess

    def h_get_term_char(self, termno: int) -> list[int]:
        """Take up to 16 typed bytes: `[H_SUCCESS, n_bytes, char0_7, char8_15]`; 0 bytes when nothing was typed."""
        if termno not in self._numbers:
            return _PARAMETER
        if not self._typed:
            return _NOTHING_TYPED
        data = bytes(self._typed[:CALL_BYTES])
        del self._typed[:CALL_BYTES]
        registers = int.from_bytes(data.ljust(CALL_BYTES, b"\0"), "big")
        return [HCode.H_SUCCESS, len(data), registers >> 64, registers & (1 << 64) - 1]

    # -- host ---------------------------------------------------------------------------------------------------

    @property
    def start(self) -> int:
        """Sequence number of the oldest retained byte."""
        return self._start

    @property
    def end(self) -> int:
        """Sequence number of the next byte that the guest prints."""
        return self._start + len(self._output)

    def read(self, sequence: int = 0, limit_bytes: int = OUTPUT_BYTES) -> Text:
        """Retained output from byte `sequence`, or from the oldest retained byte when that one is gone.

        A gap shows as a `Text.sequence` above the one asked for. Beyond the end the data is empty.
        """
        first = min(max(sequence, self._start), self.end)
        offset = first - self._start
        return Text(first, bytes(self._output[offset : offset + max(limit_bytes, 0)]))

    def type_in(self, data: bytes) -> int:
        """Offer typed bytes; returns how many fit, from the front."""
        taken = data[: INPUT_BYTES - len(self._typed)]
        self._typed += taken
        return len(taken)

    def reset(self) -> None:
        """Machine reset: typed text is forgotten, printed text stays."""
        self._typed.clear()

    def save(self) -> TerminalState:
        """Both buffers."""
        return TerminalState(self._start, bytes(self._output), bytes(self._typed))

    def load(self, state: TerminalState) -> None:
        """Take over `state`; raises MalformedMessage when it is larger than the buffers."""
        if state.start < 0 or len(state.output) > OUTPUT_BYTES or len(state.typed) > INPUT_BYTES:
            raise MalformedMessage("a terminal with larger buffers")
        self._start, self._output, self._typed = state.start, bytearray(state.output), bytearray(state.typed)
