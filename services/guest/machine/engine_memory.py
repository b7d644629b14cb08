"""RAM, secure memory and shadow pages as ranges of the engine's physical memory, without a copy."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import unicorn as uc

from services.guest.address_space import AddressSpace
from services.guest.machine.partition import NORMAL_BASE, SECURE_BASE, SHADOW_BASE

SHADOW_BYTES = 16 << 20


class EngineMemory:
    """The mappings of one engine."""

    def __init__(self, engine: Any, space: AddressSpace) -> None:  # noqa: ANN401
        self._uc = engine
        self._space = space
        self._normal = _Pinned(space.normal)
        self._secure: _Pinned | None = None
        self.shadow = mmap.mmap(-1, SHADOW_BYTES)
        self._shadow = _Pinned(memoryview(self.shadow))
        self._map(NORMAL_BASE, self._normal)
        self._map(SHADOW_BASE, self._shadow)

    def follow_space(self) -> None:
        """Map the secure memory that the address space uses now, and let go of the one before."""
        if self._secure is not None:
            self._uc.mem_unmap(SECURE_BASE, self._secure.size_bytes)
            self._secure = None
        if self._space.secure is not None:
            self._secure = _Pinned(self._space.secure)
            self._map(SECURE_BASE, self._secure)

    def read(self, address: int, n_bytes: int) -> bytes:
        """Engine-physical memory inside one page."""
        for base, pinned in ((SHADOW_BASE, self._shadow), (SECURE_BASE, self._secure), (NORMAL_BASE, self._normal)):
            if address >= base and pinned is not None:
                return ctypes.string_at(pinned.address + address - base, n_bytes)
        raise ValueError(f"{address:#x} is no engine memory")

    def _map(self, base: int, pinned: _Pinned) -> None:
        self._uc.mem_map_ptr(base, pinned.size_bytes, uc.UC_PROT_ALL, pinned.address)


class _Pinned:
    """A mapping that cannot be closed while this object lives."""

    def __init__(self, memory: memoryview) -> None:
        self.size_bytes = len(memory)
        self._pin = ctypes.c_char.from_buffer(memory)
        self.address = ctypes.addressof(self._pin)
