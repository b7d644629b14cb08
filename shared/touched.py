"""Which pages of a memory file were ever touched. The others hold zeros, and are not read to find that out.

A read of an untouched page makes it: in ordinary shared memory that takes several times as long as to copy it, in
secret memory, which the kernel takes out of its own mapping page by page, a hundred times.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of

_SMALL_PAGES = PAGE_BYTES // mmap.PAGESIZE
_UNTOUCHED = bytes(_SMALL_PAGES)
_libc = ctypes.CDLL(None, use_errno=True)


def touched_in_file(fd: int, n_pages: int) -> bytearray:
    """A byte a page of a file in tmpfs, or a memfd: 0 for a hole. A page that was swapped out is none."""
    touched = bytearray(n_pages)
    for start, n_bytes in data_ranges(fd, n_pages << PAGE_SHIFT):
        first, end = start >> PAGE_SHIFT, (start + n_bytes + PAGE_BYTES - 1) >> PAGE_SHIFT
        touched[first:end] = b"\1" * (min(end, n_pages) - first)
    return touched


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each part of such a file that is no hole."""
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        # What was punched between both looks is data no more.
        if at > start:
            yield start, at - start


def touched_in_locked(mapping: memoryview) -> bytearray:
    """The same of mapped memory that is never swapped out and has no holes to seek, as `memfd_secret`."""
    n_pages = len(mapping) >> PAGE_SHIFT
    resident = (ctypes.c_ubyte * (n_pages * _SMALL_PAGES))()
    address = _address_of(mapping)
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), resident):
        # Nothing is known: every page counts as touched.
        return bytearray(b"\1" * n_pages)
    found = bytes(resident)
    return bytearray(
        found[at : at + _SMALL_PAGES] != _UNTOUCHED for at in range(0, n_pages * _SMALL_PAGES, _SMALL_PAGES)
    )


def touch(mapping: memoryview, run: range) -> None:
    """Have the kernel make the pages of a run of GFNs of mapped secret memory before they are written.

    What they hold stays. The kernel makes each of their small pages alone, and much of that is waiting: several threads
    are as many times as fast.
    """
    address = _address_of(mapping)
    for gfn in run:
        # Reads all of the page, without the interpreter's lock, unless it finds a 1, which no untouched one holds.
        _libc.memchr(ctypes.c_void_p(address + gpa_of(gfn)), 1, ctypes.c_size_t(PAGE_BYTES))


def _address_of(mapping: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
