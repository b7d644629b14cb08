"""The socket of a bulk channel over a link with a shape: late, never lost, and never more kept than its window."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from random import Random

import pytest
import trio
import trio.testing

from services.qemu.migration.channel import KEY_BYTES, BulkChannel, ChannelLost, End
from services.qemu.migration.shaped_socket import LINGER_SECONDS, ShapedSocket
from services.qemu.migration.stream import FrameKind
from services.qemu.shaping import MAX_WINDOW_BYTES, Shaper
from shared.link_shape import PLAIN, LinkShape

KEY = bytes(KEY_BYTES)
DOWN = LinkShape(down=True)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def shape(end: ShapedSocket | BulkChannel, shape: LinkShape, nursery: trio.Nursery) -> None:
    end.set_shape(shape, Shaper(Random(1)), nursery)


async def send_all(end: ShapedSocket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[await end.send(rest) :]


async def receive(end: ShapedSocket, n_bytes: int) -> bytes:
    data = bytearray(n_bytes)
    rest = memoryview(data)
    while rest:
        n_received = await end.recv_into(rest)
        assert n_received, "closed"
        rest = rest[n_received:]
    return bytes(data)


async def passes(source: ShapedSocket, destination: ShapedSocket, data: bytes) -> float:
    """How long it takes until all has arrived."""
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all, source, data)
        assert await receive(destination, len(data)) == data
    return trio.current_time() - began


async def test_many_segments_are_on_their_way_at_once(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source, destination = ShapedSocket(ends[0]), ShapedSocket(ends[1])
    shape(source, LinkShape(latency_ms=100), nursery)

    seconds = await passes(source, destination, os.urandom(MAX_WINDOW_BYTES))

    assert 0.1 <= seconds < 0.4


async def test_a_stream_takes_as_long_as_its_bandwidth_says(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source, destination = ShapedSocket(ends[0]), ShapedSocket(ends[1])
    shape(source, LinkShape(bandwidth_bytes_per_second=8 << 20, latency_ms=10), nursery)

    seconds = await passes(source, destination, os.urandom(4 << 20))

    assert 0.5 <= seconds < 0.8


async def test_nothing_passes_a_cut_and_all_of_it_comes_afterwards(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source, destination = ShapedSocket(ends[0]), ShapedSocket(ends[1])
    shape(source, LinkShape(bandwidth_bytes_per_second=1 << 20), nursery)
    data = os.urandom(1 << 19)
    began = trio.current_time()

    async def cut() -> None:
        await trio.sleep(0.1)
        shape(source, DOWN, nursery)
        await trio.sleep(0.3)
        shape(source, PLAIN, nursery)

    nursery.start_soon(cut)
    await passes(source, destination, data)

    assert 0.4 <= trio.current_time() - began < 0.7


async def test_what_is_kept_is_bounded_while_nothing_passes(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source = ShapedSocket(ends[0])
    shape(source, DOWN, nursery)
    n_taken = 0

    with trio.move_on_after(0.2):
        while True:
            n_taken += await source.send(memoryview(bytes(1 << 20)))

    assert n_taken <= MAX_WINDOW_BYTES
    source.close()
    with pytest.raises(trio.ClosedResourceError):
        await source.send(memoryview(b"x"))


async def test_closing_wakes_who_waits_for_room(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source = ShapedSocket(ends[0])
    shape(source, DOWN, nursery)

    async def fill() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await send_all(source, bytes(2 * MAX_WINDOW_BYTES))

    async with trio.open_nursery() as filling:
        filling.start_soon(fill)
        await trio.sleep(0.05)
        source.close()
    source.close()
    nursery.cancel_scope.cancel()


async def test_what_was_sent_before_closing_still_arrives(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source, destination = ShapedSocket(ends[0]), ShapedSocket(ends[1])
    shape(source, LinkShape(latency_ms=50), nursery)
    await send_all(source, b"last word")
    source.close()

    assert await receive(destination, 9) == b"last word"
    assert await destination.recv_into(memoryview(bytearray(1))) == 0


async def test_a_socket_that_is_closed_while_nothing_passes_is_gone_soon(
    ends: tuple[socket.socket, socket.socket],
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.qemu.migration.shaped_socket.LINGER_SECONDS", 0.1)
    assert LINGER_SECONDS > 0.1
    source, destination = ShapedSocket(ends[0]), ShapedSocket(ends[1])
    shape(source, DOWN, nursery)
    await send_all(source, b"never")
    source.close()

    with trio.fail_after(1):
        assert await destination.recv_into(memoryview(bytearray(1))) == 0


async def test_a_channel_whose_peer_is_gone_is_lost(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source, destination = BulkChannel(ends[0], KEY, End.SOURCE), BulkChannel(ends[1], KEY, End.DESTINATION)
    shape(source, LinkShape(latency_ms=1), nursery)
    await source.send(FrameKind.HELLO, b"h")
    assert bytes((await destination.receive()).payload) == b"h"
    destination.close()

    with pytest.raises(ChannelLost), trio.fail_after(5):
        while True:
            await source.send(FrameKind.HELLO, bytes(100_000))
            await trio.sleep(0.01)


async def test_a_channel_gets_a_shape_in_the_middle_and_loses_it_again(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    source, destination = BulkChannel(ends[0], KEY, End.SOURCE), BulkChannel(ends[1], KEY, End.DESTINATION)
    shapes = [None, LinkShape(latency_ms=20, loss=0.1), PLAIN, DOWN, LinkShape(bandwidth_bytes_per_second=1 << 20)]

    async def send() -> None:
        for number, wanted in enumerate(shapes):
            if wanted is not None:
                shape(source, wanted, nursery)
            await source.send(FrameKind.PAGES if number else FrameKind.HELLO, bytes([number]) * 1000)

    await send()
    for number in range(len(shapes)):
        assert bytes((await destination.receive()).payload) == bytes([number]) * 1000
