"""RTAS calls of a secure VM: what the declaration names is copied through pages shared with the hypervisor (S4).

The argument block lies in secure memory. The ultravisor copies it, and each buffer that the service's declaration
names, into its bounce pages, lets the hypervisor work on those, and copies back the return words and the declared
out-buffers. A service that is not declared does not pass. Source: open-power/ultravisor `svm/svm-rtas.c`.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer argument: which argument word holds its address, its declaration, its length and place outside."""

    index: int
    reg: Reg
    n_bytes: int
    gpa: int
    bounce_gpa: int = 0

    def goes(self, *directions: Direction) -> bool:
        """Whether its content is copied in one of `directions`."""
        return self.reg.memory is not None and self.reg.memory.direction in directions and self.n_bytes > 0


@dataclass(frozen=True, slots=True)
class _Block:
    """An argument block of the guest: its words, and where in guest memory they begin."""

    token: int
    words: list[int]
    n_rets: int
    words_gpa: int

    def outside(self, buffers: list[_Buffer]) -> bytes:
        """The block as the hypervisor sees it: addresses are those of the bounce pages."""
        words = list(self.words)
        for buffer in buffers:
            words[buffer.index] = buffer.bounce_gpa
        return _HEADER.pack(self.token, len(words), self.n_rets) + struct.pack(f">{len(words)}I", *words)


class RtasBounce:
    """The bounce pages of one VM: the first for argument blocks, the others for buffers of MAX_BUFFER_BYTES."""

    def __init__(self, gfns: list[int], ram: NormalRam) -> None:
        self.gfns = gfns
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
        words_gpa = args_gpa + _HEADER.size
        # All that will be written is looked at before the hypervisor hears of the call: return words, then buffers.
        words = await memory.load(words_gpa, (n_args + n_rets) * _WORD_BYTES)
        block = _Block(token, list(struct.unpack_from(f">{n_args}I", words)), n_rets, words_gpa)
        buffers = _buffers_of(service, block.words)
        if not self._blocks or len(self._buffers) < len(buffers):
            return [HCode.H_BUSY]
        bounce = self._blocks.pop()
        lent = [replace(buffer, bounce_gpa=self._buffers.pop()) for buffer in buffers]
        try:
            await self._copy_out(memory, block, lent, bounce)
            result = await forward(bounce)
            await self._copy_in(memory, block, lent, bounce)
            return result[:1]
        finally:
            self._blocks.append(bounce)
            self._buffers.extend(buffer.bounce_gpa for buffer in lent)

    async def _copy_out(self, memory: GuestMemory, block: _Block, buffers: list[_Buffer], bounce: int) -> None:
        """From the guest's pages to the bounce pages: what goes in, and zeros for the rest."""
        contents = [await memory.load(b.gpa, b.n_bytes) if b.n_bytes else b"" for b in buffers]
        for buffer, content in zip(buffers, contents, strict=True):
            inward = content if buffer.goes(Direction.IN, Direction.INOUT) else b""
            self._ram.write(buffer.bounce_gpa, inward.ljust(MAX_BUFFER_BYTES, b"\0"))
        self._ram.write(bounce, block.outside(buffers).ljust(_BLOCK_BYTES, b"\0"))

    async def _copy_in(self, memory: GuestMemory, block: _Block, buffers: list[_Buffer], bounce: int) -> None:
        """From the bounce pages to the guest's pages: return words and what comes out."""
        n_arg_bytes = len(block.words) * _WORD_BYTES
        if block.n_rets:
            rets = self._ram.read(bounce + _HEADER.size + n_arg_bytes, block.n_rets * _WORD_BYTES)
            await memory.store(block.words_gpa + n_arg_bytes, rets)
        for buffer in buffers:
            if buffer.goes(Direction.OUT, Direction.INOUT):
                await memory.store(buffer.gpa, self._ram.read(buffer.bounce_gpa, buffer.n_bytes))


def _buffers_of(service: Call, words: list[int]) -> list[_Buffer]:
    """Every buffer argument; raises GuestFault for one too large."""
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
        found.append(_Buffer(index, reg, n_bytes, words[index]))
    return found
