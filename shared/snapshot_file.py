"""The file of a snapshot: a head of fixed room that says all about it, and behind it the frames of the machine.

    0        MAGIC, version u32, length u32 of the description, SHA-256 of the description (little-endian)
    48       the description, JSON: a SnapshotHead
    65536    frames, as many bytes as the description says; their SHA-256 is in it

The head is written last: a file that was cut off, or never finished, has none. What a secure VM sends is sealed inside
by its ultravisor; the digests find what happens to a file by itself, not what somebody does to one of a normal VM.
"""

from __future__ import annotations

import hashlib
import os
import stat
from struct import Struct
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.decoding import DECODE_ERRORS
from protocol.errors import UserError

MAGIC = b"pbx-snap"
VERSION = 1
BODY_OFFSET = 64 << 10
_HEAD = Struct("<8sII32s")
_MAX_JSON_BYTES = BODY_OFFSET - _HEAD.size
_MAX_FILE_BYTES = 1 << 50
_NS_A_SECOND = 1_000_000_000

Text = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0, le=_MAX_FILE_BYTES)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class DiskMark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk as the VM left it. Whoever writes to it afterwards changes the time."""

    name: Text
    size_bytes: Count
    mtime_ns: Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]


class SnapshotHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a snapshot is of. `taken` is in seconds since the epoch; `running`, or paused by its user."""

    vm: Text
    lpid: Annotated[int, Meta(ge=0, lt=1 << 32)]
    host: Text
    secure: bool
    running: bool
    memory_bytes: Count
    taken: float
    disks: Annotated[list[DiskMark], Meta(max_length=64)]
    body_bytes: Count
    body_sha256: Sha256


class BadSnapshot(UserError):
    """A file that is no whole snapshot that this version reads."""


def mark_of(name: str, fd: int) -> DiskMark:
    """The disk behind `fd` as it is now. Raises OSError."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        # The time of a device node says nothing about its content.
        return DiskMark(name, os.lseek(fd, 0, os.SEEK_END), 0)
    return DiskMark(name, status.st_size, status.st_mtime_ns)


def why_other_disks(then: list[DiskMark], now: list[DiskMark]) -> str | None:
    """Why a machine with the disks `now` cannot go on where those of `then` were; None when it can."""
    if [mark.name for mark in then] != [mark.name for mark in now]:
        return f"it has the disks {_names(now)}, and had {_names(then)} when it was saved"
    for before, after in zip(then, now, strict=True):
        if before.size_bytes != after.size_bytes:
            return f"disk {after.name} has {after.size_bytes} bytes, and had {before.size_bytes} when it was saved"
        if before.mtime_ns != after.mtime_ns:
            seconds = (after.mtime_ns - before.mtime_ns) / _NS_A_SECOND
            when = f"{seconds:.1f} s after" if seconds > 0 else "elsewhere, or put back to before"
            return f"disk {after.name} was written {when} the snapshot"
    return None


def encode_head(head: SnapshotHead) -> bytes:
    """What stands at the beginning of the file; raises ValueError when it has no room there."""
    description = msgspec.json.encode(head)
    if len(description) > _MAX_JSON_BYTES:
        raise ValueError(f"{len(description)} bytes describe the snapshot, there is room for {_MAX_JSON_BYTES}")
    return _HEAD.pack(MAGIC, VERSION, len(description), hashlib.sha256(description).digest()) + description


def read_head(fd: int) -> SnapshotHead:
    """The head of the file behind `fd`, which has all its bytes; they may still be others. Raises BadSnapshot."""
    try:
        raw = os.pread(fd, BODY_OFFSET, 0)
        size_bytes = os.fstat(fd).st_size
    except OSError as error:
        raise BadSnapshot(f"cannot be read: {error.strerror}") from None
    head = _decode(raw)
    if size_bytes != BODY_OFFSET + head.body_bytes:
        raise BadSnapshot(f"has {size_bytes} bytes, and had {BODY_OFFSET + head.body_bytes} when it was taken")
    return head


def _decode(raw: bytes) -> SnapshotHead:
    if len(raw) < _HEAD.size or not raw.startswith(MAGIC):
        raise BadSnapshot("is no snapshot, or was never finished")
    _, version, n_bytes, digest = _HEAD.unpack_from(raw)
    if version != VERSION:
        raise BadSnapshot(f"is a snapshot of version {version}; this pefbox reads version {VERSION}")
    description = raw[_HEAD.size : _HEAD.size + n_bytes]
    if n_bytes > _MAX_JSON_BYTES or hashlib.sha256(description).digest() != digest:
        raise BadSnapshot("is damaged: its head is not the one that was written")
    try:
        return msgspec.json.decode(description, type=SnapshotHead)
    except DECODE_ERRORS as error:
        raise BadSnapshot(f"is damaged: {error}") from None


def _names(marks: list[DiskMark]) -> str:
    return ", ".join(mark.name for mark in marks) or "none"
