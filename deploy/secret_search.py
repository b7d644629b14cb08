"""Many short byte strings looked for in much memory, in one pass.

Every position's first two bytes are looked up in a table of 65,536 entries; the few that may begin a string are then
compared in eight bytes, and what is left in whole. So the time hardly depends on how many strings there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

_WORD_BYTES = 8
_CHUNK_BYTES = 4 << 20
"""Bounds the memory that candidates take: each position may be one."""


class SecretSearch:
    """The forms of `secrets` (by name, at least 8 bytes each) that a host might find them in.

    A secret is found by any 8-byte word of it: as it is, reversed as a register of the other endianness has it, or in
    hexadecimal.
    """

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        self._forms = [(form, name) for name, secret in secrets.items() for form in _forms_of(secret)]
        starts = np.frombuffer(b"".join(form[:_WORD_BYTES] for form, _ in self._forms), "<u8")
        self._starts = np.unique(starts)
        self._may_start = np.zeros(1 << 16, bool)
        self._may_start[self._starts & 0xFFFF] = True
        self._longest = max((len(form) for form, _ in self._forms), default=0)

    def names_in(self, pieces: Iterable[bytes]) -> set[str]:
        """The secrets of which a form lies in one of `pieces`."""
        found: set[str] = set()
        for piece in pieces:
            for at in range(0, len(piece), _CHUNK_BYTES):
                # A form that begins in the chunk may end behind it.
                found |= self._names_in_chunk(piece[at : at + _CHUNK_BYTES + self._longest - 1])
        return found

    def _names_in_chunk(self, chunk: bytes) -> set[str]:
        found: set[str] = set()
        for at in self._candidates(chunk):
            found |= {name for form, name in self._forms if chunk.startswith(form, at)}
        return found

    def _candidates(self, chunk: bytes) -> Iterable[int]:
        """Positions whose eight bytes begin a form."""
        for shift in (0, 1):
            n_words = (len(chunk) - shift) // 2
            if n_words < _WORD_BYTES // 2:
                return
            words = np.frombuffer(chunk, "<u2", n_words, shift)
            firsts = np.flatnonzero(self._may_start[words[: n_words - 3]])
            values = words[firsts].astype(np.uint64)
            for word in (1, 2, 3):
                values |= words[firsts + word].astype(np.uint64) << np.uint64(16 * word)
            yield from (int(first) * 2 + shift for first in firsts[np.isin(values, self._starts)])


def _forms_of(secret: bytes) -> list[bytes]:
    words = [secret[at : at + _WORD_BYTES] for at in range(0, len(secret) - _WORD_BYTES + 1, _WORD_BYTES)]
    return [form for word in words for form in (word, word[::-1], word.hex().encode())]
