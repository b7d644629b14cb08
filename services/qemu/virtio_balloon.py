"""The virtio memory balloon: the guest's driver keeps pages from its kernel, and the host has their memory back.

Management sets how many pages it wants (`set_target`); the driver inflates or deflates and writes how many there are.
A frame of 64 KiB of which all pages are in the balloon goes back to the host through kvm, the only one that may take
it. What is deflated the guest uses once the device has taken note: its next touch brings a zeroed frame. A driver that
does not promise to wait for that (MUST_TELL_HOST) keeps its frames, as it may use one in the moment it is taken. When
kvm says that the VM is secure the device stops (NEEDS_RESET), since nothing that it does could be of use.

Source: VIRTIO 1.4, section 5.5.
"""

from __future__ import annotations

import struct
from typing import Protocol

import msgspec
import trio

from protocol.codes import HCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT
from protocol.startup import NO_OFFER, DmaOffer
from services.qemu.ballooned_pages import BalloonedPages
from services.qemu.segments import gather, pieces, split
from services.qemu.virtio_access import DeviceMemory
from services.qemu.virtio_device import VirtioDevice
from services.qemu.virtqueue import Chain, Virtqueue
from shared.virtio import DeviceId, DeviceStatus, feature_mask, has_feature
from shared.virtio_balloon import (
    BALLOON_CONFIG,
    DEFLATE_QUEUE,
    INFLATE_QUEUE,
    PFN_BYTES,
    PFN_SHIFT,
    STAT,
    STATS_QUEUE,
    BalloonConfig,
    BalloonFeature,
    StatTag,
)

QUEUE_SIZE = 128
PIECE_BYTES = 4096
"""So much of a chain is served before other tasks have their turn."""
MAX_STATS = 64
"""Statistics of one buffer that are read."""


class BalloonPort(Protocol):
    """What a balloon needs from its machine."""

    async def discard(self, gfns: list[int]) -> int:
        """Have kvm take these frames; its code, H_BUSY when a later try may succeed."""

    def balloon_changed(self, actual_bytes: int) -> None:
        """The guest has so much memory now."""


class BalloonState(msgspec.Struct):
    """What survives a save, beside the state of every device."""

    num_pages: int
    actual: int
    pages: bytes
    owed: list[int]
    stats: dict[int, int]
    stats_head: int | None
    """The buffer that the driver gave for its next statistics."""


class BalloonStatus(msgspec.Struct):
    """What the operator sees. `reason` says why the device does nothing, or refused its driver."""

    memory_bytes: int
    actual_bytes: int
    target_bytes: int
    reason: str | None
    stats: dict[str, int]
    """As the guest tells them, by name; empty when it tells none."""


class VirtioBalloon(VirtioDevice):
    """The balloon of a VM with `memory_bytes` of RAM."""

    MAY_OFFER = feature_mask((BalloonFeature.MUST_TELL_HOST, BalloonFeature.STATS_VQ))
    FEATURE_BITS = BalloonFeature

    def __init__(
        self, name: str, memory: DeviceMemory, port: BalloonPort, memory_bytes: int, *, offer: DmaOffer = NO_OFFER
    ) -> None:
        super().__init__(
            name,
            DeviceId.BALLOON,
            memory,
            queue_sizes=(QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE),
            features=self.MAY_OFFER,
            offer=offer,
        )
        self._port = port
        self._memory_bytes = memory_bytes
        self._pages = BalloonedPages(memory_bytes >> PAGE_SHIFT)
        self._owed: set[int] = set()
        """Whole frames that kvm had no time for."""
        self._moving = trio.Lock()
        """While kvm takes frames no deflation is acknowledged: each queue has a worker of its own."""
        self._num_pages = 0
        self._actual = 0
        self._stats: dict[int, int] = {}
        self._stats_chain: Chain | None = None
        self._stats_came = trio.Event()

    # What management does.

    @property
    def actual_bytes(self) -> int:
        """How much memory the guest has, as its driver says."""
        return max(0, self._memory_bytes - (self._actual << PFN_SHIFT))

    @property
    def target_bytes(self) -> int:
        """How much it is to have."""
        return self._memory_bytes - (self._num_pages << PFN_SHIFT)

    def set_target(self, target_bytes: int) -> None:
        """The guest is to have so much memory; all of it when that is more than there is."""
        self._num_pages = (self._memory_bytes - min(target_bytes, self._memory_bytes)) >> PFN_SHIFT
        self.state.config_generation = (self.state.config_generation + 1) & 0xFF
        if self.state.status & DeviceStatus.DRIVER_OK and self.transport is not None:
            self.transport.config_interrupt()

    @property
    def stopped(self) -> str | None:
        """Why the device does nothing until its driver resets it."""
        return self.state.fault if self.state.status & DeviceStatus.NEEDS_RESET else None

    def balloon_status(self) -> BalloonStatus:
        """What is known now."""
        stats = {StatTag(tag).name.lower(): value for tag, value in sorted(self._stats.items())}
        return BalloonStatus(self._memory_bytes, self.actual_bytes, self.target_bytes, self.state.fault, stats)

    async def ask_stats(self, seconds: float) -> None:
        """Have the driver tell its statistics anew; returns when it did, after `seconds`, or when it tells none."""
        chain, came = self._stats_chain, self._stats_came
        if chain is None or not self.serving:
            return
        self._stats_chain = None
        self.later(self.queues[STATS_QUEUE], chain, _nothing_written)
        with trio.move_on_after(seconds):
            await came.wait()

    # Configuration.

    def read_config(self, offset: int, n_bytes: int) -> bytes:
        """How many pages are wanted, and how many there are."""
        config = BALLOON_CONFIG.pack(self._num_pages, self._actual)
        return config[offset : offset + n_bytes].ljust(n_bytes, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how many pages there are; the rest is not its own to write."""
        if offset == BalloonConfig.ACTUAL and len(data) == PFN_BYTES:
            self._set_actual(int.from_bytes(data, "little"))

    # Queues.

    async def handle(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Pages that go into the balloon or come out, or statistics; raises GuestFault for what is neither."""
        if queue.index == STATS_QUEUE:
            await self._take_stats(queue, chain)
            return None
        n_bytes = chain.readable_bytes
        if n_bytes % PFN_BYTES:
            raise GuestFault(f"{n_bytes} bytes are no list of page numbers")
        if n_bytes // PFN_BYTES > self._memory_bytes >> PFN_SHIFT:
            raise GuestFault(f"{n_bytes // PFN_BYTES} page numbers in one buffer are more than there are pages")
        for piece in pieces(chain.readable, PIECE_BYTES):
            data = await gather(queue.dma, piece)
            pfns = struct.unpack(f"<{len(data) // PFN_BYTES}I", data)
            if queue.index == INFLATE_QUEUE:
                await self._inflate(pfns)
            elif queue.index == DEFLATE_QUEUE:
                await self._deflate(pfns)
            await trio.lowlevel.checkpoint()
        return 0

    def was_reset(self) -> None:
        """The balloon is empty; what management wants stays."""
        self._pages.clear()
        self._owed.clear()
        self._stats.clear()
        self._stats_chain = None
        self._set_actual(0)

    # State.

    def save_balloon(self) -> BalloonState:
        """A copy of the balloon's own state."""
        head = None if self._stats_chain is None else self._stats_chain.head
        pages, owed, stats = self._pages.save(), sorted(self._owed), dict(self._stats)
        return BalloonState(self._num_pages, self._actual, pages, owed, stats, head)

    def load_balloon(self, state: BalloonState) -> None:
        """Go on from `state`, after `load`; raises ValueError for one of another amount of RAM."""
        self._pages.load(state.pages)
        self._owed = {gfn for gfn in state.owed if gfn < self._memory_bytes >> PAGE_SHIFT}
        self._num_pages, self._actual, self._stats = state.num_pages, state.actual, dict(state.stats)
        self._stats_chain = None
        if state.stats_head is not None:
            self._stats_chain = Chain(state.stats_head, [], [])
            self.queues[STATS_QUEUE].in_flight.add(state.stats_head)

    # Inside.

    def _set_actual(self, actual: int) -> None:
        changed, self._actual = actual != self._actual, actual
        if changed:
            self._port.balloon_changed(self.actual_bytes)

    async def _inflate(self, pfns: tuple[int, ...]) -> None:
        async with self._moving:
            whole = self._pages.put(pfns)
            if has_feature(self.state.driver_features, BalloonFeature.MUST_TELL_HOST):
                self._owed.update(whole)
                await self._give_owed()

    async def _give_owed(self) -> None:
        if not self._owed:
            return
        gfns = sorted(self._owed)
        code = await self._port.discard(gfns)
        if code == HCode.H_PERMISSION:
            raise GuestFault("the VM is secure: its pages are not the host's to take")
        if code == HCode.H_SUCCESS:
            self._owed.difference_update(gfns)
        elif code != HCode.H_BUSY:
            raise GuestFault(f"kvm does not take frames from gfn {gfns[0]:#x} on: code {code}")

    async def _deflate(self, pfns: tuple[int, ...]) -> None:
        async with self._moving:
            self._pages.take(pfns)
            self._owed = {gfn for gfn in self._owed if self._pages.is_whole(gfn)}

    async def _take_stats(self, queue: Virtqueue, chain: Chain) -> None:
        """The buffer stays here until somebody asks for statistics anew."""
        n_bytes = min(chain.readable_bytes, MAX_STATS * STAT.size)
        data = await gather(queue.dma, split(chain.readable, n_bytes)[0])
        entries = STAT.iter_unpack(data[: n_bytes - n_bytes % STAT.size])
        self._stats = {tag: value for tag, value in entries if tag in _TAGS}
        unexpected, self._stats_chain = self._stats_chain, chain
        if unexpected is not None:
            # A driver has one such buffer; what it gave before goes back unused.
            await queue.push(unexpected.head, 0)
        self._stats_came.set()
        self._stats_came = trio.Event()


_TAGS = frozenset(int(tag) for tag in StatTag)


async def _nothing_written() -> int:
    return 0
