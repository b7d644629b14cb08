"""RAM segments: `multiprocessing.shared_memory`, without the resource tracker.

The tracker of Python before 3.13 unlinks a segment when any process that attached it ends (python/cpython#82300), and
its helper process would outlive the cluster. The launcher alone makes and unlinks segments; its manifest names them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from protocol.errors import HostFault
from shared.touched import data_ranges

SHM_DIR = Path("/dev/shm")


def segment_name(cluster: str, vm: str) -> str:
    """A new name that nobody can guess."""
    return f"pefbox-{cluster}-{vm}-{secrets.token_hex(8)}"


def create_segment(name: str, size_bytes: int) -> int:
    """Make a zeroed segment; returns its descriptor (close-on-exec). Raises HostFault."""
    try:
        with _no_tracker():
            segment = SharedMemory(name=name, create=True, size=size_bytes)
        segment.close()
        return os.open(SHM_DIR / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise HostFault(f"cannot make RAM segment {name} of {size_bytes} bytes: {error.strerror}") from None


def reserve_as_used(fd: int, used: str) -> None:
    """Have those parts of a segment take memory that segment `used` has in use, so that a store to them finds some.

    Raises HostFault when there is not so much.
    """
    try:
        with open(SHM_DIR / used, "rb", buffering=0) as file:
            for offset, n_bytes in data_ranges(file.fileno(), os.fstat(fd).st_size):
                os.posix_fallocate(fd, offset, n_bytes)
    except OSError as error:
        raise HostFault(f"{SHM_DIR}: no room for the RAM that the VM uses: {error.strerror}") from None


def unlink_segment(name: str) -> bool:
    """Remove a segment; False when it is gone already."""
    if "/" in name:
        return False
    try:
        os.unlink(SHM_DIR / name)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _no_tracker() -> Iterator[None]:
    """Keep SharedMemory from starting a resource tracker; for the launcher's single thread.

    Python 3.13 has `track=False` for this, the versions before it have nothing.
    """
    register = resource_tracker.register
    resource_tracker.register = _register_nothing
    try:
        yield
    finally:
        resource_tracker.register = register


def _register_nothing(name: Sized, rtype: str) -> None:
    """In place of the tracker's registration."""
