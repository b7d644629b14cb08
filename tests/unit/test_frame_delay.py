"""Frames to a peer over a link with a shape: they come late, in order and in bounded batches, or are counted."""

from __future__ import annotations

from random import Random

import trio
import trio.testing

from protocol.messages import MAX_NET_FRAMES
from services.qemu.frame_delay import MAX_FLIGHT_BYTES, FrameDelay
from services.qemu.network import MAX_BATCH_BYTES, Drop, PeerPort
from services.qemu.shaping import Shaper
from shared.link_shape import PLAIN, LinkShape


class Wire:
    """What left for the peer, and when."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, list[bytes]]] = []
        self.port = PeerPort(self.offer)

    def offer(self, frames: list[bytes]) -> Drop | None:
        self.batches.append((trio.current_time(), frames))
        return None

    @property
    def frames(self) -> list[bytes]:
        return [frame for _, frames in self.batches for frame in frames]

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.port.put(frame, self.port)
        self.port.flush()


def delayed(nursery: trio.Nursery, shape: LinkShape, *wires: Wire) -> FrameDelay:
    delay = FrameDelay(Shaper(Random(1), shape), nursery)
    for wire in wires:
        wire.port.delay = delay
    return delay


async def test_frames_come_after_the_latency_together_and_in_order(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    lan, other = Wire(), Wire()
    delayed(nursery, LinkShape(latency_ms=50), lan, other)
    began = trio.current_time()

    lan.send(b"one", b"two")
    other.send(b"three")
    lan.send(b"four")
    assert not lan.batches
    await trio.sleep(0.049)
    assert not lan.batches
    await trio.sleep(0.01)

    assert lan.frames == [b"one", b"two", b"four"]
    assert other.frames == [b"three"]
    assert lan.port.traffic.sent_frames == 3
    assert abs(lan.batches[0][0] - began - 0.05) < 1e-6


async def test_a_cut_loses_what_is_on_its_way_and_all_that_follows_until_it_is_over(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    wire = Wire()
    delay = delayed(nursery, LinkShape(latency_ms=50), wire)

    wire.send(b"one")
    delay.set_shape(LinkShape(down=True))
    wire.send(b"two")
    await trio.sleep(1)
    assert wire.port.traffic.dropped == {Drop.LINK: 2}
    delay.set_shape(PLAIN)
    wire.send(b"three")

    assert wire.frames == [b"three"]


async def test_what_is_sent_over_a_link_that_was_mended_comes_behind_what_is_on_its_way(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    wire = Wire()
    delay = delayed(nursery, LinkShape(latency_ms=50), wire)

    wire.send(b"one")
    delay.set_shape(PLAIN)
    wire.send(b"two")
    await trio.sleep(0.06)
    wire.send(b"three")

    assert wire.frames == [b"one", b"two", b"three"]


async def test_batches_are_bounded_and_so_is_what_is_on_its_way(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    wire = Wire()
    delayed(nursery, LinkShape(latency_ms=1000), wire)
    sent = [n.to_bytes(4, "big").ljust(9000, b"x") for n in range(600)]

    wire.send(*sent)
    await trio.sleep(1.1)

    n_kept = -(-MAX_FLIGHT_BYTES // 9000)
    assert wire.frames == sent[:n_kept]
    assert wire.port.traffic.dropped == {Drop.LINK: 600 - n_kept}
    assert all(sum(map(len, frames)) <= MAX_BATCH_BYTES for _, frames in wire.batches)
    wire.send(*[b"y" * 14] * 200)
    await trio.sleep(1.1)
    assert len(wire.frames) == n_kept + 200
    assert max(len(frames) for _, frames in wire.batches) == MAX_NET_FRAMES
