"""Callbacks of the engine, without the layers of its Python class: they are called for every TLB miss."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

from protocol.errors import HostFault

TLB_FLUSH = 11 | 1 << 30
"""UC_CTL_TLB_FLUSH as a write without arguments; the Python class has no method for it."""


class TlbEntry(ctypes.Structure):
    """`uc_tlb_entry`: what a miss is answered with."""

    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_int))


FILL_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(TlbEntry), ctypes.c_void_p
)
EXCEPTION_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_ALL_ADDRESSES = (ctypes.c_uint64(1), ctypes.c_uint64(0))


def executable(code: bytes) -> ctypes.c_char:
    """The first byte of a page of the host's memory that holds `code` and lives as long as what is returned."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(code)] = code
    return ctypes.c_char.from_buffer(page)


def address_of(callback: Any) -> int:  # noqa: ANN401
    """Where the engine has to call; the caller keeps `callback` for as long as the engine lives."""
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


@dataclass(frozen=True, slots=True)
class NativeCallback:
    """Machine code, and the structure that it gets as its last argument. Kept by the caller as long as the engine."""

    code: ctypes.c_char
    """Its first byte, of `executable`."""
    state: ctypes.Structure

    @property
    def address(self) -> int:
        """What the engine has to call."""
        return ctypes.addressof(self.code)

    @property
    def data(self) -> int:
        """The callback's last argument."""
        return ctypes.addressof(self.state)


def add_hook(engine: Any, kind: int, callback: NativeCallback) -> None:  # noqa: ANN401
    """Have the engine call `callback`. Raises HostFault."""
    handle = ctypes.c_size_t()
    pointers = ctypes.c_void_p(callback.address), ctypes.c_void_p(callback.data)
    status = uclib.uc_hook_add(engine._uch, ctypes.byref(handle), kind, *pointers, *_ALL_ADDRESSES)
    if status:
        raise HostFault(f"the engine takes no callback of kind {kind}: error {status}")
