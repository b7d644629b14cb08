"""Floor of the null hypercalls: the same processes, sockets and frames, and nothing done with them.

    python -m tests.bench.floors.call_floor direct DIRECTORY     client <-> echo, CURVE
    python -m tests.bench.floors.call_floor relayed DIRECTORY    client <-> relay <-> echo, CURVE
    python -m tests.bench.floors.call_floor pingpong DIRECTORY   client <-> echo, both blocking, no CURVE

The client blocks; echo and relay are native trio on the socket's descriptor. Each line `N` on standard input makes N
calls and prints their nanoseconds as a JSON list; the end of input ends all processes.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable

import msgspec
import trio
import zmq

Keys = tuple[bytes, bytes]
_HIGH_WATER_MARK = 256
_MAX_MESSAGE_BYTES = 128 * 1024
_CALL = msgspec.msgpack.encode((1, 0, 0x68, 4711, 1 << 48 | 4711, [0, 255]))
_REPLY = msgspec.msgpack.encode((1, 1, 0x68, 4711, 1 << 48 | 4711, [0]))
_REFLECTED = msgspec.msgpack.encode((1, 0, 0x68, 1 << 62, 1 << 48 | 4711, [1, 0, 255]))
_RETURN = msgspec.msgpack.encode((1, 0, 0xF11C, 0, 1 << 48 | 4711, [0, 1 << 62]))


def dealer(context: zmq.Context[zmq.Socket[bytes]], keys: Keys | None) -> zmq.Socket[bytes]:
    """A socket with the options of a link."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys
    return socket


def bound(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: Keys | None) -> zmq.Socket[bytes]:
    """The end that binds."""
    socket = dealer(context, keys)
    if keys is not None:
        socket.curve_server = True
    socket.bind(endpoint)
    return socket


def connected(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: Keys | None, server: bytes | None
) -> zmq.Socket[bytes]:
    """The end that connects."""
    socket = dealer(context, keys)
    if server is not None:
        socket.curve_serverkey = server
    socket.connect(endpoint)
    return socket


async def serve(source: zmq.Socket[bytes], answer: Callable[[bytes], None]) -> None:
    """Hand every message of `source` to `answer`, waiting on its descriptor."""
    fd: int = source.FD
    while True:
        try:
            frame = source.recv(zmq.NOBLOCK)
        except zmq.Again:
            await trio.lowlevel.wait_readable(fd)
            continue
        answer(frame)


def trio_echo(endpoint: str, keys: Keys, reply: bytes) -> None:
    """kvm's place: answers each message with `reply`."""
    socket = bound(zmq.Context(), endpoint, keys)
    trio.run(serve, socket, lambda _frame: socket.send(reply, zmq.NOBLOCK))


def trio_relay(endpoint: str, keys: Keys, echo_endpoint: str, client_keys: Keys, echo_key: bytes) -> None:
    """The ultravisor's place: passes calls on, and answers back."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guest = bound(context, endpoint, keys)
    kvm = connected(context, echo_endpoint, client_keys, echo_key)

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, guest, lambda _frame: poked(kvm, guest, _REFLECTED))
            nursery.start_soon(serve, kvm, lambda _frame: poked(guest, kvm, _REPLY))

    trio.run(both)


def poked(target: zmq.Socket[bytes], _source: zmq.Socket[bytes], frame: bytes) -> None:
    """Send `frame`. With one call open at a time no edge of the target's descriptor is lost by it."""
    target.send(frame, zmq.NOBLOCK)


def blocking_echo(endpoint: str) -> None:
    """The other half of a ping-pong."""
    socket = bound(zmq.Context(), endpoint, None)
    while True:
        socket.recv()
        socket.send(_REPLY)


def time_calls(socket: zmq.Socket[bytes], n_calls: int) -> list[int]:
    """Nanoseconds of each of `n_calls` calls, back to back."""
    times_ns = []
    before_ns = time.perf_counter_ns()
    for _ in range(n_calls):
        socket.send(_CALL)
        socket.recv()
        now_ns = time.perf_counter_ns()
        times_ns.append(now_ns - before_ns)
        before_ns = now_ns
    return times_ns


def start(target: Callable[..., None], *arguments: object) -> None:
    """One process, gone with this one."""
    multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True).start()


def set_up(topology: str, directory: str) -> zmq.Socket[bytes]:
    """Start the other processes of `topology`; the client's socket."""
    first, second = f"ipc://{directory}/{topology}-1", f"ipc://{directory}/{topology}-2"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    if topology == "pingpong":
        start(blocking_echo, first)
        return connected(context, first, None, None)
    client, echo, relay, relay_client = (zmq.curve_keypair() for _ in range(4))
    if topology == "direct":
        start(trio_echo, first, echo, _REPLY)
        return connected(context, first, client, echo[0])
    start(trio_echo, second, echo, _RETURN)
    start(trio_relay, first, relay, second, relay_client, echo[0])
    return connected(context, first, client, relay[0])


def main() -> None:
    """See the module."""
    topology, directory = sys.argv[1:]
    socket = set_up(topology, directory)
    time_calls(socket, 1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(time_calls(socket, int(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
