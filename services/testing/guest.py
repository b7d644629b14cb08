"""A played guest: the processor's side of its links to kvm and ultravisor, with as many calls open as its caller likes.

It has no kernel: whoever plays it decides which call comes when, as a machine with many processors could. Memory
accesses go through the partition-scoped map in force and are synchronous, so an invalidation can be acknowledged at
once: between two messages no access is under way.
"""

from __future__ import annotations

import mmap
import os
import socket
from typing import Any

import msgspec
import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.declare import Call, Space
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.links import GUEST_WHILE_SECURE
from protocol.messages import Access
from protocol.refusals import Refusal, refusal
from protocol.ucalls import UV_ESM, UV_SHARE_PAGE, UV_UNSHARE_ALL_PAGES, UV_UNSHARE_PAGE
from protocol.wire import Envelope
from services.runtime.link import Link
from services.testing.calls import ANSWER_SECONDS, CallLog
from services.testing.image import PlayedImage
from shared.memfd import map_sealed
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap, frame_of, kind_of

_VCPU = 0
_N_DESCRIPTORS = 2
_announcement = msgspec.msgpack.Decoder(tuple[int, int])


class NotMapped(Exception):
    """The map does not give `gfn`; a real processor would fault."""

    def __init__(self, gfn: int) -> None:
        self.gfn = gfn
        super().__init__(f"gfn {gfn:#x} is not mapped")


class PlayedGuest:
    """One guest. `secure` is MSR.S, `pidr` the process, `pc` where it was last started, None while off or stopped."""

    def __init__(self, ram: mmap.mmap, private: socket.socket, kvm: Link, ultravisor: Link, log: CallLog) -> None:
        self.secure = False
        self.pc: int | None = None
        self.pidr = 0
        self.acknowledges = True
        """False: invalidations are not answered, as by a guest that hangs."""
        self.lets_go = True
        """False: it keeps its secure memory when it is told that the secure VM has ended."""
        self.starts_too_early = 0
        """VCPU_STARTs that came before kvm's map."""
        self.refused: list[int] = []
        self.invalidations: list[int] = []
        """Number of GFNs of each MAP_INVALIDATE that came."""
        self._ram = ram
        private.setblocking(False)
        self._private = private
        self._kvm = kvm
        self._ultravisor = ultravisor
        self._log = log
        self._normal_map: mmap.mmap | None = None
        self._secure_map: mmap.mmap | None = None
        self._secure: mmap.mmap | None = None
        self._cause = 0
        self._stopped_at: int | None = None
        self._hung = trio.Event()
        self._register()

    # -- calls ------------------------------------------------------------------------------------------------

    async def call(self, call: Call, *args: int) -> list[int]:
        """A hypercall or ultracall of processor 0, routed by S as hardware does; `[code, outputs...]`.

        Raises PeerGone when the peer died, CallTimeout when it did not answer a call that it must.
        """
        self._cause += 1
        upper = self._ultravisor if self.secure or call.space is Space.UCALL else self._kvm
        with self._log.open(upper.peer, call.name, None if call.open_ended else ANSWER_SECONDS):
            own = [self.pidr] * len(call.hardware)
            return await upper.call_registers(call, [_VCPU, *own, *args], self._cause)

    async def esm(self, image: PlayedImage) -> int:
        """UV_ESM; the code matters only when it failed, as a guest that is secure goes on at the kernel's base."""
        return (await self.call(UV_ESM, image.kbase, image.fdt_gpa))[0]

    async def share(self, gfn: int, n_pages: int = 1) -> int:
        """UV_SHARE_PAGE."""
        return (await self.call(UV_SHARE_PAGE, gfn, n_pages))[0]

    async def unshare(self, gfn: int, n_pages: int = 1) -> int:
        """UV_UNSHARE_PAGE."""
        return (await self.call(UV_UNSHARE_PAGE, gfn, n_pages))[0]

    async def unshare_all(self) -> int:
        """UV_UNSHARE_ALL_PAGES."""
        return (await self.call(UV_UNSHARE_ALL_PAGES))[0]

    async def fault(self, gfn: int, access: Access = Access.WRITE) -> int:
        """MAP_FAULT: one try."""
        self._cause += 1
        upper = self._ultravisor if self.secure else self._kvm
        with self._log.open(upper.peer, m.MAP_FAULT.name):
            return (await upper.call(m.MAP_FAULT, m.MapFaultBody(_VCPU, gfn, access), self._cause)).code

    # -- memory -----------------------------------------------------------------------------------------------

    def kind(self, gfn: int) -> MapKind:
        """Where the map in force sends `gfn`."""
        return kind_of(self._entry(gfn))

    def load(self, gfn: int) -> bytes:
        """The 64 KiB of `gfn` as the guest sees them; raises NotMapped."""
        frame, start = self._frame(gfn)
        return frame[start : start + PAGE_BYTES]

    def store(self, gfn: int, data: bytes, offset: int = 0) -> None:
        """Put `data` into `gfn`; raises NotMapped."""
        frame, start = self._frame(gfn)
        frame[start + offset : start + offset + len(data)] = data

    async def touch(self, gfn: int, access: Access = Access.WRITE) -> None:
        """Fault until the map gives `gfn`; raises NotMapped when it is refused."""
        while not self._entry(gfn):
            code = await self.fault(gfn, access)
            if code not in (HCode.H_SUCCESS, HCode.H_BUSY):
                raise NotMapped(gfn)

    def _entry(self, gfn: int) -> int:
        current = self._secure_map if self.secure else self._normal_map
        if current is None:
            raise NotMapped(gfn)
        with memoryview(current) as buffer, PartitionMap(buffer).words as words:
            value: int = words[gfn]
            return value

    def _frame(self, gfn: int) -> tuple[mmap.mmap, int]:
        value = self._entry(gfn)
        if not value:
            raise NotMapped(gfn)
        start = frame_of(value) << PAGE_SHIFT
        if kind_of(value) is MapKind.SECURE:
            assert self._secure is not None
            return self._secure, start
        return self._ram, start

    # -- what kvm and ultravisor order ------------------------------------------------------------------------

    def take_normal_map(self, fd: int, n_pages: int) -> None:
        """kvm's map of the VM, which the launcher brought."""
        self._drop_normal_map()
        self._normal_map = map_sealed(fd, n_pages * ENTRY_BYTES)

    def _drop_normal_map(self) -> None:
        if self._normal_map is not None:
            self._normal_map.close()
        self._normal_map = None

    def _register(self) -> None:
        for link in (self._kvm, self._ultravisor):
            link.on_waiting(m.MAP_INVALIDATE, self._guarded(link, self._invalidate))
        for message, handler in (
            (m.VCPU_START, self._start),
            (m.VCPU_STOP, self._stop),
            (m.VCPU_CONTINUE, self._continue),
        ):
            self._kvm.on_waiting(message, self._guarded(self._kvm, handler))
        self._kvm.on(m.VCPU_LINE, lambda _envelope, _body: None)
        self._ultravisor.on(m.SVM_START, self._start_secure)
        self._ultravisor.on_waiting(m.SVM_ENDED, self._end_secure)

    def _guarded(self, link: Link, handler: Any) -> Any:  # noqa: ANN401
        async def serve(envelope: Envelope, body: Any) -> Any:  # noqa: ANN401
            if link is self._kvm and self.secure and envelope.number not in GUEST_WHILE_SECURE:
                self.refused.append(envelope.number)
                return refusal(envelope.number, Refusal.PERMISSION)
            return await handler(body)

        return serve

    async def _start(self, body: m.StartBody) -> m.Status:
        if self._normal_map is None:
            self.starts_too_early += 1
            return m.Status(HCode.H_BUSY)
        self.pc = self._stopped_at = body.pc
        return m.Status()

    async def _stop(self, _body: m.RunBody) -> m.Status:
        self.pc = None
        return m.Status()

    async def _continue(self, _body: m.RunBody) -> m.Status:
        self.pc = self._stopped_at
        return m.Status()

    async def _invalidate(self, body: m.InvalidateBody) -> m.Status:
        self.invalidations.append(sum(part.n for part in body.ranges))
        if not self.acknowledges:
            await self._hung.wait()
        return m.Status()

    def _start_secure(self, _envelope: Envelope, body: m.StartBody) -> m.Status:
        data, descriptors, _, _ = socket.recv_fds(self._private, 64, _N_DESCRIPTORS)
        size_bytes, n_pages = _announcement.decode(data)
        self._secure = mmap.mmap(descriptors[0], size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(descriptors[0])
        self._secure_map = map_sealed(descriptors[1], n_pages * ENTRY_BYTES)
        self._drop_normal_map()
        self.secure, self.pc, self._stopped_at = True, body.pc, body.pc
        return m.Status()

    async def _end_secure(self, _envelope: Envelope, _body: m.Empty) -> m.Status:
        if not self.lets_go:
            await self._hung.wait()
        self.secure, self.pc, self._stopped_at = False, None, None
        self._drop_secure()
        return m.Status()

    def _drop_secure(self) -> None:
        for mapping in (self._secure, self._secure_map):
            if mapping is not None:
                mapping.close()
        self._secure = self._secure_map = None

    def close(self) -> None:
        """The process ends: every mapping is gone."""
        self._drop_secure()
        self._drop_normal_map()
        self._private.close()
        self.secure, self.pc = False, None
