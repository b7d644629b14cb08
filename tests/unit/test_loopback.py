"""Whose process made a connection over the loopback interface."""

from __future__ import annotations

import os
import socket

import pytest

from deploy.loopback import is_own

TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:{theirs:04X} 0100007F:{ours:04X} 01 00000000:00000000 00:00000000 00000000  {uid}        0 1 1 0 20 4
"""
OURS, THEIRS = ("127.0.0.1", 4711), ("127.0.0.1", 40000)


@pytest.mark.parametrize(("uid", "own"), [(os.getuid(), True), (0, True), (os.getuid() + 12345, False)])
def test_a_connection_is_this_users_by_the_kernels_table(uid: int, own: bool) -> None:
    assert is_own(OURS, THEIRS, TABLE.format(ours=4711, theirs=40000, uid=uid)) is own


def test_a_connection_that_the_kernel_does_not_list_is_nobodys() -> None:
    assert not is_own(OURS, THEIRS, TABLE.format(ours=4712, theirs=40000, uid=os.getuid()))
    assert not is_own(OURS, THEIRS, "")


def test_a_real_connection_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            accepted, address = server.accept()
            with accepted:
                assert is_own(accepted.getsockname(), address)
        assert client.fileno() == -1
