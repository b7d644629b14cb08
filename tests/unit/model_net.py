"""The model kernel's world with a network card beside its disk; who is on the network is for the test to say."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator

from protocol.codes import UCode
from protocol.geometry import PAGE_SHIFT
from services.guest.model.echo import EchoKind, parse_echo
from services.guest.model.virtio_net import NetDrop
from shared.partition_map import MapKind
from shared.vring import need_event
from tests.unit.test_model_kernel import MMIO_GPA, MMIO_PCI, MSI_SOURCE, FakeDisk, World

OWN = bytes.fromhex("525400000001")
PEER = bytes.fromhex("525400000002")
PEER_TEXT = PEER.hex(":")
NET_SOURCE = MSI_SOURCE + 1
_DEVFN = 0x18
_HEADER_BYTES = 12
_BASE_FEATURES = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 5 | 1 << 16 | 1 << 3

Network = Callable[[bytes], list[bytes]]
"""What comes back for a frame that the card sent."""


def echo_peer(frame: bytes) -> list[bytes]:
    """A kernel with address PEER: it answers as this one does."""
    echo = parse_echo(frame)
    return [echo.reply().pack()] if echo and echo.destination == PEER and echo.kind is EchoKind.REQUEST else []


def nobody(frame: bytes) -> list[bytes]:
    """A network that nobody else is on."""
    return []


class FakeNet(FakeDisk):
    """A virtio network function. `lie` makes it hostile, `stuck` one that takes no frame."""

    def __init__(
        self, network: Network = echo_peer, *, access_platform: bool = False, mergeable: bool = True, mtu: int = 1500
    ) -> None:
        self.network = network
        self.mac, self.mtu = OWN, mtu
        self.waiting: deque[bytes] = deque()
        self.sent: list[bytes] = []
        self.packets: list[bytes] = []
        """What was read from the transmit queue, headers included."""
        self.stuck = False
        super().__init__(bytearray())
        self.offered = _BASE_FEATURES | access_platform << 33 | mergeable << 15
        struct.pack_into("<HH", self.config, 0, 0x1AF4, 0x1041)

    def reset(self) -> None:
        self.status = self.accepted = self.select = self.selected = 0
        empty = {"size": 256, "vector": 0xFFFF, "desc": 0, "driver": 0, "device": 0, "enable": 0}
        self.queues = [dict(empty), dict(empty)]
        self.positions = [0, 0]

    @property
    def queue(self) -> dict[str, int]:  # type: ignore[override]
        return self.queues[self.selected]

    def load(self, offset: int, size: int) -> int:
        if offset >= 0x2000:
            config = struct.pack("<6sHHH", self.mac, 1, 1, self.mtu).ljust(64, b"\0")
            return int.from_bytes(config[offset - 0x2000 :][:size], "little")
        if self.selected > 1 and offset == 24:
            return 0
        return super().load(offset, size)

    def store(self, offset: int, size: int, value: int) -> None:
        if offset == 22:
            self.selected = value
        else:
            super().store(offset, size, value)

    @property
    def mergeable(self) -> bool:
        return bool(self.accepted >> 15 & 1)


class NetWorld(World):
    """A VM with a card; every byte of guest memory that the card touches is looked at."""

    def __init__(self, disk: FakeDisk, net: FakeNet, *, esm: UCode = UCode.U_SUCCESS) -> None:
        self.net = net
        self.private_touches: list[int] = []
        """Gfns of a secure VM that the card touched and that are not shared."""
        super().__init__(disk, esm=esm)

    def _function(self, config_addr: int) -> FakeDisk | None:
        return self.net if config_addr >> 8 == _DEVFN else super()._function(config_addr)

    def _msi_source(self, config_addr: int) -> int:
        return NET_SOURCE if config_addr >> 8 == _DEVFN else super()._msi_source(config_addr)

    def _mmio(self, gpa: int) -> tuple[FakeDisk | None, int]:
        base = self.net.bar_address(4) - MMIO_PCI + MMIO_GPA
        return (self.net, gpa - base) if base <= gpa < base + 0x4000 else super()._mmio(gpa)

    def _dma(self, disk: FakeDisk, addr: int, n_bytes: int, *, write: bool) -> Iterator[slice]:
        for part in super()._dma(disk, addr, n_bytes, write=write):
            if disk is self.net and self.secure:
                gfns = range(part.start >> PAGE_SHIFT, (part.stop - 1 >> PAGE_SHIFT) + 1)
                self.private_touches += [gfn for gfn in gfns if self.entries[gfn] & 0xF != MapKind.SHARED]
            yield part

    def _notify(self, disk: FakeDisk) -> None:
        if disk is not self.net:
            super()._notify(disk)
            return
        if not self.net.stuck:
            self._take_sent()
        self.deliver()

    def deliver(self, *frames: bytes) -> None:
        """Frames come from the network; they wait while the driver has no buffers."""
        net = self.net
        net.waiting += frames
        while net.status & 4 and net.waiting and self._receive_one(net.waiting[0]):
            net.waiting.popleft()

    def dropped(self, reason: NetDrop) -> int:
        """How many frames the driver says it dropped so."""
        found = [word for word in self.ask("net").split()[-1].split(",") if word.startswith(f"{reason}=")]
        return int(found[0].split("=")[1]) if found else 0

    # -- rings ------------------------------------------------------------------------------------------------------

    def _take_sent(self) -> None:
        while (head := self._next_head(1)) is not None:
            addr, n_bytes, flags, _ = self._desc(1, head)
            assert flags == 0, "a packet is one descriptor that the device reads"
            packet = self._read(self.net, addr, n_bytes)
            self._push(1, head, 0)
            self.net.packets.append(packet)
            self.net.sent.append(packet[_HEADER_BYTES:])
            self.net.waiting += self.net.network(packet[_HEADER_BYTES:])

    def _receive_one(self, frame: bytes) -> bool:
        """Put a frame into one or more buffers; False when there are too few."""
        net = self.net
        begin, left = net.positions[0], _HEADER_BYTES + len(frame)
        heads: list[int] = []
        sizes: list[int] = []
        while left > 0:
            head = self._next_head(0) if net.mergeable or not heads else None
            if head is None:
                net.positions[0] = begin
                return False
            net.positions[0] += 1
            heads.append(head)
            sizes.append(min(left, self._desc(0, head)[1]))
            left -= sizes[-1]
        net.positions[0] = begin
        n_parts = {"no parts": 0, "many parts": 300}.get(net.lie, len(heads))
        packet = struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, n_parts) + frame
        for head, n_bytes in zip(heads, sizes, strict=True):
            addr, *_ = self._desc(0, head)
            self._write(net, addr, packet[:n_bytes])
            self._push(0, head, 4 if net.lie == "runt" else n_bytes)
            packet = packet[n_bytes:]
        return True

    def _next_head(self, index: int) -> int | None:
        queue, position = self.net.queues[index], self.net.positions[index]
        if not queue["enable"]:
            return None
        (idx,) = struct.unpack("<H", self._read(self.net, queue["driver"] + 2, 2))
        if index == 1 or position == idx:
            # As the device asks for a kick at whatever comes next.
            self._write(self.net, queue["device"] + 4 + 8 * queue["size"], struct.pack("<H", idx))
        if position == idx:
            return None
        at = queue["driver"] + 4 + 2 * (position % queue["size"])
        return int(struct.unpack("<H", self._read(self.net, at, 2))[0])

    def _desc(self, index: int, head: int) -> tuple[int, int, int, int]:
        found = struct.unpack("<QIHH", self._read(self.net, self.net.queues[index]["desc"] + 16 * head, 16))
        assert index or found[2] == 2, "a receive buffer is one descriptor that the device writes"
        return found

    def _push(self, index: int, head: int, written: int) -> None:
        net, queue = self.net, self.net.queues[index]
        # All receive buffers are heads; of what is sent only one.
        head = {"bad id": 256, "not a head": (head + index) % queue["size"]}.get(net.lie, head)
        written = 1 << 30 if net.lie == "length" else written
        old = net.positions[index] & 0xFFFF
        slot = old % queue["size"]
        self._write(net, queue["device"] + 4 + 8 * slot, struct.pack("<II", head, written))
        net.positions[index] = new = old + 1 & 0xFFFF
        shown = new + (1000 if net.lie == "jump" else 0) & 0xFFFF
        self._write(net, queue["device"] + 2, struct.pack("<H", shown))
        (event,) = struct.unpack("<H", self._read(net, queue["driver"] + 4 + 2 * queue["size"], 2))
        if need_event(event, shown, old):
            self.pending.add(NET_SOURCE)
