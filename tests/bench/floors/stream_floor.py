"""Floor of migrations: the same bytes through a stream socket to another process, as they are or sealed by AES-GCM.

The sender takes records of 1 MiB out of touched memory; the receiver copies each into touched memory of its own and
answers when all have come. Sealed, a record is encrypted by the one and decrypted by the other.

    python -m tests.bench.floors.stream_floor MIB sealed|plain DIRECTORY
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import time

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

RECORD_BYTES = 1 << 20
TAG_BYTES = 16
KEY = bytes(16)


def main() -> None:
    """See the module; the directory is not needed."""
    n_records, sealed = int(sys.argv[1]), sys.argv[2] == "sealed"
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        receive(theirs, n_records, sealed)
        os._exit(0)
    theirs.close()
    memory = touched(n_records * RECORD_BYTES)
    for line in sys.stdin:
        times_ns = [send(ours, memory, n_records, sealed) for _ in range(int(line))]
        sys.stdout.write(json.dumps(times_ns) + "\n")
        sys.stdout.flush()


def send(connection: socket.socket, memory: mmap.mmap, n_records: int, sealed: bool) -> int:
    """Nanoseconds until the receiver has all."""
    aead = AESGCM(KEY)
    started = time.perf_counter_ns()
    for number in range(n_records):
        record: bytes = memory[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        connection.sendall(aead.encrypt(number.to_bytes(12, "big"), record, None) if sealed else record)
    connection.recv(1)
    return time.perf_counter_ns() - started


def receive(connection: socket.socket, n_records: int, sealed: bool) -> None:
    """Take run after run, until the sender is gone."""
    aead = AESGCM(KEY)
    memory = touched(n_records * RECORD_BYTES)
    buffer = bytearray(RECORD_BYTES + (TAG_BYTES if sealed else 0))
    while True:
        for number in range(n_records):
            rest = memoryview(buffer)
            while rest:
                n_bytes = connection.recv_into(rest)
                if not n_bytes:
                    return
                rest = rest[n_bytes:]
            record = aead.decrypt(number.to_bytes(12, "big"), buffer, None) if sealed else buffer
            memory[number * RECORD_BYTES : (number + 1) * RECORD_BYTES] = record
        connection.sendall(b"k")


def touched(n_bytes: int) -> mmap.mmap:
    """Memory that holds something everywhere."""
    memory = mmap.mmap(-1, n_bytes)
    block = os.urandom(RECORD_BYTES)
    for start in range(0, n_bytes, RECORD_BYTES):
        memory[start : start + RECORD_BYTES] = block
    return memory


if __name__ == "__main__":
    main()
