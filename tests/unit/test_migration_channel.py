"""The bulk channel between two qemus: what comes out is what went in, in order, or nothing (S5)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedMessage
from services.qemu.migration.channel import KEY_BYTES, BulkChannel, ChannelLost, End
from services.qemu.migration.stream import HEADER, MAX_PAYLOAD_BYTES, FrameKind

KEY = bytes(range(KEY_BYTES))
LENGTH_BYTES = 4


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


async def test_frames_arrive_in_order_and_whole_in_both_directions(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    source, destination = BulkChannel(sockets[0], KEY, End.SOURCE), BulkChannel(sockets[1], KEY, End.DESTINATION)
    payloads = [b"", b"hello", os.urandom(MAX_PAYLOAD_BYTES)]

    async def send() -> None:
        await source.send(FrameKind.HELLO, b"h")
        for payload in payloads:
            await source.send(FrameKind.PAGES, payload)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        came = [bytes((await destination.receive()).payload) for _ in range(1 + len(payloads))]
    await destination.send(FrameKind.HELLO, b"back")

    assert came[1:] == payloads
    assert bytes((await source.receive()).payload) == b"back"


async def test_records_travel_as_their_ultravisor_sealed_them_among_sealed_frames(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    records = [os.urandom(MAX_PAYLOAD_BYTES), b"", b"short"]
    source = BulkChannel(sockets[0], KEY, End.SOURCE)
    tap, far = socket.socketpair()
    destination = BulkChannel(far, KEY, End.DESTINATION)
    seen = bytearray()

    async def send() -> None:
        await source.send(FrameKind.HELLO, b"h")
        for record in records:
            await source.send(FrameKind.RECORD, record[:3], memoryview(record)[3:])
        await source.send(FrameKind.ROUND_END, b"in a chunk")
        source.close()

    def carry() -> None:
        with tap:
            while data := sockets[1].recv(1 << 20):
                seen.extend(data)
                tap.sendall(data)

    sockets[1].setblocking(True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(trio.to_thread.run_sync, carry)
        frames = []
        for _ in range(len(records) + 2):
            frame = await destination.receive()
            frames.append((frame.kind, bytes(frame.payload)))
    destination.close()

    assert frames[1:] == [*((FrameKind.RECORD, record) for record in records), (FrameKind.ROUND_END, b"in a chunk")]
    assert len(seen) == source.sent_bytes
    assert records[0] in seen
    assert b"in a chunk" not in seen


async def test_a_record_that_is_longer_than_one_may_be_is_not_waited_for(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hostile qemu says it, who has the keys."""
    source, destination = BulkChannel(sockets[0], KEY, End.SOURCE), BulkChannel(sockets[1], KEY, End.DESTINATION)
    await source.send(FrameKind.HELLO, b"h")
    await destination.receive()
    too_long = HEADER.pack(FrameKind.RECORD, 0, 0, MAX_PAYLOAD_BYTES + 1)
    monkeypatch.setattr("services.qemu.migration.channel.header_of", lambda kind, n_bytes: too_long)
    await source.send(FrameKind.RECORD, b"begins")

    with pytest.raises(MalformedMessage, match="a frame of 1179649 bytes"):
        await destination.receive()


async def test_the_end_of_a_peer_is_told_as_such(sockets: tuple[socket.socket, socket.socket]) -> None:
    source, destination = BulkChannel(sockets[0], KEY, End.SOURCE), BulkChannel(sockets[1], KEY, End.DESTINATION)
    destination.close()

    with pytest.raises(ChannelLost):
        await source.receive()
    with pytest.raises(ChannelLost):
        for _ in range(100):
            await source.send(FrameKind.HELLO, bytes(100_000))


@pytest.mark.parametrize("key", [bytes(KEY_BYTES), KEY[::-1]])
async def test_another_key_opens_nothing(sockets: tuple[socket.socket, socket.socket], key: bytes) -> None:
    source, destination = BulkChannel(sockets[0], KEY, End.SOURCE), BulkChannel(sockets[1], key, End.DESTINATION)
    await source.send(FrameKind.HELLO, b"hello")

    with pytest.raises(MalformedMessage, match="not the next one"):
        await destination.receive()


async def test_what_went_out_does_not_come_back_in(sockets: tuple[socket.socket, socket.socket]) -> None:
    source = BulkChannel(sockets[0], KEY, End.SOURCE)
    await source.send(FrameKind.HELLO, b"hello")
    sockets[1].sendall(sockets[1].recv(1 << 16))

    with pytest.raises(MalformedMessage, match="not the next one"):
        await source.receive()


async def sealed(*payloads: bytes) -> list[bytes]:
    """The chunks of some frames, the first of which is a hello."""
    a, b = socket.socketpair()
    with a, b:
        channel = BulkChannel(a, KEY, End.SOURCE)
        chunks = []
        for number, payload in enumerate(payloads):
            n_bytes = await channel.send(FrameKind.PAGES if number else FrameKind.HELLO, payload)
            chunks.append(b.recv(n_bytes, socket.MSG_WAITALL))
        return chunks


async def received(raw: bytes, n_frames: int) -> list[bytes]:
    """The payloads that a destination takes out of these bytes."""
    a, b = socket.socketpair()
    with a, b:
        a.sendall(raw)
        a.shutdown(socket.SHUT_WR)
        channel = BulkChannel(b, KEY, End.DESTINATION)
        return [bytes((await channel.receive()).payload) for _ in range(n_frames)]


@given(st.data())
def test_altered_dropped_repeated_and_swapped_chunks_are_refused(data: st.DataObject) -> None:
    async def run() -> None:
        chunks = await sealed(b"hello", b"a" * 10, b"b" * 10, b"c" * 10)
        how = data.draw(st.sampled_from(["flip", "drop", "repeat", "swap"]))
        at = data.draw(st.integers(0, 2))
        if how == "flip":
            bit = data.draw(st.integers(LENGTH_BYTES * 8, len(chunks[at]) * 8 - 1))
            altered = bytearray(chunks[at])
            altered[bit // 8] ^= 1 << bit % 8
            chunks[at] = bytes(altered)
        elif how == "drop":
            del chunks[at]
        elif how == "repeat":
            chunks.insert(at, chunks[at])
        else:
            chunks[at], chunks[at + 1] = chunks[at + 1], chunks[at]
        with pytest.raises(MalformedMessage):
            await received(b"".join(chunks), 4)

    trio.run(run)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    async def run() -> None:
        with pytest.raises((MalformedMessage, ChannelLost)):
            await received(raw, 1)

    trio.run(run)
