"""The file of a snapshot: what it says of itself, and every way in which it can be another one (S5)."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import HostFault, MalformedMessage, PefboxError
from services.qemu.migration.stream import MAX_PAYLOAD_BYTES, Frame, FrameKind
from services.qemu.snapshot.body import BodyReader, BodyWriter
from shared.snapshot_file import (
    BODY_OFFSET,
    BadSnapshot,
    DiskMark,
    SnapshotHead,
    encode_head,
    mark_of,
    read_head,
    why_other_disks,
)

HEAD = SnapshotHead(
    vm="vm1",
    lpid=3,
    host="alpha",
    secure=True,
    running=True,
    memory_bytes=64 << 20,
    taken=1_800_000_000.0,
    disks=[DiskMark("root", 4096, 17)],
    body_bytes=0,
    body_sha256="0" * 64,
)
FRAMES = [(FrameKind.HELLO, b"hello"), (FrameKind.PAGES, os.urandom(70_000)), (FrameKind.STATE, b"")]


async def write(fd: int) -> SnapshotHead:
    """A whole snapshot of FRAMES."""
    writer = BodyWriter(fd)
    for kind, payload in FRAMES:
        await writer.send(kind, payload[:3], payload[3:])
    head = msgspec.structs.replace(HEAD, body_bytes=writer.n_bytes, body_sha256=writer.sha256)
    await writer.finish(head)
    return head


async def read(fd: int) -> list[Frame]:
    """All of it, checked."""
    reader = BodyReader(fd, read_head(fd))
    frames = [await reader.receive() for _ in FRAMES]
    reader.check_end()
    return frames


@contextmanager
def memory_file(content: bytes | bytearray = b"") -> Iterator[int]:
    fd = os.memfd_create("snapshot", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


def whole() -> bytes:
    """The bytes of a whole file."""
    with memory_file() as fd:
        trio.run(write, fd)
        return os.pread(fd, os.fstat(fd).st_size, 0)


WHOLE = whole()


async def test_what_was_written_is_read() -> None:
    with memory_file() as fd:
        head = await write(fd)

        assert read_head(fd) == head
        assert [(frame.kind, bytes(frame.payload)) for frame in await read(fd)] == FRAMES


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(at=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7))
def test_every_bit_of_head_and_frames_counts(at: int, bit: int) -> None:
    altered = bytearray(WHOLE)
    altered[at] ^= 1 << bit
    used = 48 + int.from_bytes(WHOLE[12:16], "little")
    with memory_file(altered) as fd:
        if used <= at < BODY_OFFSET:
            # Room that the head does not need.
            assert len(trio.run(read, fd)) == len(FRAMES)
            return
        with pytest.raises((BadSnapshot, MalformedMessage)):
            trio.run(read, fd)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_was_cut_off_is_found_before_anything_is_started(length: int) -> None:
    with memory_file(WHOLE[:length]) as fd, pytest.raises(BadSnapshot):
        read_head(fd)


@given(st.binary(min_size=1, max_size=100))
def test_a_file_that_goes_on_is_found(more: bytes) -> None:
    with memory_file(WHOLE + more) as fd, pytest.raises(BadSnapshot, match="bytes, and had"):
        read_head(fd)


@given(st.binary(max_size=200))
def test_a_file_of_anything_is_no_snapshot(content: bytes) -> None:
    with memory_file(content) as fd, pytest.raises(BadSnapshot, match="is no snapshot, or was never finished"):
        read_head(fd)


def test_a_file_whose_head_was_not_written_is_none() -> None:
    content = bytes(BODY_OFFSET) + WHOLE[BODY_OFFSET:]
    with memory_file(content) as fd, pytest.raises(BadSnapshot, match="never finished"):
        read_head(fd)


def test_another_version_says_so() -> None:
    content, says = WHOLE[:8] + b"\x07" + WHOLE[9:], "of version 7; this pefbox reads version 1"
    with memory_file(content) as fd, pytest.raises(BadSnapshot, match=says):
        read_head(fd)


@pytest.mark.parametrize("lie", [{"body_sha256": "1" * 64}, {"body_bytes": len(WHOLE) - BODY_OFFSET - 8}])
def test_a_head_that_lies_about_its_frames_is_found_at_their_end(lie: dict[str, object]) -> None:
    with memory_file(WHOLE) as fd:
        head = msgspec.structs.replace(read_head(fd), **lie)
        os.pwrite(fd, encode_head(head), 0)
        os.ftruncate(fd, BODY_OFFSET + head.body_bytes)
        with pytest.raises(MalformedMessage, match=r"damaged|cut off"):
            trio.run(read, fd)


async def test_a_frame_longer_than_any_is_not_read() -> None:
    header = bytes([FrameKind.HELLO, 0, 0, 0]) + (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little")
    with memory_file(WHOLE[:BODY_OFFSET] + header) as fd:
        reader = BodyReader(fd, msgspec.structs.replace(HEAD, body_bytes=1 << 40))
        with pytest.raises(MalformedMessage, match="a frame of"):
            await reader.receive()


async def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "s", os.O_RDWR | os.O_CREAT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BODY_OFFSET + 1000, before[1]))
    try:
        with pytest.raises(HostFault, match="the snapshot cannot be written: File too large"):
            await write(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    with pytest.raises(BadSnapshot):
        read_head(fd)
    os.close(fd)


def test_a_head_that_has_no_room_is_an_error_of_ours() -> None:
    many = [DiskMark("d" * 255, 0, 0)] * 300
    with pytest.raises(ValueError, match="there is room for"):
        encode_head(msgspec.structs.replace(HEAD, disks=many))


# -- disks ---------------------------------------------------------------------------------------------------------


def test_a_disk_is_another_one_when_it_was_written_or_has_another_length(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * 4096)
    fd = os.open(disk, os.O_RDWR)
    then = mark_of("root", fd)

    assert why_other_disks([then], [mark_of("root", fd)]) is None
    os.utime(fd, ns=(0, then.mtime_ns + 1_500_000_000))
    assert why_other_disks([then], [mark_of("root", fd)]) == "disk root was written 1.5 s after the snapshot"
    os.utime(fd, ns=(0, then.mtime_ns - 1))
    assert "put back" in str(why_other_disks([then], [mark_of("root", fd)]))
    os.ftruncate(fd, 8192)
    assert "has 8192 bytes, and had 4096" in str(why_other_disks([then], [mark_of("root", fd)]))
    assert why_other_disks([then], []) == "it has the disks none, and had root when it was saved"
    os.close(fd)


def test_every_error_of_a_file_is_one_line_for_the_operator() -> None:
    assert issubclass(BadSnapshot, PefboxError)
