"""The two directions of a console: what its guest prints and what a person types.

Text that the guest printed stays for whoever attaches later: the last `OUTPUT_BYTES`, each byte with a sequence
number that counts from the start of the VM. When the buffer is full the oldest text is dropped and the guest goes on:
a console that nobody reads never holds up a guest. Typed text is bounded the other way: what does not fit is not
taken, and whoever types is told so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import trio

from protocol.errors import MalformedMessage
from shared.typed_text import Offer, TakenTexts

OUTPUT_BYTES = 64 * 1024
INPUT_BYTES = 4 * 1024
_MAX_READ_WAIT_SECONDS = 0.4
_GATHER_SECONDS = 0.01
"""Guests print character by character: were each one an answer of its own, its reader would take the processor's
time from the guest. Nobody sees the delay."""


class Text(NamedTuple):
    """Retained output: `data` begins with byte number `sequence`; the next read goes on at `next_sequence`."""

    sequence: int
    data: bytes

    @property
    def next_sequence(self) -> int:
        """The number of the byte after `data`."""
        return self.sequence + len(self.data)


class TextState(msgspec.Struct):
    """What survives a save."""

    start: int
    output: bytes
    typed: bytes
    texts: dict[int, int] = {}
    """As TakenTexts.save."""


class TextBuffers:
    """Both buffers."""

    def __init__(self) -> None:
        self._start = 0
        self._output = bytearray()
        self._typed = bytearray()
        self._texts = TakenTexts()
        self._printed = trio.Event()

    # -- guest --------------------------------------------------------------------------------------------------

    def put(self, data: bytes) -> None:
        """Print `data`; the oldest text makes room."""
        self._output += data
        excess = len(self._output) - OUTPUT_BYTES
        if excess > 0:
            del self._output[:excess]
            self._start += excess
        self._printed.set()

    @property
    def has_typed(self) -> bool:
        """Whether typed text waits."""
        return bool(self._typed)

    def take_typed(self, limit_bytes: int) -> bytes:
        """Typed text that waits, from its beginning."""
        data = bytes(self._typed[:limit_bytes])
        del self._typed[:limit_bytes]
        return data

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

    def type_in(self, offer: Offer) -> int:
        """Take typed bytes; returns how many are taken, from the front: those that fit, and those of before."""
        n_done = self._texts.done(offer)
        taken = offer.data[n_done : n_done + INPUT_BYTES - len(self._typed)]
        self._typed += taken
        self._texts.took(offer, n_done + len(taken))
        return n_done + len(taken)

    def reset(self) -> None:
        """Machine reset: typed text is forgotten, printed text stays."""
        self._typed.clear()

    def save(self) -> TextState:
        """Both buffers."""
        return TextState(self._start, bytes(self._output), bytes(self._typed), self._texts.save())

    def load(self, state: TextState) -> None:
        """Take over `state`; raises MalformedMessage when it is larger than the buffers."""
        if state.start < 0 or len(state.output) > OUTPUT_BYTES or len(state.typed) > INPUT_BYTES:
            raise MalformedMessage("a terminal with larger buffers")
        self._texts.load(state.texts)
        self._start, self._output, self._typed = state.start, bytearray(state.output), bytearray(state.typed)

    # -- queries of the operator --------------------------------------------------------------------------------

    async def answer_read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The query `console.read`: printed text from byte `since`; waits up to `wait_s` for some, and for what else
        comes at once."""
        since = int(arguments["since"])
        wait_s = min(float(arguments.get("wait_s", 0)), _MAX_READ_WAIT_SECONDS)
        with trio.move_on_after(wait_s):
            while self.end <= since:
                if self._printed.is_set():
                    self._printed = trio.Event()
                await self._printed.wait()
            await trio.sleep(_GATHER_SECONDS)
        text = self.read(since)
        return {"data": text.data, "next": text.next_sequence}
