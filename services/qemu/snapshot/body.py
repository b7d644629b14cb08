"""The frames in the file of a snapshot, and the digest over them. The file is worked on in a thread."""

from __future__ import annotations

import hashlib
import os

import trio

from protocol.errors import HostFault, MalformedMessage
from services.qemu.migration.stream import HEADER, MAX_PAYLOAD_BYTES, Frame, FrameKind, FrameReader, header_of
from shared.snapshot_file import BODY_OFFSET, SnapshotHead, encode_head


class BodyWriter:
    """Takes a file, empty and open for writing, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()
        self.n_bytes = 0

    async def send(self, kind: FrameKind, *parts: bytes | memoryview) -> int:
        """Append one frame, whose payload is all `parts`; how many bytes that was. Raises HostFault."""
        frame = b"".join((header_of(kind, sum(map(len, parts))), *parts))
        await trio.to_thread.run_sync(self._append, frame)
        self.n_bytes += len(frame)
        return len(frame)

    async def finish(self, head: SnapshotHead) -> None:
        """Write the head, and return once a crash cannot undo any of it. Raises HostFault."""
        await trio.to_thread.run_sync(self._finish, encode_head(head))

    @property
    def sha256(self) -> str:
        """Of all frames, in hex."""
        return self._digest.hexdigest()

    def _append(self, frame: bytes) -> None:
        self._digest.update(frame)
        self._write(frame, BODY_OFFSET + self.n_bytes)

    def _finish(self, head: bytes) -> None:
        try:
            os.fsync(self._fd)
            self._write(head, 0)
            os.fsync(self._fd)
        except OSError as error:
            raise _not_written(error) from None

    def _write(self, data: bytes, offset: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                n_bytes = os.pwrite(self._fd, rest, offset)
                rest, offset = rest[n_bytes:], offset + n_bytes
        except OSError as error:
            raise _not_written(error) from None


class BodyReader:
    """Takes the file that `head` is of."""

    def __init__(self, fd: int, head: SnapshotHead) -> None:
        self._fd, self._head = fd, head
        self._digest = hashlib.sha256()
        self._reader = FrameReader()
        self.n_bytes = 0

    async def receive(self) -> Frame:
        """The next frame that this version knows; raises MalformedMessage, HostFault."""
        while True:
            frame = self._reader.read(await trio.to_thread.run_sync(self._next))
            if frame is not None:
                return frame

    def check_end(self) -> None:
        """Raise MalformedMessage unless this is the end, and all that was read is what was written."""
        if self.n_bytes != self._head.body_bytes:
            raise MalformedMessage("the snapshot goes on behind its end")
        if self._digest.hexdigest() != self._head.body_sha256:
            raise MalformedMessage("the snapshot is damaged: its content is not what was written")

    def _next(self) -> bytes:
        header = self._read(HEADER.size)
        n_bytes = HEADER.unpack(header)[3]
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise MalformedMessage(f"the snapshot is damaged: a frame of {n_bytes} bytes")
        return header + self._read(n_bytes)

    def _read(self, n_bytes: int) -> bytes:
        if n_bytes > self._head.body_bytes - self.n_bytes:
            raise MalformedMessage("the snapshot is cut off")
        try:
            data = os.pread(self._fd, n_bytes, BODY_OFFSET + self.n_bytes)
        except OSError as error:
            raise HostFault(f"the snapshot cannot be read: {error.strerror}") from None
        if len(data) != n_bytes:
            raise MalformedMessage("the snapshot is cut off")
        self._digest.update(data)
        self.n_bytes += n_bytes
        return data


def _not_written(error: OSError) -> HostFault:
    return HostFault(f"the snapshot cannot be written: {error.strerror}")
