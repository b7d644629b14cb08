"""ibm,client-architecture-support: what a guest's kernel can do, as vectors in its memory, and what follows from it.

A list of processors (pairs of mask and PVR, the last one with a PVR that its mask does not cover), then a byte with the
number of option vectors less one, then each vector behind a byte with its length less one. Of the vectors only the
fifth decides something here: which MMU the guest wants. This machine offers radix alone.

Everything read here is the guest's: lengths are checked before anything is used.

Source: LoPAR B.6.2.3; QEMU `hw/ppc/spapr_hcall.c`, `hw/ppc/spapr_ovec.c`; Linux `arch/powerpc/kernel/prom_init.c`.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from protocol.errors import GuestFault

MAX_VECTOR_BYTES = 4096
MAX_PROCESSORS = 512
_PAIR = Struct(">II")
_MASK32 = 0xFFFFFFFF
_FIFTH = 4
MMU_BYTE = 24
MMU_MASK = 0xC0
MMU_RADIX = 0x40
MMU_EITHER = 0x80


@dataclass(frozen=True, slots=True)
class ArchitectureVector:
    """`processors` are (mask, PVR); `options` the bytes of each option vector, the first one being vector 1."""

    processors: tuple[tuple[int, int], ...]
    options: tuple[bytes, ...]

    @property
    def wants_hash(self) -> bool:
        """Whether the guest takes hashed page tables only."""
        if len(self.options) <= _FIFTH or len(self.options[_FIFTH]) < MMU_BYTE:
            return True
        return self.options[_FIFTH][MMU_BYTE - 1] & MMU_MASK not in (MMU_RADIX, MMU_EITHER)


def parse_vector(data: bytes) -> ArchitectureVector:
    """The vectors at the start of `data` (at most MAX_VECTOR_BYTES); raises GuestFault when they do not hold."""
    processors, at = _processors(data)
    if at >= len(data):
        raise GuestFault("the architecture vector ends before its option vectors")
    n_vectors, at = data[at] + 1, at + 1
    options = []
    for _ in range(n_vectors):
        if at >= len(data):
            raise GuestFault("the architecture vector ends within its option vectors")
        n_bytes = data[at] + 1
        if at + 1 + n_bytes > len(data):
            raise GuestFault("an option vector ends behind the architecture vector")
        options.append(data[at + 1 : at + 1 + n_bytes])
        at += 1 + n_bytes
    return ArchitectureVector(processors, tuple(options))


def _processors(data: bytes) -> tuple[tuple[tuple[int, int], ...], int]:
    pairs = []
    for at in range(0, min(len(data), MAX_PROCESSORS * _PAIR.size) - _PAIR.size + 1, _PAIR.size):
        mask, pvr = _PAIR.unpack_from(data, at)
        pairs.append((mask, pvr))
        if ~mask & pvr & _MASK32:
            return tuple(pairs), at + _PAIR.size
    raise GuestFault("the architecture vector has no last processor")
