"""A raw image behind a descriptor."""

import errno
import os
from pathlib import Path

import pytest

from services.qemu.disk_file import DiskFile

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (MIB // 256))
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


def open_disk(path: Path, flags: int = os.O_RDWR) -> DiskFile:
    return DiskFile(os.open(path, flags), readonly=flags == os.O_RDONLY)


def test_length_is_the_file_s(image: Path) -> None:
    assert open_disk(image).size_bytes == MIB


async def test_a_read_without_waiting_agrees_with_one_in_a_thread(image: Path) -> None:
    disk = open_disk(image)
    buffers = [memoryview(bytearray(100)), memoryview(bytearray(412))]
    expected = await disk.read(512, 512)

    # The first call may only find out that the file system does not offer it.
    if disk.read_now(buffers, 512):
        assert b"".join(bytes(buffer) for buffer in buffers) == expected
    assert expected == content(image)[512:1024]


async def test_a_write_is_in_the_file_after_flush(image: Path) -> None:
    disk = open_disk(image)

    await disk.write(4096, b"written")
    await disk.flush()

    assert content(image)[4096:4103] == b"written"


async def test_a_cut_file_reads_as_eio(image: Path) -> None:
    disk = open_disk(image)
    os.truncate(image, 1024)

    assert not disk.read_now([memoryview(bytearray(1024))], 512)
    with pytest.raises(OSError) as caught:
        await disk.read(512, 1024)
    assert caught.value.errno == errno.EIO


async def test_discard_keeps_length_and_neighbours(image: Path) -> None:
    disk = open_disk(image)
    before = content(image)

    await disk.discard(64 * 1024, 128 * 1024)

    after = content(image)
    assert len(after) == MIB
    assert after[: 64 * 1024] == before[: 64 * 1024]
    assert after[192 * 1024 :] == before[192 * 1024 :]


@pytest.mark.parametrize("unmap", [True, False])
async def test_written_zeros_read_as_zeros(image: Path, unmap: bool) -> None:
    disk = open_disk(image)

    await disk.write_zeroes(512, 100 * 1024, unmap=unmap)

    after = content(image)
    assert not any(after[512 : 512 + 100 * 1024])
    assert any(after[:512]) and any(after[512 + 100 * 1024 :])


async def test_zeros_are_stored_where_the_file_system_has_no_ranges(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_offered(fd: int, mode: int, offset: int, n_bytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not offered")

    monkeypatch.setattr("services.qemu.disk_file._fallocate", not_offered)
    disk = open_disk(image)
    before = content(image)

    await disk.write_zeroes(1024, 2048, unmap=False)
    await disk.discard(8192, 512)

    assert content(image) == before[:1024] + bytes(2048) + before[3072:]


async def test_a_descriptor_without_write_access_is_an_error(image: Path) -> None:
    disk = open_disk(image, os.O_RDONLY)

    with pytest.raises(OSError) as caught:
        await disk.write(0, b"x")
    assert caught.value.errno == errno.EBADF
