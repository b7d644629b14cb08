"""Callbacks of the engine, without the layers of its Python class: they are called for every TLB miss."""

from __future__ import annotations

import ctypes
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

from protocol.errors import HostFault


class TlbEntry(ctypes.Structure):
    """`uc_tlb_entry`: what a miss is answered with."""

    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_int))


FILL_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(TlbEntry), ctypes.c_void_p
)
EXCEPTION_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_ALL_ADDRESSES = (ctypes.c_uint64(1), ctypes.c_uint64(0))


def add_hook(engine: Any, kind: int, callback: Any) -> Any:  # noqa: ANN401
    """Install `callback`, which the caller keeps for as long as the engine lives; returns it. Raises HostFault."""
    handle = ctypes.c_size_t()
    function = ctypes.cast(callback, ctypes.c_void_p)
    status = uclib.uc_hook_add(engine._uch, ctypes.byref(handle), kind, function, None, *_ALL_ADDRESSES)
    if status:
        raise HostFault(f"the engine takes no callback of kind {kind}: error {status}")
    return callback
