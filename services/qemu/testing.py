"""The other side of the devices, for tests: plain guest RAM, a small driver of split rings, a board's port.

The driver does exactly what it is told, also what no driver may do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.codes import HCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_SHIFT
from protocol.messages import TceWindowBody
from protocol.startup import NO_OFFER, DeviceEntry, DiskEntry, DmaOffer, GuestEntry, VmEntry
from services.qemu.board import Board
from services.qemu.device_function import DeviceFunction
from services.qemu.edu import EduFunction
from services.qemu.virtio_pci import MODERN_BAR, NOTIFY_MULTIPLIER, OFFSETS, VirtioPciFunction
from services.qemu.virtqueue import QueueState
from services.runtime.cause import CAUSE
from shared.edu import FIRST_WIDE, EduDma, EduRegister
from shared.guest_ram import GuestRam
from shared.host_view import HostState
from shared.pci import Command, Config
from shared.tce import ENTRY_BYTES, TceTable
from shared.virtio import DeviceStatus
from shared.virtio_pci import CfgType, CommonCfg, Register
from shared.vring import (
    DESC,
    DESC_BYTES,
    RING_FLAGS,
    RING_IDX,
    USED_ELEM,
    DescFlag,
    avail_entry,
    used_entry,
    used_event,
)

Descriptor = tuple[int, int, int, int]
"""addr, len, flags, next."""


def board_entry(
    disks: Sequence[DiskEntry],
    devices: Sequence[DeviceEntry] = (),
    *,
    memory_bytes: int,
    time: str = "instructions",
    offer: DmaOffer = NO_OFFER,
) -> VmEntry:
    """The entry of a VM; without `devices` each disk is a virtio-blk of its own."""
    blocks = [DeviceEntry(kind="virtio-blk", disk=disk.name, offer=offer) for disk in disks]
    return VmEntry(
        name="vm1",
        lpid=1,
        incarnation=1,
        memory_bytes=memory_bytes,
        ram_segment="",
        time=time,
        secure_allowed=True,
        debuggable=False,
        guest=GuestEntry(),
        disks=list(disks),
        devices=list(devices) or blocks,
    )


@dataclass
class TestRam:
    """Guest RAM without a kvm: `accessor` for devices, `bytes` for the guest, `view` a byte a GFN.

    `wanted` are the absent GFNs that were asked for; they become present. `refuse` makes kvm refuse them.
    """

    __test__ = False

    size_bytes: int
    bytes: bytearray = field(init=False)
    view: bytearray = field(init=False)
    dirty: bytearray = field(init=False)
    wanted: list[int] = field(default_factory=list)
    refuse: bool = False
    accessor: GuestRam = field(init=False)

    def __post_init__(self) -> None:
        n_pages = self.size_bytes >> PAGE_SHIFT
        self.bytes = bytearray(self.size_bytes)
        self.view = bytearray([HostState.PRESENT] * n_pages)
        self.dirty = bytearray(n_pages)
        self.accessor = GuestRam(memoryview(self.bytes), memoryview(self.view), self._want, memoryview(self.dirty))

    async def _want(self, gfns: list[int]) -> None:
        if self.refuse:
            raise GuestFault("kvm does not give the page")
        self.wanted += gfns
        for gfn in gfns:
            self.view[gfn] = HostState.PRESENT


@dataclass
class TestRing:
    """One split queue in `memory`, as its driver sees it. Ring addresses are offsets into `memory`."""

    __test__ = False

    memory: bytearray
    size: int
    desc: int
    driver: int
    device: int
    avail_idx: int = 0
    seen_used: int = 0

    @classmethod
    def at(cls, memory: bytearray, size: int, base: int) -> TestRing:
        """A ring whose parts follow each other from `base` (16-byte aligned)."""
        driver = base + DESC_BYTES * size
        device = driver + (6 + 2 * size + 3 & ~3)
        return cls(memory, size, base, driver, device)

    def settings(self) -> QueueState:
        """What the driver tells the device about the ring."""
        return QueueState(self.size, enabled=True, desc=self.desc, driver=self.driver, device=self.device)

    def put_descriptors(self, descriptors: list[Descriptor], first: int = 0) -> None:
        """Store descriptors in the table from entry `first`."""
        for index, descriptor in enumerate(descriptors, first):
            DESC.pack_into(self.memory, self.desc + index * DESC_BYTES, *descriptor)

    def put_chain(self, buffers: list[tuple[int, int, bool]], first: int = 0) -> None:
        """A chain of (address, bytes, writable) in consecutive entries from `first`, made available."""
        self.put_descriptors(chained(buffers, first), first)
        self.offer(first)

    def put_indirect(self, buffers: list[tuple[int, int, bool]], table: int, head: int = 0) -> None:
        """A chain in an indirect table at address `table`, made available."""
        for index, descriptor in enumerate(chained(buffers, 0)):
            DESC.pack_into(self.memory, table + index * DESC_BYTES, *descriptor)
        self.put_descriptors([(table, len(buffers) * DESC_BYTES, DescFlag.INDIRECT, 0)], head)
        self.offer(head)

    def offer(self, head: int) -> None:
        """Make `head` available."""
        self.put_u16(self.driver + avail_entry(self.avail_idx % self.size), head)
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        self.set_avail_idx(self.avail_idx)

    def set_avail_idx(self, value: int) -> None:
        """Store avail.idx."""
        self.put_u16(self.driver + RING_IDX, value)

    def set_avail_flags(self, value: int) -> None:
        """Store avail.flags."""
        self.put_u16(self.driver + RING_FLAGS, value)

    def set_used_event(self, value: int) -> None:
        """Ask to be told when used.idx passes `value`."""
        self.put_u16(self.driver + used_event(self.size), value)

    def used_idx(self) -> int:
        """The device's used.idx."""
        return self.u16(self.device + RING_IDX)

    def take_used(self) -> list[tuple[int, int]]:
        """(head, bytes written) of every element that was not seen yet."""
        result = []
        while self.seen_used != self.used_idx():
            head, n_bytes = USED_ELEM.unpack_from(self.memory, self.device + used_entry(self.seen_used % self.size))
            result.append((head, n_bytes))
            self.seen_used = self.seen_used + 1 & 0xFFFF
        return result

    def put_u16(self, at: int, value: int) -> None:
        """Store a little-endian u16."""
        self.memory[at : at + 2] = value.to_bytes(2, "little")

    def u16(self, at: int) -> int:
        """Load a little-endian u16."""
        return int.from_bytes(self.memory[at : at + 2], "little")


def chained(buffers: list[tuple[int, int, bool]], first: int) -> list[Descriptor]:
    """Descriptors of (address, bytes, writable) buffers in entries from `first`, each but the last with a next."""
    last = len(buffers) - 1
    return [
        (address, n, (DescFlag.WRITE if writable else 0) | (DescFlag.NEXT if at < last else 0), first + at + 1)
        for at, (address, n, writable) in enumerate(buffers)
    ]


@dataclass
class TestPort:
    """A board's port that writes everything down."""

    __test__ = False

    sources: dict[int, bool] = field(default_factory=dict)
    """Defined source -> level triggered."""
    edges: list[int] = field(default_factory=list)
    levels: dict[int, bool] = field(default_factory=dict)
    causes: list[int] = field(default_factory=list)
    """On whose behalf each interrupt was raised."""
    displayed: bytearray = field(default_factory=bytearray)
    events: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    io_errors: list[tuple[str, str]] = field(default_factory=list)
    doorbells: set[int] = field(default_factory=set)
    board: Board | None = None
    """Where windows go that the board asks for; without it kvm makes none."""
    windows: dict[int, TceWindowBody] = field(default_factory=dict)
    now_ns: int = 0
    discarded: list[list[int]] = field(default_factory=list)
    """The frames that a balloon gave back, by call."""
    discard_code: int = HCode.H_SUCCESS
    actual_bytes: list[int] = field(default_factory=list)
    """What a balloon said of the guest's memory."""

    async def create_window(self, window: TceWindowBody) -> bool:
        if self.board is None:
            return False
        self.windows[window.liobn] = window
        self.board.add_dma_window(TceTable(window, memoryview(bytearray(window.n_tces * ENTRY_BYTES))))
        return True

    async def remove_window(self, liobn: int) -> None:
        assert self.board is not None
        del self.windows[liobn]
        self.board.remove_dma_window(liobn)

    async def discard(self, gfns: list[int]) -> int:
        self.discarded.append(gfns)
        return self.discard_code

    def balloon_changed(self, actual_bytes: int) -> None:
        self.actual_bytes.append(actual_bytes)

    def doorbell(self, gpa: int, on: bool) -> None:
        (self.doorbells.add if on else self.doorbells.discard)(gpa)

    async def define(self, source: int, *, level_triggered: bool) -> None:
        self.sources[source] = level_triggered

    def msi(self, source: int) -> None:
        self.edges.append(source)
        self.causes.append(CAUSE.get())

    def lsi(self, source: int, level: bool) -> None:
        self.levels[source] = level
        if level:
            self.causes.append(CAUSE.get())

    def cas_refused(self, reason: str) -> None:
        self.events.append(f"cas refused: {reason}")

    def display(self, character: int) -> None:
        self.displayed.append(character)

    def power_off(self) -> None:
        self.events.append("power-off")

    def exit(self, status: int) -> None:
        self.events.append(f"exit {status}")

    def reboot(self) -> None:
        self.events.append("reboot")

    def os_term(self, text: str) -> None:
        self.events.append(f"os-term {text}")

    def wall_ns(self) -> int:
        return self.now_ns

    def cpu_stopped(self, cpu: int) -> bool | None:
        return False if cpu == 0 else None

    def device_fault(self, device: str, reason: str) -> None:
        self.faults.append((device, reason))

    def io_error(self, device: str, reason: str) -> None:
        self.io_errors.append((device, reason))


class TestDriver:
    """A driver of one virtio-pci function of a board that does everything through `mmio_load` and `mmio_store`."""

    __test__ = False

    def __init__(self, board: Board, function: DeviceFunction[Any]) -> None:
        if not isinstance(function, VirtioPciFunction):
            raise ValueError(f"{function.device.name} is no virtio device")
        self.board = board
        self.function = function
        bar = next(bar for bar in function.bars if bar.index == MODERN_BAR)
        gpa = board.bridge.gpa_of_bar(function, bar)
        if gpa is None:
            raise ValueError("the BAR has no address")
        self.gpa = gpa
        function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.MASTER)

    def load(self, register: Register) -> int:
        """A register of the common configuration."""
        code, value = self.board.mmio_load(self.gpa + OFFSETS[CfgType.COMMON] + register.offset, register.size_bytes)
        if code != HCode.H_SUCCESS:
            raise ValueError(f"load of {register} gave {code}")
        return value

    async def store(self, register: Register, value: int) -> None:
        """Store to a register of the common configuration."""
        gpa = self.gpa + OFFSETS[CfgType.COMMON] + register.offset
        code = await self.board.mmio_store(gpa, register.size_bytes, value)
        if code != HCode.H_SUCCESS:
            raise ValueError(f"store to {register} gave {code}")

    async def features(self) -> int:
        """What the device offers."""
        words = []
        for half in range(2):
            await self.store(CommonCfg.DEVICE_FEATURE_SELECT, half)
            words.append(self.load(CommonCfg.DEVICE_FEATURE))
        return words[0] | words[1] << 32

    async def negotiate(self, features: int | None = None) -> bool:
        """Reset and accept `features` (all that is offered); whether FEATURES_OK stayed."""
        await self.store(CommonCfg.DEVICE_STATUS, 0)
        await self.store(CommonCfg.DEVICE_STATUS, DeviceStatus.ACKNOWLEDGE)
        await self.store(CommonCfg.DEVICE_STATUS, DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
        chosen = await self.features() if features is None else features
        for half in range(2):
            await self.store(CommonCfg.DRIVER_FEATURE_SELECT, half)
            await self.store(CommonCfg.DRIVER_FEATURE, chosen >> 32 * half & 0xFFFFFFFF)
        await self.store(CommonCfg.DEVICE_STATUS, self.load(CommonCfg.DEVICE_STATUS) | DeviceStatus.FEATURES_OK)
        return bool(self.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.FEATURES_OK)

    async def set_queue(self, ring: TestRing, index: int = 0, vector: int | None = None, offset: int = 0) -> None:
        """Tell the device where a ring lies; `offset` is added to its addresses (bus addresses)."""
        await self.store(CommonCfg.QUEUE_SELECT, index)
        await self.store(CommonCfg.QUEUE_SIZE, ring.size)
        await self.store(CommonCfg.QUEUE_DESC, ring.desc + offset)
        await self.store(CommonCfg.QUEUE_DRIVER, ring.driver + offset)
        await self.store(CommonCfg.QUEUE_DEVICE, ring.device + offset)
        if vector is not None:
            await self.store(CommonCfg.QUEUE_MSIX_VECTOR, vector)
        await self.store(CommonCfg.QUEUE_ENABLE, 1)

    async def go(self) -> None:
        """DRIVER_OK."""
        await self.store(CommonCfg.DEVICE_STATUS, self.load(CommonCfg.DEVICE_STATUS) | DeviceStatus.DRIVER_OK)

    async def kick(self, index: int = 0) -> None:
        """Notify a queue."""
        await self.board.mmio_store(self.gpa + OFFSETS[CfgType.NOTIFY] + index * NOTIFY_MULTIPLIER, 2, index)

    def isr(self) -> int:
        """Read, and so clear, the ISR byte."""
        return self.board.mmio_load(self.gpa + OFFSETS[CfgType.ISR], 1)[1]

    def config(self, offset: int, n_bytes: int) -> int:
        """A field of the device configuration."""
        return self.board.mmio_load(self.gpa + OFFSETS[CfgType.DEVICE] + offset, n_bytes)[1]


class TestEdu:
    """A driver of one `edu` of a board that does everything through `mmio_load` and `mmio_store`."""

    __test__ = False

    def __init__(self, board: Board, function: DeviceFunction[Any]) -> None:
        if not isinstance(function, EduFunction):
            raise ValueError(f"{function.device.name} is no edu")
        gpa = board.bridge.gpa_of_bar(function, function.bars[0])
        if gpa is None:
            raise ValueError("the BAR has no address")
        self.board, self.function, self.gpa = board, function, gpa
        function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.MASTER)

    def load(self, register: EduRegister) -> int:
        """A register, at its whole width."""
        code, value = self.board.mmio_load(self.gpa + register, 8 if register >= FIRST_WIDE else 4)
        if code != HCode.H_SUCCESS:
            raise ValueError(f"load of {register.name} gave {code}")
        return value

    async def store(self, register: EduRegister, value: int) -> None:
        """Store to a register, at its whole width."""
        code = await self.board.mmio_store(self.gpa + register, 8 if register >= FIRST_WIDE else 4, value)
        if code != HCode.H_SUCCESS:
            raise ValueError(f"store to {register.name} gave {code}")

    async def transfer(self, source: int, destination: int, count: int, command: EduDma) -> None:
        """Start a transfer; with instruction time it has ended on return."""
        await self.store(EduRegister.DMA_SOURCE, source)
        await self.store(EduRegister.DMA_DESTINATION, destination)
        await self.store(EduRegister.DMA_COUNT, count)
        await self.store(EduRegister.DMA_COMMAND, EduDma.RUN | command)
