"""What a launch server answers to orders that it cannot follow."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from deploy.launch_forks import LaunchForks
from deploy.launch_server import ORDER, LaunchOrder
from protocol.template import MAX_ORDER_BYTES, NO_PROCESS, decode_pid

ENCODED = msgspec.msgpack.encode(LaunchOrder([], {}, has_owner=False))
OWNED = msgspec.msgpack.encode(LaunchOrder([], {}, has_owner=True))


@contextmanager
def asked(order: bytes, n_pipes: int) -> Iterator[tuple[LaunchForks, socket.socket]]:
    """A server to which an order has come with so many files besides its own, and whoever gave it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, tempfile.TemporaryFile() as file:
        file.write(order)
        file.flush()
        socket.send_fds(ours, [ORDER], [file.fileno()] * (1 + n_pipes))
        yield LaunchForks(theirs, []), ours


def n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("order", "n_pipes"),
    [(ENCODED, 2), (ENCODED, 4), (OWNED, 3), (b"\xc1", 3), (msgspec.msgpack.encode([1]), 3)],
    ids=["a file is missing", "a file too much", "no owner", "no message", "another message"],
)
def test_an_order_that_is_none_is_refused_and_the_next_one_taken(order: bytes, n_pipes: int) -> None:
    with asked(order, n_pipes) as (forks, giver):
        before = n_open()
        forks._take_order()
        assert decode_pid(giver.recv(MAX_ORDER_BYTES)) == NO_PROCESS
        assert n_open() == before


@pytest.mark.parametrize("missing", ["process", "descriptor"])
def test_without_room_no_launcher_stays(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    ended: list[int] = []

    def no_room(_pid: int) -> int:
        raise OSError(24, "no descriptor left")

    monkeypatch.setattr("deploy.launch_forks.fork_or_none", lambda: None if missing == "process" else 4711)
    monkeypatch.setattr(os, "pidfd_open", no_room)
    monkeypatch.setattr(os, "kill", lambda pid, _number: ended.append(pid))
    monkeypatch.setattr(os, "waitpid", lambda pid, _options: ended.append(pid))
    with asked(ENCODED, 3) as (forks, giver):
        before = n_open()
        forks._take_order()
        assert decode_pid(giver.recv(MAX_ORDER_BYTES)) == NO_PROCESS
        assert n_open() == before
    assert ended == ([] if missing == "process" else [4711, 4711])
