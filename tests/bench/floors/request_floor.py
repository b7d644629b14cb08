"""Floor of one disk request: its bare hops, and nothing done on the way.

    python -m tests.bench.floors.request_floor FILE DIRECTORY

The client (a guest's place) calls the relay (kvm's), which answers it and sends an event to the device (qemu's): CURVE
sockets, the relay and the device native trio. The device reads 4 KiB at a random place of FILE straight into memory
that it shares with the client, and moves a word there; the client, once it has its answer, looks at that word. Each
line `N` on standard input makes N requests and prints their nanoseconds as a JSON list; the end of input ends all.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path

import trio
import zmq

from tests.bench.floors.call_floor import Keys, bound, connected, serve, start

BLOCK_BYTES = 4096
_CALL = bytes(40)
_EVENT = bytes(32)
_REPLY = bytes(16)
_WORD = BLOCK_BYTES
_MULTIPLIER, _INCREMENT, _MODULUS = 6364136223846793005, 1442695040888963407, 1 << 64


def shared(path: str) -> mmap.mmap:
    """The memory of client and device: a block, then the word that the device moves."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, 2 * BLOCK_BYTES)
        return mmap.mmap(fd, 2 * BLOCK_BYTES)
    finally:
        os.close(fd)


def relay(endpoint: str, keys: Keys, device_endpoint: str, client_keys: Keys, device_key: bytes) -> None:
    """kvm's place."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guest = bound(context, endpoint, keys)
    device = connected(context, device_endpoint, client_keys, device_key)

    def answer(_frame: bytes) -> None:
        device.send(_EVENT, zmq.NOBLOCK)
        guest.send(_REPLY, zmq.NOBLOCK)

    trio.run(serve, guest, answer)


def device(endpoint: str, keys: Keys, file: str, memory: str) -> None:
    """qemu's place."""
    socket = bound(zmq.Context(), endpoint, keys)
    fd, area = os.open(file, os.O_RDONLY), memoryview(shared(memory))
    n_blocks = os.fstat(fd).st_size // BLOCK_BYTES
    words, block = area[_WORD:].cast("Q"), area[:BLOCK_BYTES]
    random = 1

    def serve_request(_frame: bytes) -> None:
        nonlocal random
        random = (random * _MULTIPLIER + _INCREMENT) % _MODULUS
        os.preadv(fd, [block], (random >> 33) % n_blocks * BLOCK_BYTES)
        words[0] += 1

    trio.run(serve, socket, serve_request)


def time_requests(socket: zmq.Socket[bytes], words: memoryview, n_requests: int) -> list[int]:
    """Nanoseconds of each of `n_requests` requests, one after the other."""
    times_ns = []
    for _ in range(n_requests):
        before, before_ns = words[0], time.perf_counter_ns()
        socket.send(_CALL)
        socket.recv()
        while words[0] == before:
            pass
        times_ns.append(time.perf_counter_ns() - before_ns)
    return times_ns


def main() -> None:
    """See the module."""
    file, directory = sys.argv[1:]
    first, second = f"ipc://{directory}/request-1", f"ipc://{directory}/request-2"
    memory = str(Path(directory) / "memory")
    client, relay_keys, relay_client, device_keys = (zmq.curve_keypair() for _ in range(4))
    start(device, second, device_keys, file, memory)
    start(relay, first, relay_keys, second, relay_client, device_keys[0])
    socket = connected(zmq.Context(), first, client, relay_keys[0])
    words = memoryview(shared(memory))[_WORD:].cast("Q")
    time_requests(socket, words, 1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(time_requests(socket, words, int(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
