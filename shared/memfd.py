"""Sealed memory files: maps, host views, dirty maps, TCE tables.

The owner maps its file, then seals it: SHRINK and GROW so that no holder can cut it under a mapping,
FUTURE_WRITE where others only read. The descriptor then goes to the readers.
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os

from protocol.errors import HostFault

_F_SEAL_FUTURE_WRITE = 0x0010  # Linux uapi/linux/fcntl.h; not in Python's fcntl before 3.13


class SealedMemory:
    """A memory file of `size_bytes` that this process owns.

    `fd` is for others, `buffer` is the owner's writable mapping. `close` releases both. Raises HostFault when the
    machine has no descriptor or memory for it.
    """

    def __init__(self, name: str, size_bytes: int, *, others_write: bool = False) -> None:
        self.size_bytes = size_bytes
        try:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise HostFault(f"no memory file {name}: {error.strerror}") from None
        try:
            self._mmap = _map_and_seal(self.fd, size_bytes, others_write=others_write)
        except OSError as error:
            os.close(self.fd)
            raise HostFault(f"no memory file {name} of {size_bytes} bytes: {error.strerror}") from None
        self.buffer = memoryview(self._mmap)

    def close(self) -> None:
        """Release mapping and descriptor; views taken from `buffer` must be gone."""
        self.buffer.release()
        self._mmap.close()
        os.close(self.fd)


def _map_and_seal(fd: int, size_bytes: int, *, others_write: bool) -> mmap.mmap:
    os.ftruncate(fd, size_bytes)
    mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if not others_write:
        seals |= _F_SEAL_FUTURE_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
    return mapping


def map_sealed(fd: int, size_bytes: int, *, writable: bool = False) -> mmap.mmap:
    """Map somebody else's sealed file and close `fd`.

    Raises HostFault when it is not sealed against shrinking, or not of the promised size: touching a mapping that is
    longer than its file would kill this process.
    """
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise HostFault("a memory file came without its seals")
        if os.fstat(fd).st_size != size_bytes:
            raise HostFault(f"a memory file is not of {size_bytes} bytes")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, protection)
    except OSError as error:
        raise HostFault(f"cannot map a memory file: {error.strerror}") from None
    finally:
        os.close(fd)


def unmap(mapping: mmap.mmap) -> None:
    """Unmap; raises HostFault while something still holds a view that the caller did not know of."""
    try:
        mapping.close()
    except BufferError:
        # A view may stand in a frame that was just unwound; with it gone the mapping goes too.
        gc.collect()
        try:
            mapping.close()
        except BufferError:
            raise HostFault("a mapping is still in use") from None
