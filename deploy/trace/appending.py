"""Opens trace files for processes that append to them."""

from __future__ import annotations

import os
from pathlib import Path

from deploy.files import open_to_append
from protocol import trace as t
from protocol.errors import UserError

_READ_BYTES = 1 << 20


def open_appending(path: Path) -> int:
    """A trace file for its next process; raises UserError.

    A process that died on a full disk left half an entry, behind which nothing could be read: it is cut off.
    """
    try:
        if path.exists():
            _cut_partial_entry(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return open_to_append(path)


def _cut_partial_entry(path: Path) -> None:
    n_bytes = path.stat().st_size
    n_whole = _whole_bytes(path)
    if n_whole < n_bytes:
        os.truncate(path, n_whole)


def _whole_bytes(path: Path) -> int:
    """How much of the file whole entries are; looks at their lengths only, half a second for a million."""
    n_whole, rest, unpack = 0, b"", t.LENGTH.unpack_from
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            data = rest + data
            at, n_data = 0, len(data)
            while n_data - at >= t.LENGTH.size:
                n_bytes = unpack(data, at)[0]
                end = at + t.LENGTH.size + n_bytes
                if n_bytes > t.MAX_ENTRY_BYTES:
                    return n_whole + at
                if end > n_data:
                    break
                at = end
            n_whole += at
            rest = data[at:]
    return n_whole
