"""Hypercalls that kvm passes to user space: those of the firmware, and those about the device tree.

Addresses and lengths are the guest's. A range is checked before anything is written; long copies are cut, so that
nothing else of the process waits for them.

Source: QEMU `hw/ppc/spapr_hcall.c`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from protocol.codes import HCode
from protocol.errors import GuestFault, PefboxError
from protocol.hcalls import H_CAS, H_LOGICAL_MEMOP, H_SET_DMA_BYPASS, H_UPDATE_DT
from services.qemu.cas import MAX_VECTOR_BYTES, parse_vector
from shared.fdt_reader import fdt_total_bytes, read_fdt
from shared.guest_ram import GuestRam

MAX_TREE_BYTES = 1 << 20
MAX_COUNT = 0x80000000
COPY, INVERT = 0, 1
_PIECE_BYTES = 1 << 16
_TREE_HEAD_BYTES = 8
_UPDATE_VERSION = (1).to_bytes(4, "big")
"""Stands before the tree that ibm,client-architecture-support gives back."""

Handler = Callable[[list[int]], Awaitable[HCode]]


class TreePort(Protocol):
    """The machine's device tree, and who hears of it."""

    def agreed_tree(self) -> bytes:
        """The tree after ibm,client-architecture-support: with what was agreed on."""

    def tree_updated(self, tree: bytes) -> None:
        """Firmware's final tree; it is well-formed."""

    def cas_refused(self, reason: str) -> None:
        """For the operator."""


class BypassPort(Protocol):
    """The devices that can be taken out of the IOMMU."""

    def set_dma_bypass(self, buid: int, config_addr: int, *, on: bool) -> HCode:
        """Take a device out of the IOMMU, or put it back; codes as H_SET_DMA_BYPASS declares them."""


class QemuHcalls:
    """Of one machine."""

    def __init__(self, ram: GuestRam, trees: TreePort, devices: BypassPort) -> None:
        self._ram = ram
        self._trees = trees
        self._devices = devices
        self._handlers: dict[int, tuple[int, Handler]] = {
            H_LOGICAL_MEMOP.number: (H_LOGICAL_MEMOP.n_args, self.h_logical_memop),
            H_CAS.number: (H_CAS.n_args, self.h_cas),
            H_UPDATE_DT.number: (H_UPDATE_DT.n_args, self.h_update_dt),
            H_SET_DMA_BYPASS.number: (H_SET_DMA_BYPASS.n_args, self.h_set_dma_bypass),
        }

    async def call(self, number: int, args: list[int]) -> HCode:
        """The result of a hypercall; H_FUNCTION for one that is not answered here."""
        found = self._handlers.get(number)
        if found is None:
            return HCode.H_FUNCTION
        n_args, handler = found
        if len(args) < n_args:
            return HCode.H_PARAMETER
        try:
            return await handler(args[:n_args])
        except GuestFault:
            return HCode.H_PARAMETER

    async def h_logical_memop(self, args: list[int]) -> HCode:
        """KVMPPC_H_LOGICAL_MEMOP: copy, or copy inverted, `count` elements of `1 << element_shift` bytes."""
        dst, src, element_shift, count, operation = args
        if element_shift > 3 or count > MAX_COUNT or operation not in (COPY, INVERT):
            return HCode.H_PARAMETER
        element_bytes, n_bytes = 1 << element_shift, count << element_shift
        if (dst | src) % element_bytes:
            return HCode.H_PARAMETER
        self._ram.check(dst, n_bytes)
        self._ram.check(src, n_bytes)
        starts = list(range(0, n_bytes, _PIECE_BYTES))
        if src < dst < src + n_bytes:
            starts.reverse()
        for at in starts:
            piece = await self._ram.read(src + at, min(_PIECE_BYTES, n_bytes - at))
            await self._ram.write(dst + at, piece if operation == COPY else _inverted(piece))
            await trio.lowlevel.checkpoint()
        return HCode.H_SUCCESS

    async def h_cas(self, args: list[int]) -> HCode:
        """KVMPPC_H_CAS: read what the guest can do, and give it the tree that follows from it."""
        vector_gpa, buffer, buffer_bytes = args
        n_bytes = min(MAX_VECTOR_BYTES, max(self._ram.size_bytes - vector_gpa, 0))
        vector = parse_vector(await self._ram.read(vector_gpa, n_bytes))
        if vector.wants_hash:
            self._trees.cas_refused("the guest asks for hashed page tables; this machine offers radix only")
            return HCode.H_PARAMETER
        answer = _UPDATE_VERSION + self._trees.agreed_tree()
        if len(answer) > buffer_bytes:
            self._trees.cas_refused(f"the device tree of {len(answer)} bytes does not fit a buffer of {buffer_bytes}")
            return HCode.H_RESOURCE
        await self._ram.write(buffer, answer)
        return HCode.H_SUCCESS

    async def h_update_dt(self, args: list[int]) -> HCode:
        """KVMPPC_H_UPDATE_DT: firmware's final tree."""
        (gpa,) = args
        try:
            n_bytes = fdt_total_bytes(await self._ram.read(gpa, _TREE_HEAD_BYTES))
            if n_bytes > MAX_TREE_BYTES:
                return HCode.H_PARAMETER
            tree = await self._ram.read(gpa, n_bytes)
            await trio.to_thread.run_sync(read_fdt, tree)
        except PefboxError:
            return HCode.H_PARAMETER
        self._trees.tree_updated(tree)
        return HCode.H_SUCCESS

    async def h_set_dma_bypass(self, args: list[int]) -> HCode:
        """H_SET_DMA_BYPASS."""
        buid, config_addr, enable = args
        if enable not in (0, 1):
            return HCode.H_PARAMETER
        return self._devices.set_dma_bypass(buid, config_addr, on=bool(enable))


def _inverted(data: bytes) -> bytes:
    return (int.from_bytes(data, "big") ^ (1 << 8 * len(data)) - 1).to_bytes(len(data), "big")
