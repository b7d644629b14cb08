"""A ZeroMQ socket under trio: nothing that libzmq has to say is slept over."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing
import zmq

from services.runtime.channel import ZmqChannel


async def test_what_was_sent_before_the_peer_connected_goes_out_as_soon_as_it_has(tmp_path: Path) -> None:
    """The edge of the connection may be consumed by the same look that finds the socket not yet writable."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    longest = 0.0

    for attempt in range(30):
        bound, connecting = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        bound.bind(f"ipc://{tmp_path}/{attempt}")
        upper, lower = ZmqChannel(bound), ZmqChannel(connecting)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upper.receive)
            await trio.testing.wait_all_tasks_blocked()
            upper.send([b"early"])
            start = trio.current_time()
            connecting.connect(f"ipc://{tmp_path}/{attempt}")
            assert await lower.receive() == [b"early"]
            longest = max(longest, trio.current_time() - start)
            nursery.cancel_scope.cancel()
        upper.close()
        lower.close()

    context.term()
    assert longest < 0.5
