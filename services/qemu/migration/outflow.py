"""What a machine consists of, as frames: its pages, and at the end its state. To another host or into a snapshot."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import trio

from protocol import ucalls as u
from protocol.geometry import PAGE_BYTES
from services.qemu.migration.kvm_port import KvmPort
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.places import KVM_STATE, KVM_STATE_ROOM_BYTES, NEXT_RECORD, RECORD
from services.qemu.migration.stream import FrameKind, parts_of
from services.runtime.first_error import first_error_nursery
from shared.host_view import HostState
from shared.page_batch import Page, encode_pages
from shared.stream_buffer import StreamBuffer

_PAGES_A_FRAME = 16
_MAX_ZERO_PAGES = 1024

Spent = Callable[[int, int, int], Awaitable[None]]
"""Told how many bytes left, and how many pages of zeros and other pages were in them; returns when more may leave."""


class Sink(Protocol):
    """Where frames go."""

    async def send(self, kind: FrameKind, *parts: bytes | memoryview) -> int:
        """One frame, whose payload is all `parts`; how many bytes that was."""


class Outflow:
    """Of one machine; `secure` says that its ultravisor has its private pages and its processor."""

    def __init__(
        self, machine: MovableMachine, kvm: KvmPort, stream: StreamBuffer, sink: Sink, spent: Spent, *, secure: bool
    ) -> None:
        self._machine, self._kvm, self._stream, self._sink, self._spent = machine, kvm, stream, sink, spent
        self._secure = secure

    async def send_own_pages(self, gfns: Iterable[int]) -> None:
        """Those of `gfns` that the host may read; the others go as pages of zeros."""
        wanted = HostState.SHARED if self._secure else HostState.PRESENT
        ram, view, touched = self._machine.ram, self._machine.host_view, self._machine.touched()
        batch: list[Page] = []
        n_data = 0
        for gfn in gfns:
            # What a guest has taken back or given away meanwhile is no content of the host's. A store to an untouched
            # frame from here on has it sent again.
            has_content = view[gfn] == wanted and touched[gfn]
            page = Page.of(gfn, ram[gfn * PAGE_BYTES : (gfn + 1) * PAGE_BYTES]) if has_content else Page(gfn, b"")
            batch.append(page)
            n_data += bool(page.content)
            if n_data == _PAGES_A_FRAME or len(batch) == _MAX_ZERO_PAGES:
                await self._send_batch(batch, n_data)
                batch, n_data = [], 0
        if batch:
            await self._send_batch(batch, n_data)

    async def send_secure_pages(self) -> None:
        """All that the ultravisor owes now. While a record is on its way the ultravisor makes the next one."""
        send, receive = trio.open_memory_channel[tuple[memoryview, int, int]](0)
        async with first_error_nursery() as nursery:
            nursery.start_soon(self._fetch_records, send)
            async with receive:
                async for record, n_zero, n_data in receive:
                    n_bytes = await self._sink.send(FrameKind.RECORD, record)
                    await self._spent(n_bytes, n_zero, n_data)

    async def send_state(self) -> None:
        """Of devices, kvm and ultravisor; all stand still."""
        n_bytes = await self._kvm.save(KVM_STATE, KVM_STATE_ROOM_BYTES)
        devices = self._machine.save_devices()
        for name, data in (("devices", devices), ("kvm", self._stream.read(KVM_STATE, n_bytes))):
            for part in parts_of(name, data):
                await self._sink.send(FrameKind.STATE, part)
        more = self._secure
        while more:
            n_bytes, more_flag = await self._kvm.ucall(u.UV_EXPORT_STATE, RECORD)
            await self._sink.send(FrameKind.RECORD, self._stream.read(RECORD, n_bytes))
            more = bool(more_flag)

    async def _send_batch(self, batch: list[Page], n_data: int) -> None:
        n_bytes = await self._sink.send(FrameKind.PAGES, *encode_pages(batch))
        await self._spent(n_bytes, len(batch) - n_data, n_data)

    async def _fetch_records(self, send: trio.MemorySendChannel[tuple[memoryview, int, int]]) -> None:
        async with send:
            # One is taken only when the one before it has left, so the place before that one is free.
            for place in itertools.cycle((RECORD, NEXT_RECORD)):
                n_bytes, n_zero, n_data, _ = await self._kvm.ucall(u.UV_EXPORT_PAGES, place)
                if not n_bytes:
                    return
                await send.send((self._stream.view(place, n_bytes), n_zero, n_data))
