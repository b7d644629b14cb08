"""The network card through its whole path: board, BAR, rings, switch, against correct and hostile drivers (S5)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.geometry import PAGE_BYTES
from protocol.startup import DeviceEntry
from services.qemu.board import Board
from services.qemu.network import Drop, PeerPort, Switch
from services.qemu.testing import TestDriver, TestPort, TestRam, TestRing, board_entry
from services.qemu.virtio_device import CHAINS_BETWEEN_CHECKPOINTS
from services.qemu.virtio_net import QUEUE_SIZE, WAITING_FRAMES, VirtioNet
from shared.virtio import DeviceStatus, Feature, has_feature
from shared.virtio_net import NET_HEADER, NET_HEADER_BYTES, RECEIVE_QUEUE, TRANSMIT_QUEUE, NetConfig, NetFeature
from shared.virtio_pci import CommonCfg
from shared.vring import DESC, DESC_BYTES, DescFlag

MAC = "02:00:00:00:00:01"
RX_RING, TX_RING, RX_DATA, TX_DATA = 0x1000, 0x4000, 0x20000, 0x80000
SIZE = 64
MTU = 1500
BASIC = 1 << Feature.VERSION_1
HEADER = NET_HEADER.pack(0, 0, 0, 0, 0, 0, 0)


def frame(n_bytes: int = 60, filler: bytes = b"x") -> bytes:
    return (b"\xff" * 6 + b"\x02\0\0\0\0\x09" + b"\x08\0").ljust(n_bytes, filler)


@dataclass
class Rig:
    """A board with one network card, its driver, and the one peer of its network."""

    ram: TestRam
    board: Board
    port: TestPort
    driver: TestDriver
    rx: TestRing
    tx: TestRing
    sent: list[bytes]
    peer: PeerPort
    switch: Switch

    @property
    def card(self) -> VirtioNet:
        device = self.driver.function.device
        assert isinstance(device, VirtioNet)
        return device

    async def ready(self, features: int | None = None) -> None:
        assert await self.driver.negotiate(features)
        await self.driver.set_queue(self.rx, RECEIVE_QUEUE)
        await self.driver.set_queue(self.tx, TRANSMIT_QUEUE)
        await self.driver.go()

    async def give_buffers(self, n_bytes: int, count: int) -> None:
        """`count` receive buffers of `n_bytes`, one behind the other."""
        first = self.rx.avail_idx
        for n in range(first, first + count):
            self.rx.put_chain([(RX_DATA + n * n_bytes, n_bytes, True)], first=n % SIZE)
        await self.driver.kick(RECEIVE_QUEUE)

    async def arrive(self, *frames: bytes) -> None:
        """Frames come from the peer."""
        self.switch.from_peer(list(frames), self.peer)
        await self.board.drained()

    async def transmit(self, packet: bytes) -> None:
        self.ram.bytes[TX_DATA : TX_DATA + len(packet)] = packet
        self.tx.put_chain([(TX_DATA, len(packet), False)], first=self.tx.avail_idx % SIZE)
        await self.driver.kick(TRANSMIT_QUEUE)

    def buffer(self, number: int, n_bytes: int) -> bytes:
        at = RX_DATA + number * n_bytes
        return bytes(self.ram.bytes[at : at + n_bytes])


MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    async with trio.open_nursery() as nursery:

        async def make(features: int | None = None, *, go: bool = True, mtu: int = MTU) -> Rig:
            # A network keeps wall time; here each kick is to be served before it returns.
            entry = board_entry(
                [],
                [DeviceEntry(kind="virtio-net", network="lan", mac=MAC, mtu=mtu)],
                memory_bytes=64 * PAGE_BYTES,
                time="instructions",
            )
            ram, port, switch, sent = TestRam(entry.memory_bytes), TestPort(), Switch(mtu), list[bytes]()
            peer = switch.connect("vm2/qemu", lambda frames: sent.extend(frames))
            board = Board(entry, ram.accessor, {}, port, networks={"lan": switch}, assign_bars=True)
            nursery.start_soon(board.run)
            driver = TestDriver(board, board.functions[0])
            rx, tx = (TestRing.at(ram.bytes, SIZE, base) for base in (RX_RING, TX_RING))
            rig = Rig(ram, board, port, driver, rx, tx, sent, peer, switch)
            if go:
                await rig.ready(features)
            return rig

        yield make
        nursery.cancel_scope.cancel()


async def test_configuration_tells_address_link_and_mtu(make_rig: MakeRig) -> None:
    driver = (await make_rig(mtu=1400)).driver

    assert driver.config(NetConfig.MAC, 4) | driver.config(NetConfig.MAC + 4, 2) << 32 == 0x01_00_00_00_00_02
    assert driver.config(NetConfig.STATUS, 2) == 1
    assert driver.config(NetConfig.MTU, 2) == 1400
    features = await driver.features()
    assert all(has_feature(features, bit) for bit in (NetFeature.MAC, NetFeature.STATUS, NetFeature.MRG_RXBUF))
    assert not any(has_feature(features, bit) for bit in (NetFeature.CSUM, NetFeature.GUEST_CSUM, NetFeature.CTRL_VQ))


async def test_a_transmitted_packet_reaches_the_peer_without_its_header(make_rig: MakeRig) -> None:
    rig = await make_rig()

    await rig.transmit(HEADER + frame(MTU + 14))
    await rig.transmit(HEADER + frame(60))

    assert rig.sent == [frame(MTU + 14), frame(60)]
    assert rig.tx.take_used() == [(0, 0), (1, 0)]
    assert rig.card.traffic.sent_frames == 2


async def test_header_and_frame_may_be_cut_anywhere(make_rig: MakeRig) -> None:
    rig = await make_rig()
    packet = HEADER + frame(100)
    rig.ram.bytes[TX_DATA : TX_DATA + len(packet)] = packet

    rig.tx.put_chain([(TX_DATA, 5, False), (TX_DATA + 5, 20, False), (TX_DATA + 25, 87, False)])
    await rig.driver.kick(TRANSMIT_QUEUE)

    assert rig.sent == [frame(100)]


async def test_a_received_frame_lies_behind_a_header_of_one_buffer(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.give_buffers(2048, 2)
    assert rig.rx.take_used() == []

    await rig.arrive(frame(60), frame(MTU + 14, b"y"))

    assert rig.rx.take_used() == [(0, 72), (1, MTU + 26)]
    assert rig.buffer(0, 2048)[:72] == NET_HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(60)
    assert rig.buffer(1, 2048)[: MTU + 26] == NET_HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(MTU + 14, b"y")


async def test_a_long_frame_is_spread_over_mergeable_buffers(make_rig: MakeRig) -> None:
    rig = await make_rig(mtu=9000)
    await rig.give_buffers(2048, 8)

    await rig.arrive(frame(9014, b"z"))

    assert rig.rx.take_used() == [(0, 2048), (1, 2048), (2, 2048), (3, 2048), (4, 9026 - 4 * 2048)]
    packet = b"".join(rig.buffer(n, 2048) for n in range(5))[:9026]
    assert packet == NET_HEADER.pack(0, 0, 0, 0, 0, 0, 5) + frame(9014, b"z")


async def test_without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped_and_the_next_one_comes(
    make_rig: MakeRig,
) -> None:
    rig = await make_rig(BASIC)
    await rig.give_buffers(100, 2)

    await rig.arrive(frame(200), frame(60))

    assert rig.rx.take_used() == [(0, 72)]
    assert rig.card.traffic.dropped == {Drop.NO_BUFFER: 1}


async def test_too_few_mergeable_buffers_stay_for_the_next_frame(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.give_buffers(100, 2)

    await rig.arrive(frame(500), frame(150))

    assert rig.rx.take_used() == [(0, 100), (1, 62)]
    assert rig.card.traffic.dropped == {Drop.NO_BUFFER: 1}


async def test_frames_wait_for_buffers_and_beyond_that_are_dropped(make_rig: MakeRig) -> None:
    rig = await make_rig()
    with trio.fail_after(5):
        await rig.arrive(*[frame(60, bytes([n % 251])) for n in range(WAITING_FRAMES + 7)])
        assert rig.card.traffic.dropped == {Drop.NO_BUFFER: 7}
        for _ in range(WAITING_FRAMES // SIZE):
            await rig.give_buffers(128, SIZE)
            assert len(rig.rx.take_used()) == SIZE

    assert rig.card.traffic.received_frames == WAITING_FRAMES


async def test_before_the_driver_is_ready_and_after_a_reset_nothing_waits(make_rig: MakeRig) -> None:
    rig = await make_rig(go=False)
    await rig.arrive(frame())
    await rig.ready()
    await rig.arrive(frame(), frame())

    await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
    rig.rx = TestRing.at(rig.ram.bytes, SIZE, RX_RING)
    rig.ram.bytes[RX_RING : RX_RING + 0x2000] = bytes(0x2000)
    await rig.ready()
    await rig.give_buffers(2048, 1)

    assert rig.rx.take_used() == []
    assert rig.card.traffic.dropped == {Drop.NO_BUFFER: 3}


@pytest.mark.parametrize(
    ("packet", "drop"),
    [
        (HEADER + frame()[:13], Drop.MALFORMED),
        (HEADER, Drop.MALFORMED),
        (HEADER + frame(MTU + 15), Drop.MALFORMED),
        (HEADER + frame(60000), Drop.MALFORMED),
        (HEADER + b"\xff" * 60, Drop.MALFORMED),
        (NET_HEADER.pack(1, 0, 0, 0, 34, 16, 0) + frame(), Drop.OFFLOAD),
        (NET_HEADER.pack(0, 1, 54, 1448, 0, 0, 0) + frame(), Drop.OFFLOAD),
    ],
)
async def test_what_is_no_frame_is_dropped_counted_and_given_back(make_rig: MakeRig, packet: bytes, drop: Drop) -> None:
    rig = await make_rig()

    await rig.transmit(packet)
    await rig.transmit(HEADER + frame())

    assert rig.tx.take_used() == [(0, 0), (1, 0)]
    assert rig.sent == [frame()]
    assert rig.card.traffic.dropped == {drop: 1}
    assert not rig.port.faults


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(14, 1514), min_size=1, max_size=6),
    buffers=st.lists(st.integers(NET_HEADER_BYTES, 900), min_size=1, max_size=SIZE),
)
async def test_frames_come_whole_and_in_order_whatever_the_buffers_are(
    make_rig: MakeRig, sizes: list[int], buffers: list[int]
) -> None:
    rig = await make_rig()
    for n, n_bytes in enumerate(buffers):
        rig.rx.put_chain([(RX_DATA + n * 1024, n_bytes, True)], first=n)
    await rig.driver.kick(RECEIVE_QUEUE)
    frames = [frame(n_bytes, bytes([n])) for n, n_bytes in enumerate(sizes)]

    await rig.arrive(*frames)

    used = iter(rig.rx.take_used())
    came = []
    for head, n_bytes in used:
        packet = rig.buffer(head, 1024)[:n_bytes]
        for _ in range(NET_HEADER.unpack_from(packet)[-1] - 1):
            head, n_bytes = next(used)
            packet += rig.buffer(head, 1024)[:n_bytes]
        came.append(packet[NET_HEADER_BYTES:])
    rest = iter(frames)
    assert all(one in rest for one in came)
    if sum(buffers) >= sum(sizes) + len(sizes) * (NET_HEADER_BYTES + 900):
        assert came == frames
    assert len(came) + rig.card.traffic.dropped[Drop.NO_BUFFER] + len(rig.card._waiting) == len(frames)


HOSTILE = {
    "a packet shorter than its header": (TRANSMIT_QUEUE, (TX_DATA, NET_HEADER_BYTES - 1, False), "no packet"),
    "a packet outside memory": (TRANSMIT_QUEUE, (1 << 40, 64, False), "outside"),
    "a receive buffer without room for a header": (RECEIVE_QUEUE, (RX_DATA, 5, True), "no receive buffer"),
    "a receive buffer that is not writable": (RECEIVE_QUEUE, (RX_DATA, 2048, False), "no receive buffer"),
    "a receive buffer outside memory": (RECEIVE_QUEUE, (1 << 40, 2048, True), "outside"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_driver_needs_a_reset_and_then_goes_on(make_rig: MakeRig, name: str) -> None:
    index, buffer, reason = HOSTILE[name]
    rig = await make_rig()
    ring = rig.rx if index == RECEIVE_QUEUE else rig.tx
    ring.put_chain([buffer])
    await rig.driver.kick(index)
    await rig.arrive(frame())

    assert rig.driver.load(CommonCfg.DEVICE_STATUS) & DeviceStatus.NEEDS_RESET
    (fault,) = rig.port.faults
    assert fault[0] == f"vm1/net-{MAC}"
    assert reason in fault[1] or "memory" in fault[1]
    await rig.arrive(frame())

    rig.ram.bytes[RX_RING : RX_RING + 0x6000] = bytes(0x6000)
    rig.rx, rig.tx = (TestRing.at(rig.ram.bytes, SIZE, base) for base in (RX_RING, TX_RING))
    await rig.ready()
    await rig.transmit(HEADER + frame())
    assert rig.sent == [frame()]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_whatever_the_rings_hold_the_device_stays_alive(make_rig: MakeRig, data: st.DataObject) -> None:
    rig = await make_rig()
    descriptors = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, RX_DATA, RX_RING, 1 << 40, rig.ram.size_bytes - 1]),
                st.sampled_from([0, 1, 12, 2048, 70000, 0xFFFFFFFF]),
                st.integers(0, 7),
                st.integers(0, SIZE),
            ),
            max_size=8,
        )
    )
    for ring in (rig.rx, rig.tx):
        ring.put_descriptors(descriptors)
        for head in data.draw(st.lists(st.integers(0, SIZE + 1), max_size=4)):
            ring.offer(head)
    with trio.fail_after(5):
        await rig.driver.kick(RECEIVE_QUEUE)
        await rig.driver.kick(TRANSMIT_QUEUE)
        await rig.arrive(frame(), frame(MTU + 14))
        await rig.driver.store(CommonCfg.DEVICE_STATUS, 0)
        assert rig.driver.load(CommonCfg.DEVICE_STATUS) == 0


async def test_s5_buffers_that_never_suffice_do_not_keep_the_process_from_its_other_work(make_rig: MakeRig) -> None:
    """All buffers are looked at for each frame, and each may be a table of descriptors without room."""
    rig = await make_rig(go=False, mtu=9000)
    table = TX_DATA
    for n in range(QUEUE_SIZE):
        flags, following = (DescFlag.WRITE | DescFlag.NEXT, n + 1) if n + 1 < QUEUE_SIZE else (DescFlag.WRITE, 0)
        entry = (RX_DATA, NET_HEADER_BYTES if n == 0 else 0, flags, following)
        rig.ram.bytes[table + n * DESC_BYTES : table + (n + 1) * DESC_BYTES] = DESC.pack(*entry)
    rig.rx = TestRing.at(rig.ram.bytes, QUEUE_SIZE, RX_RING)
    await rig.ready()
    for head in range(QUEUE_SIZE):
        rig.rx.put_descriptors([(table, QUEUE_SIZE * DESC_BYTES, DescFlag.INDIRECT, 0)], head)
        rig.rx.offer(head)
    turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other_work)
        await rig.arrive(frame(9000))
        await rig.arrive(frame(9000))
        nursery.cancel_scope.cancel()

    assert rig.card.traffic.dropped == {Drop.NO_BUFFER: 2}
    assert turns >= 2 * QUEUE_SIZE // CHAINS_BETWEEN_CHECKPOINTS
