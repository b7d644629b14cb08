"""Cpio archives in the format newc: initial RAM disks, and the archive in front of one that carries the ESM blob.

`svm-tool svm add` puts `opt/ibm/pef/BLOB` into an archive padded to 512 bytes and the initial RAM disk behind it;
the digest of the blob covers only what follows. Linux unpacks both. The public ultravisor looks at the first file
of the archive only, so anything else in it would reach the secure VM unmeasured: here the archive may hold the
blob, the directories above it, and nothing more.

Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`; open-power/ultravisor `svm/svm-esm.c`;
open-power/svm-tools `svm_tool/svm/svm.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import ImageRefused
from shared.esm_blob import MAX_BLOB_BYTES
from shared.fdt_reader import FDT_MAGIC_BYTES

BLOB_DIRECTORY = "opt/ibm/pef"
BLOCK_BYTES = 512

_MAGIC = b"070701"
_HEADER_BYTES = 110
_N_FIELDS = 13
_MODE, _FILE_SIZE, _NAME_SIZE = 1, 6, 11
_TRAILER = "TRAILER!!!"
_MAX_NAME_BYTES = 256
_MAX_ENTRIES = 16
_TYPE_MASK, _DIRECTORY, _REGULAR, _SYMLINK, _DEVICE = 0o170000, 0o040000, 0o100000, 0o120000, 0o020000
_ALLOWED_DIRECTORIES = frozenset({".", "opt", "opt/ibm", BLOB_DIRECTORY})


@dataclass(frozen=True, slots=True)
class FoundBlob:
    """Offsets in bytes from the start of the initial RAM disk as it was loaded."""

    blob_start: int
    blob_end: int
    initrd_start: int
    """Where the measured initial RAM disk begins."""


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """A file to be written: `mode` with its type, `device` (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> ArchiveEntry:
    """A directory that all may enter."""
    return ArchiveEntry(name, _DIRECTORY | 0o755)


def program(name: str, data: bytes) -> ArchiveEntry:
    """A file that all may run."""
    return ArchiveEntry(name, _REGULAR | 0o755, data)


def symlink(name: str, target: str) -> ArchiveEntry:
    """A symbolic link."""
    return ArchiveEntry(name, _SYMLINK | 0o777, target.encode())


def device(name: str, major: int, minor: int) -> ArchiveEntry:
    """A character device of its owner."""
    return ArchiveEntry(name, _DEVICE | 0o600, device=(major, minor))


def write_archive(entries: Iterable[ArchiveEntry]) -> bytes:
    """The archive with its trailer, padded to 512 bytes. Owner root, time 0: equal entries give equal bytes.

    Raises ValueError for a name that a header cannot hold.
    """
    parts = [_entry_bytes(entry, inode) for inode, entry in enumerate(entries, start=1)]
    parts.append(_entry_bytes(ArchiveEntry(_TRAILER, 0), 0))
    archive = b"".join(parts)
    return archive + bytes(-len(archive) % BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    mode: int
    data_start: int
    data_end: int
    next_at: int


def find_blob(initrd: bytes | bytearray | memoryview) -> FoundBlob:
    """Where blob and measured part are; raises ImageRefused when the archive in front is not exactly a blob's.

    `initrd` must not change meanwhile: the ultravisor looks at its own copy.
    """
    blob: _Entry | None = None
    at = 0
    for _ in range(_MAX_ENTRIES):
        entry = _read_entry(initrd, at)
        at = entry.next_at
        if entry.name == _TRAILER:
            return _found(initrd, blob, at)
        if _is_directory(entry):
            continue
        if blob is not None or not _is_blob(initrd, entry):
            raise ImageRefused(f"the archive in front of the initrd holds {entry.name!r}, which no digest covers")
        blob = entry
    raise ImageRefused(f"the archive in front of the initrd has more than {_MAX_ENTRIES} entries")


def file_in_archive(archive: bytes, name: str) -> bytes:
    """What the file of that name holds; raises ImageRefused when there is none, or the archive is broken."""
    at = 0
    while (entry := _read_entry(archive, at)).name != _TRAILER:
        if _plain(entry.name) == name:
            return archive[entry.data_start : entry.data_end]
        at = entry.next_at
    raise ImageRefused(f"the archive has no {name}")


def prepend_blob(initrd: bytes, blob: bytes, file_name: str = "esm_blob") -> bytes:
    """`initrd` with the blob's archive in front; raises ValueError for a name that is no plain file name."""
    if not file_name.isascii() or not file_name.isprintable() or "/" in file_name or not 0 < len(file_name) < 128:
        raise ValueError(f"{file_name!r} is no plain file name")
    entries = [directory(name) for name in _parents()]
    entries.append(ArchiveEntry(f"{BLOB_DIRECTORY}/{file_name}", _REGULAR | 0o644, blob))
    return write_archive(entries) + initrd


def _parents() -> list[str]:
    names = BLOB_DIRECTORY.split("/")
    return ["/".join(names[: depth + 1]) for depth in range(len(names))]


def _entry_bytes(entry: ArchiveEntry, inode: int) -> bytes:
    if not entry.name.isascii() or "\0" in entry.name or not 0 < len(entry.name) < _MAX_NAME_BYTES:
        raise ValueError(f"{entry.name!r} cannot be the name of a file in an archive")
    raw_name, data = entry.name.encode("ascii") + b"\0", entry.data
    links = 2 if entry.mode & _TYPE_MASK == _DIRECTORY else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(data), 0, 0, *entry.device, len(raw_name), 0)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + raw_name
    return b"".join((head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)))


def _read_entry(initrd: bytes | bytearray | memoryview, at: int) -> _Entry:
    header = bytes(initrd[at : at + _HEADER_BYTES])
    if len(header) < _HEADER_BYTES or header[:6] != _MAGIC:
        raise ImageRefused("no cpio archive with an ESM blob in front of the initrd")
    fields = [_field(header, n) for n in range(_N_FIELDS)]
    n_name, n_data = fields[_NAME_SIZE], fields[_FILE_SIZE]
    if not 2 <= n_name <= _MAX_NAME_BYTES or n_data > MAX_BLOB_BYTES:
        raise ImageRefused("an entry of the archive in front of the initrd is too large")
    name_at = at + _HEADER_BYTES
    raw_name = bytes(initrd[name_at : name_at + n_name])
    data_start = (name_at + n_name + 3) & ~3
    next_at = (data_start + n_data + 3) & ~3
    if next_at > len(initrd) or raw_name.find(b"\0") != n_name - 1 or not raw_name.isascii():
        raise ImageRefused("the archive in front of the initrd is cut off or has a broken name")
    return _Entry(raw_name[:-1].decode("ascii"), fields[_MODE], data_start, data_start + n_data, next_at)


def _field(header: bytes, number: int) -> int:
    start = 6 + 8 * number
    try:
        raw = bytes.fromhex(header[start : start + 8].decode("ascii"))
    except ValueError:
        raw = b""
    if len(raw) != 4:
        raise ImageRefused("a cpio header in front of the initrd is not hexadecimal")
    return int.from_bytes(raw, "big")


def _is_directory(entry: _Entry) -> bool:
    empty = entry.data_start == entry.data_end
    return empty and entry.mode & _TYPE_MASK == _DIRECTORY and _plain(entry.name) in _ALLOWED_DIRECTORIES


def _is_blob(initrd: bytes | bytearray | memoryview, entry: _Entry) -> bool:
    directory, _, file_name = _plain(entry.name).rpartition("/")
    if entry.mode & _TYPE_MASK != _REGULAR or directory != BLOB_DIRECTORY or file_name in ("", ".", ".."):
        return False
    return bytes(initrd[entry.data_start : entry.data_start + 4]) == FDT_MAGIC_BYTES


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _found(initrd: bytes | bytearray | memoryview, blob: _Entry | None, at: int) -> FoundBlob:
    if blob is None:
        raise ImageRefused("the archive in front of the initrd holds no ESM blob")
    start = at + -at % BLOCK_BYTES
    if start > len(initrd):
        raise ImageRefused("the archive in front of the initrd is cut off")
    if any(initrd[at:start]):
        raise ImageRefused("the padding behind the archive in front of the initrd is not zero")
    return FoundBlob(blob.data_start, blob.data_end, start)
