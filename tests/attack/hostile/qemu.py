"""A qemu that lies to its guest, and to the other VMs of its networks: an honest one until a query says how.

Started by the launcher in place of `services.qemu`. It runs as the real one does, confined, with the real links; what
it breaks are its device's rings, its answers to MMIO, and its interrupts (`lie`), and what it sends on its network
links (`network.lie`, `network.flood`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, cast

import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.geometry import PAGE_SHIFT
from services.qemu import service, virtio_device
from services.qemu.__main__ import MAIN
from services.qemu.board import Board
from services.qemu.service import Qemu
from services.qemu.virtqueue import Chain, Virtqueue
from services.runtime.channel import MAX_BACKLOG
from services.runtime.link import Link
from services.runtime.process import Query, run_service
from shared.vring import RING_IDX, USED_ELEM, avail_bytes, desc_bytes, used_bytes, used_entry
from tests.attack.hostile.network import FloodOf, NetLie, flood, messages_of

FLOOD_SECONDS = 3.0
_EVENTS_A_ROUND = 32
_GARBAGE = 0xA5
_FIRST_MSI, _N_SOURCES = 0x1300, 64


class Lie(Enum):
    """What the device does wrong from now on."""

    NONE = "nothing"
    BAD_ID = "used id outside the queue"
    NOT_A_HEAD = "used id of a descriptor that is free"
    LENGTH = "more bytes written than there was room"
    JUMP = "used.idx jumps ahead"
    BACK = "used.idx goes back"
    SILENT = "no answer"
    GARBAGE = "garbage all over the rings"
    DEAF = "doorbells ring unheard"
    MMIO_GONE = "no device at its address"
    MMIO_MALFORMED = "answers to MMIO that are no numbers"
    MMIO_GARBAGE = "all ones in every register"
    HELD = "exits that are never answered"
    FLOOD = "interrupts without end"


_RING_LIES: dict[Lie, Callable[[int, int, int], tuple[int, int]]] = {
    Lie.BAD_ID: lambda head, size, written: (size, written),
    Lie.NOT_A_HEAD: lambda head, size, written: ((head + size // 2) % size, written),
    Lie.LENGTH: lambda head, size, written: (head, 1 << 30),
}
_INDEX_LIES = {Lie.JUMP: 1000, Lie.BACK: -300}
_lie = Lie.NONE


class LyingQueue(Virtqueue):
    """A ring whose device side tells the lie of the moment, and always interrupts when it does."""

    _spoiled = False

    def reset(self) -> None:
        """A new start."""
        super().reset()
        self._spoiled = False

    async def pop(self) -> Chain | None:
        """After garbage nothing in the ring means anything any more."""
        return None if self._spoiled else await super().pop()

    async def resume_notifications(self) -> bool:
        """Whether to look again."""
        return not self._spoiled and await super().resume_notifications()

    async def push(self, head: int, written_bytes: int) -> None:
        """Give a chain back, wrongly."""
        if _lie is Lie.SILENT:
            return
        if _lie is Lie.GARBAGE:
            self._spoiled = True
            await self._spoil()
            return
        await super().push(head, written_bytes)
        state = self.state
        if change := _RING_LIES.get(_lie):
            slot = state.next_used - 1 & state.size - 1
            await self.dma.write(
                state.device + used_entry(slot), USED_ELEM.pack(*change(head, state.size, written_bytes))
            )
        if _lie in _INDEX_LIES:
            await self.dma.store_u16(state.device + RING_IDX, state.next_used + _INDEX_LIES[_lie] & 0xFFFF)

    async def wants_interrupt(self) -> bool:
        """Whether to interrupt."""
        return await super().wants_interrupt() or _lie is not Lie.NONE

    async def _spoil(self) -> None:
        state = self.state
        parts = ((state.desc, desc_bytes), (state.driver, avail_bytes), (state.device, used_bytes))
        for address, n_bytes in parts:
            await self.dma.write(address, bytes([_GARBAGE]) * n_bytes(state.size))


class LyingBoard(Board):
    """Answers to MMIO as the lie of the moment has it."""

    def mmio_load(self, gpa: int, size_bytes: int) -> tuple[int, int]:
        """A load."""
        if _lie is Lie.MMIO_GARBAGE:
            return HCode.H_SUCCESS, (1 << 64) - 1
        return super().mmio_load(gpa, size_bytes)

    async def mmio_store(self, gpa: int, size_bytes: int, value: int) -> int:
        """A store."""
        if _lie is Lie.HELD:
            await trio.sleep_forever()
        if _lie is Lie.MMIO_GONE:
            return HCode.H_PARAMETER
        if _lie is Lie.MMIO_MALFORMED:
            no_number: Any = "no number"
            return cast(int, no_number)
        return await super().mmio_store(gpa, size_bytes, value)

    async def rtas_token(self, token: int, args: list[int], n_rets: int) -> list[int]:
        """A service of RTAS."""
        if _lie is Lie.HELD:
            await trio.sleep_forever()
        return await super().rtas_token(token, args, n_rets)

    def ring(self, gpa: int, size_bytes: int, value: int) -> None:
        """A doorbell."""
        if _lie is not Lie.DEAF:
            super().ring(gpa, size_bytes, value)


class HostileQemu(Qemu):
    """The query `lie` changes its mind, `discard` has kvm asked for all frames; the others send on network links."""

    def queries(self) -> dict[str, Query]:
        """The real one's, and those of this one."""
        more = {
            "lie": self._begin,
            "discard": self._discard,
            "network.lie": self._send_lie,
            "network.flood": self._flood_networks,
        }
        return {**super().queries(), **more}

    async def _discard(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Every frame of RAM, as if it were in the balloon; kvm's answers."""
        assert self._vm is not None
        assert self._link is not None
        n_pages = self._vm.memory_bytes >> PAGE_SHIFT
        codes = []
        for first in range(0, n_pages, m.MAX_PAGES):
            body = m.PagesBody(list(range(first, min(first + m.MAX_PAGES, n_pages))))
            codes.append((await self._link.call(m.PAGES_DISCARD, body)).code)
        return {"codes": codes}

    def _network_links(self) -> list[Link]:
        assert self._networks is not None
        return list(self._networks._links.values())

    async def _send_lie(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """To every other VM; how many messages each gets."""
        messages = messages_of(NetLie[arguments["what"]])
        for link in self._network_links():
            for parts in messages:
                link._channel.send(parts)
        return {"sent": len(messages)}

    async def _flood_networks(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answered when it is over, with how many messages the links took."""
        sent = await flood(self._network_links(), FloodOf[arguments["what"]], float(arguments["seconds"]))
        return {"sent": sent}

    async def _begin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        global _lie
        _lie = Lie[arguments["what"]]
        if _lie is Lie.FLOOD:
            self._runtime.nursery.start_soon(self._flood)
        return {"lie": _lie.value}

    async def _flood(self) -> None:
        """As many as the link takes: more would push the device's own answers out of it."""
        assert self._machine is not None
        assert self._link is not None
        sent = 0
        with trio.move_on_after(FLOOD_SECONDS):
            while True:
                n_events = _EVENTS_A_ROUND if len(self._link._channel._backlog) < MAX_BACKLOG // 2 else 0
                for n in range(n_events):
                    self._machine.msi(_FIRST_MSI + n % _N_SOURCES)
                sent += n_events
                await trio.lowlevel.checkpoint()
        self._runtime.log.info("flood over", sent=sent)


if __name__ == "__main__":
    vars(virtio_device)["Virtqueue"] = LyingQueue
    vars(service)["Board"] = LyingBoard
    run_service(replace(MAIN, make=HostileQemu))
