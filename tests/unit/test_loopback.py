"""Whose process made a connection over the loopback interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.loopback import TABLE as KERNELS_TABLE
from deploy.loopback import is_own, listen
from protocol.errors import UserError

TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:{theirs:04X} 0100007F:{ours:04X} {state} 00000000:00000000 00:00000000 00000000 {uid} 0 {inode} 1
"""
OURS, THEIRS = ("127.0.0.1", 4711), ("127.0.0.1", 40000)
NOBODY = 65534


def table(*, ours: int = 4711, uid: int | None = None, state: str = "01", inode: int = 4242) -> str:
    """The kernel's, with one connection."""
    return TABLE.format(ours=ours, theirs=40000, uid=os.getuid() if uid is None else uid, state=state, inode=inode)


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """What is made inside belongs to `uid`."""
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(("uid", "own"), [(os.getuid(), True), (0, True), (os.getuid() + 12345, False)])
def test_a_connection_is_this_users_by_the_kernels_table(uid: int, own: bool) -> None:
    assert is_own(OURS, THEIRS, table(uid=uid)) is own


def test_a_connection_that_the_kernel_does_not_list_is_nobodys() -> None:
    assert not is_own(OURS, THEIRS, table(ours=4712))
    assert not is_own(OURS, THEIRS, "")


@pytest.mark.parametrize(("state", "inode"), [("05", 0), ("06", 0), ("05", 4242), ("01", 0)])
def test_s5_an_end_that_is_closed_or_that_nobody_holds_is_not_taken_for_roots(state: str, inode: int) -> None:
    assert not is_own(OURS, THEIRS, table(uid=0, state=state, inode=inode))


@pytest.mark.parametrize("uid", [os.getuid(), NOBODY])
def test_s5_whoever_sends_and_closes_before_it_is_looked_at_is_nobody(uid: int) -> None:
    """The kernel lists a closed end as of user 0, whoever had it."""
    if uid != os.getuid() != 0:
        pytest.skip("only root can be another user")
    with listen(0, 1) as server:
        with as_user(uid), socket.create_connection(server.getsockname()) as client:
            client.sendall(b"$k#6b")
        server.setblocking(True)
        accepted, address = server.accept()
        with accepted:
            assert f":{address[1]:04X} 0100007F" in KERNELS_TABLE.read_text(), "the kernel lists it"
            assert not is_own(accepted.getsockname(), address)


def test_another_users_connection_is_not_ours() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    with socket.create_server(("127.0.0.1", 0)) as server:
        with as_user(NOBODY):
            theirs = socket.create_connection(server.getsockname())
        accepted, address = server.accept()
        with theirs, accepted:
            assert not is_own(accepted.getsockname(), address)


@pytest.mark.parametrize("port", [-1, 70000])
def test_s5_a_number_that_no_port_has_is_one_clear_line(port: int) -> None:
    with pytest.raises(UserError, match=f"^port {port}: allowed are 1 to 65535, and 0 for any that is free$"):
        listen(port, 1)


def test_a_real_connection_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            accepted, address = server.accept()
            with accepted:
                assert is_own(accepted.getsockname(), address)
        assert client.fileno() == -1
