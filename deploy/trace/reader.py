"""Reads trace files (protocol.trace) as they grow. They may be cut off anywhere, and anybody may have written them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec

from deploy.run_dirs import TRACE_SUFFIX
from protocol import trace as t
from protocol.decoding import DECODE_ERRORS
from protocol.errors import UserError
from shared.terminal_text import one_line

_READ_BYTES = 1 << 20
_entry_decoder: msgspec.msgpack.Decoder[t.AnyEntry] = msgspec.msgpack.Decoder(t.AnyEntry)


class TraceUnreadable(UserError):
    """A trace file cannot be read, or not beyond some place."""


class TraceDamaged(TraceUnreadable):
    """A trace file holds what no process writes. `offset` is where the first bad entry begins."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        self.path, self.offset = path, offset
        super().__init__(f"{path}: damaged at byte {offset}: {why}")


class TraceReader:
    """One file, from `offset`. An entry that is not all there yet comes with the next `read`."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.n_cut_bytes = 0
        """How much of an entry stands at the end without its remainder; of a file that grows no more: it was cut."""
        self._offset = offset
        self._has_begun = False

    def read(self) -> Iterator[t.AnyEntry]:
        """What was added since the last time; nothing while there is no file.

        Raises TraceUnreadable behind the last entry that can be read; then there is nothing more to read.
        """
        rest = b""
        try:
            with self.path.open("rb") as file:
                # Half an entry is read again: the launcher may have cut it off since (deploy.trace.appending).
                file.seek(self._offset)
                while data := file.read(_READ_BYTES):
                    rest = yield from self._whole_entries(rest + data)
        except FileNotFoundError:
            return
        except OSError as error:
            raise TraceUnreadable(f"{self.path}: {error.strerror}") from None
        self.n_cut_bytes = len(rest)

    def _whole_entries(self, data: bytes) -> Generator[t.AnyEntry, None, bytes]:
        """Gives back what stands behind them."""
        at = 0
        while len(data) - at >= t.LENGTH.size:
            (n_bytes,) = t.LENGTH.unpack_from(data, at)
            start = at + t.LENGTH.size
            if n_bytes > t.MAX_ENTRY_BYTES:
                raise TraceDamaged(self.path, self._offset + at, f"an entry of {n_bytes} bytes")
            if len(data) - start < n_bytes:
                break
            yield self._entry(data[start : start + n_bytes], self._offset + at)
            at = start + n_bytes
        self._offset += at
        return data[at:]

    def _entry(self, data: bytes, offset: int) -> t.AnyEntry:
        try:
            entry = _entry_decoder.decode(data)
        except DECODE_ERRORS as error:
            raise TraceDamaged(self.path, offset, str(error)) from None
        if isinstance(entry, t.Began):
            if entry.format != t.FORMAT or entry.version != t.VERSION:
                raise TraceUnreadable(
                    f"{self.path}: {entry.format!r} version {entry.version}; this pefbox reads {t.FORMAT} {t.VERSION}"
                )
            self._has_begun = True
        elif not self._has_begun:
            raise TraceDamaged(self.path, offset, "no trace begins here")
        return _with_tame_names(entry) if isinstance(entry, (t.Began, t.VmKnown, t.LinkOpened)) else entry


def _with_tame_names(entry: t.Began | t.VmKnown | t.LinkOpened) -> t.AnyEntry:
    """Processes, VMs and links are called so everywhere, also in what a terminal shows."""
    names = {name: one_line(text) for name, text in msgspec.structs.asdict(entry).items() if isinstance(text, str)}
    return msgspec.structs.replace(entry, **names)


def begins_at(path: Path, offset: int) -> bool:
    """Whether a recording begins there, so that what follows is a trace by itself."""
    try:
        return next(TraceReader(path, offset).read(), None) is not None
    except TraceUnreadable:
        return False


class SeenFrame(msgspec.Struct, frozen=True):
    """A message as it stands in a file: `link` is the link's id, `direction` "in" or "out"."""

    t_ns: int
    link: str
    direction: str
    frame: bytes


class FrameReader:
    """Only the messages of one file, undecoded."""

    def __init__(self, path: Path) -> None:
        self._reader = TraceReader(path)
        self._links: dict[int, str] = {}

    def read(self) -> Iterator[SeenFrame]:
        """What was added since the last time; raises TraceUnreadable."""
        for entry in self._reader.read():
            if isinstance(entry, t.LinkOpened):
                self._links[entry.index] = entry.id
            elif isinstance(entry, t.MessageSeen):
                direction = "out" if entry.outward else "in"
                yield SeenFrame(entry.t_ns, self._links.get(entry.link, "?"), direction, entry.frame)


def place_of(path: Path) -> str:
    """Whose file it is: `vm1/qemu`, or `vm1/qemu.2` of a process that took a VM in."""
    return path.stem.replace(".", "/", 1)


def trace_files(where: Path) -> list[Path]:
    """The files of a trace: `where` itself, or all in that directory; raises UserError when there are none."""
    if where.is_file():
        return [where]
    files = sorted(path for path in where.glob(f"*{TRACE_SUFFIX}") if path.stat().st_size)
    if files:
        return files
    if not where.exists():
        raise UserError(f"{where}: there is no such file or directory")
    raise UserError(f"{where}: no trace is there; record one with `pefbox trace record`, or start with `up --record`")
