"""RTAS calls of a secure VM: what the declaration names is copied through pages shared with the hypervisor (S4).

The argument block lies in secure memory. The ultravisor copies it, and each buffer that the service's declaration
names, into its bounce pages, lets the hypervisor work on those, and copies back the return words and the declared
out-buffers. A service that is not declared does not pass. Source: open-power/ultravisor `svm/svm-rtas.c`.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

from protocol.codes import HCode
from protocol.declare import Call, Direction, Reg
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.rtas import MAX_BUFFER_BYTES, MAX_WORDS, RTAS
from services.ultravisor.guest_memory import GuestMemory
from services.ultravisor.normal_ram import NormalRam

_HEADER = struct.Struct(">III")
_WORD_BYTES = 4
_BLOCK_BYTES = 256
_N_BLOCKS = PAGE_BYTES // _BLOCK_BYTES

Forward = Callable[[int], Awaitable[list[int]]]
"""Issues H_RTAS with the argument block at this gpa; returns `[code, outputs...]`."""


class RtasBounce:
    """The bounce pages of one VM: the first for argument blocks, the others for buffers of MAX_BUFFER_BYTES."""

    def __init__(self, gfns: list[int], ram: NormalRam) -> None:
        self._ram = ram
        self._blocks = [gpa_of(gfns[0]) + i * _BLOCK_BYTES for i in range(_N_BLOCKS)]
        per_page = PAGE_BYTES // MAX_BUFFER_BYTES
        self._buffers = [gpa_of(gfn) + i * MAX_BUFFER_BYTES for gfn in gfns[1:] for i in range(per_page)]

    async def call(self, memory: GuestMemory, args_gpa: int, forward: Forward) -> list[int]:
        """H_RTAS of the VM; returns `[code]`."""
        token, n_args, n_rets = _HEADER.unpack(await memory.load(args_gpa, _HEADER.size))
        service = RTAS.by_number.get(token)
        if service is None or n_args + n_rets > MAX_WORDS or not service.fits(n_args, n_rets):
            return [HCode.H_PARAMETER]
        words_at = args_gpa + _HEADER.size
        # All that will be written is looked at before the hypervisor hears of the call: return words, then buffers.
        block_words = await memory.load(words_at, (n_args + n_rets) * _WORD_BYTES)
        words = list(struct.unpack_from(f">{n_args}I", block_words))
        buffers = _buffers_of(service, words)
        if not self._blocks or len(self._buffers) < len(buffers):
            return [HCode.H_BUSY]
        block = self._blocks.pop()
        lent = [self._buffers.pop() for _ in buffers]
        try:
            return await self._bounced(memory, words_at, (token, n_args, n_rets), words, buffers, block, lent, forward)
        finally:
            self._blocks.append(block)
            self._buffers.extend(lent)

    async def _bounced(
        self,
        memory: GuestMemory,
        words_at: int,
        header: tuple[int, int, int],
        words: list[int],
        buffers: list[tuple[int, Reg, int]],
        block: int,
        lent: list[int],
        forward: Forward,
    ) -> list[int]:
        _, n_args, n_rets = header
        outside = list(words)
        contents = [await memory.load(words[index], n_bytes) if n_bytes else b"" for index, _, n_bytes in buffers]
        for (index, reg, _), content, bounce in zip(buffers, contents, lent, strict=True):
            outside[index] = bounce
            inward = reg.memory is not None and reg.memory.direction is not Direction.OUT
            self._ram.write(bounce, (content if inward else b"").ljust(MAX_BUFFER_BYTES, b"\0"))
        image = _HEADER.pack(*header) + struct.pack(f">{n_args}I", *outside)
        self._ram.write(block, image.ljust(_BLOCK_BYTES, b"\0"))
        result = await forward(block)
        rets = self._ram.read(block + _HEADER.size + n_args * _WORD_BYTES, n_rets * _WORD_BYTES)
        if n_rets:
            await memory.store(words_at + n_args * _WORD_BYTES, rets)
        for (index, reg, n_bytes), bounce in zip(buffers, lent, strict=True):
            outward = reg.memory is not None and reg.memory.direction is not Direction.IN
            if outward and n_bytes:
                await memory.store(words[index], self._ram.read(bounce, n_bytes))
        return result[:1]


def _buffers_of(service: Call, words: list[int]) -> list[tuple[int, Reg, int]]:
    """Index, declaration and length in bytes of every buffer argument; raises GuestFault for one too large."""
    names = [reg.name for reg in service.args]
    found = []
    for index, reg in enumerate(service.args[: len(words)]):
        if reg.memory is None:
            continue
        count = reg.memory.count
        n_units = count if isinstance(count, int) else words[names.index(count)]
        n_bytes = n_units * reg.memory.unit_bytes
        if n_bytes > MAX_BUFFER_BYTES:
            raise GuestFault(f"{service.name}: a buffer of {n_bytes} bytes is more than {MAX_BUFFER_BYTES}")
        found.append((index, reg, n_bytes))
    return found
