"""A played qemu: it loads an image, runs the machine's state, and touches guest RAM through the one accessor."""

from __future__ import annotations

import mmap

from protocol import messages as m
from protocol.codes import HCode, RtasStatus
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.messages import BodyT
from services.runtime.link import Link
from services.testing.calls import CallLog
from services.testing.image import PlayedImage
from shared.guest_ram import GuestRam
from shared.host_view import HostState
from shared.memfd import map_sealed

_ENTRY = 0x100


class PlayedQemu:
    """One qemu without devices."""

    def __init__(self, ram: mmap.mmap, link: Link, log: CallLog) -> None:
        self.events: list[m.VmEventBody] = []
        self._ram = ram
        self._link = link
        self._log = log
        self._view: mmap.mmap | None = None
        link.on(m.EXIT_MMIO_LOAD, lambda _envelope, _body: m.MmioLoadReply(HCode.H_PARAMETER))
        link.on(m.EXIT_MMIO_STORE, lambda _envelope, _body: m.Status(HCode.H_PARAMETER))
        link.on(m.EXIT_RTAS, lambda _envelope, _body: m.RtasReply([RtasStatus.PARAMETER_ERROR & 0xFFFFFFFF]))
        link.on(m.MAP_INVALIDATE, lambda _envelope, _body: m.Status())
        link.on(m.VM_EVENT, lambda _envelope, body: self.events.append(body))

    # -- run state --------------------------------------------------------------------------------------------

    async def add_memory(self, size_bytes: int) -> int:
        """MEMSLOT_SET: all RAM is slot 0."""
        return await self._order(m.MEMSLOT_SET, m.MemslotBody(0, 0, size_bytes))

    async def power_on(self, image: PlayedImage | None = None) -> int:
        """Load the image, if any, and start the processor (VM_START)."""
        for gpa, data in (image.parts if image is not None else {}).items():
            await self.write(gpa, data)
        return await self._order(m.VM_START, m.StartBody(0, _ENTRY, {}))

    async def reset(self) -> int:
        """VM_RESET; the machine is off afterwards."""
        return await self._order(m.VM_RESET, m.Empty())

    async def stop(self) -> int:
        """VM_STOP."""
        return await self._order(m.VM_STOP, m.Empty())

    async def cont(self) -> int:
        """VM_CONTINUE."""
        return await self._order(m.VM_CONTINUE, m.Empty())

    async def _order(self, message: m.Message[BodyT, m.Status], body: BodyT) -> int:
        with self._log.open(self._link.peer, message.name):
            return (await self._link.call(message, body)).code

    # -- memory -----------------------------------------------------------------------------------------------

    def take_view(self, fd: int, n_pages: int) -> None:
        """kvm's host view, which the launcher brought."""
        self._view = map_sealed(fd, n_pages)

    def view(self, gfn: int) -> HostState:
        """What the host may find in the frame."""
        assert self._view is not None
        return HostState(self._view[gfn])

    async def want(self, gfns: list[int]) -> int:
        """PAGES_WANTED: one try."""
        return await self._order(m.PAGES_WANTED, m.PagesBody(gfns))

    async def read(self, gfn: int) -> bytes:
        """The 64 KiB that the host finds in a frame, through the accessor; raises GuestFault."""
        assert self._view is not None
        with memoryview(self._ram) as ram, memoryview(self._view) as view:
            return await GuestRam(ram, view, self._wanted).read(gpa_of(gfn), PAGE_BYTES)

    async def write(self, gpa: int, data: bytes) -> None:
        """A device's store, through the accessor; raises GuestFault."""
        assert self._view is not None
        with memoryview(self._ram) as ram, memoryview(self._view) as view:
            await GuestRam(ram, view, self._wanted).write(gpa, data)

    async def _wanted(self, gfns: list[int]) -> None:
        code = await self.want(gfns)
        if code not in (HCode.H_SUCCESS, HCode.H_BUSY):
            raise GuestFault(f"gfn {gfns[0]:#x} cannot be made present: code {code}")

    def close(self) -> None:
        """The process ends: every mapping is gone."""
        if self._view is not None:
            self._view.close()
