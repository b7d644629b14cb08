"""The launcher's port for editors: what ends the relay between an editor and debugpy."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import trio

from deploy.dap_port import dap_frame, relay


@dataclass(frozen=True, slots=True)
class Relayed:
    """A relay under way, from outside; `left` is the launcher's word that debugpy has let its process go."""

    editor: trio.SocketStream
    process: trio.SocketStream
    left: trio.Event
    ended: trio.Event


def stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a stream."""
    ours, theirs = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    return trio.SocketStream(ours), trio.SocketStream(theirs)


@pytest.fixture
async def relayed() -> AsyncIterator[Relayed]:
    """A relay; what it raises fails the test."""
    editor, editors_end = stream_pair()
    debugpy, process = stream_pair()
    made = Relayed(editor, process, trio.Event(), trio.Event())

    async def run() -> None:
        async with editors_end, debugpy:
            await relay(editors_end, debugpy, made.left)
        made.ended.set()

    async with editor, process, trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield made
        nursery.cancel_scope.cancel()


async def test_the_end_of_debugpy_ends_the_relay_and_nothing_else(relayed: Relayed) -> None:
    """A process that is killed takes neither the launcher nor other processes with it."""
    await relayed.editor.send_all(dap_frame({"command": "threads"}))
    assert b"threads" in await relayed.process.receive_some(4096)

    await relayed.process.aclose()

    with trio.fail_after(5):
        await relayed.ended.wait()
        assert await relayed.editor.receive_some(1) == b""
