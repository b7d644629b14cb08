"""The memory by which ultravisor, kvm and qemu of one VM hand each other what a migration sends.

The launcher makes and seals it. Every holder may write all of it at any time, so a reader takes a copy first and looks
at that; whoever made the content protects it otherwise (the ultravisor by its keys).
"""

from __future__ import annotations

from protocol.errors import PeerError
from protocol.geometry import STREAM_BUFFER_BYTES
from shared.memfd import SealedMemory, map_sealed
from shared.room import Room


def make_stream_buffer(vm: str) -> SealedMemory:
    """The launcher's; it takes no memory until it is used. Raises HostFault."""
    return SealedMemory(f"pefbox-stream-{vm}", STREAM_BUFFER_BYTES, others_write=True)


class StreamBuffer:
    """One holder's mapping. Takes `fd`; raises HostFault for a file of another size or unsealed."""

    def __init__(self, fd: int) -> None:
        self._mapping = map_sealed(fd, STREAM_BUFFER_BYTES, writable=True)
        self._room = Room()

    def read(self, offset: int, n_bytes: int) -> bytes:
        """A copy; raises PeerError for a place outside."""
        self._check(offset, n_bytes)
        return self._mapping[offset : offset + n_bytes]

    def borrow(self, offset: int, n_bytes: int) -> memoryview:
        """As `read`, good until the next one is borrowed."""
        self._check(offset, n_bytes)
        copy = self._room.of(n_bytes)
        with memoryview(self._mapping) as whole:
            copy[:] = whole[offset : offset + n_bytes]
        return copy

    def view(self, offset: int, n_bytes: int) -> memoryview:
        """The place itself, for who passes it on unseen; raises PeerError for a place outside."""
        self._check(offset, n_bytes)
        return memoryview(self._mapping)[offset : offset + n_bytes]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data`; raises PeerError for a place outside."""
        self._check(offset, len(data))
        self._mapping[offset : offset + len(data)] = data

    def close(self) -> None:
        """Unmap."""
        self._mapping.close()

    def _check(self, offset: int, n_bytes: int) -> None:
        if offset < 0 or n_bytes < 0 or offset + n_bytes > STREAM_BUFFER_BYTES:
            raise PeerError(f"{n_bytes} bytes at {offset:#x} are outside the stream buffer")
