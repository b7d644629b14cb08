"""Ports of the loopback interface, and whose process is at the other end of a connection to one.

Such a port is open to every user of the machine, unlike a socket in a private directory; the kernel's table says who
made a connection. Source: Linux `Documentation/networking/proc_net_tcp.rst`.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from protocol.errors import UserError

LOOPBACK = "127.0.0.1"
TABLE = Path("/proc/net/tcp")
Address = tuple[str, int]
_MAX_PORT = (1 << 16) - 1
_ESTABLISHED = "01"


def listen(port: int, backlog: int) -> socket.socket:
    """A socket that listens, without waiting, on `port`, or with 0 on any that is free.

    Raises UserError for a port that cannot be had, and for a number that no port has.
    """
    if not 0 <= port <= _MAX_PORT:
        raise UserError(f"port {port}: allowed are 1 to {_MAX_PORT}, and 0 for any that is free")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A connection of before that is only waited out is no reason to refuse a port.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(backlog)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: name another one, or none for any that is free") from None
        raise UserError(f"port {port}: {os.strerror(error.errno or 0)}") from None
    listening.setblocking(False)
    return listening


def is_own(ours: Address, theirs: Address, table: str | None = None) -> bool:
    """Whether the connection from `theirs` to `ours` was made by this user or root; `table` stands in for the kernel's.

    A connection whose other end is closed is nobody's: the kernel lists such an end, if at all, as root's.
    """
    wanted = [_hex(theirs), _hex(ours)]
    try:
        lines = (TABLE.read_text() if table is None else table).splitlines()[1:]
    except OSError:
        return False
    rows = (line.split() for line in lines)
    return any(row[1:3] == wanted and _is_held_by_us(row) for row in rows)


def _is_held_by_us(row: list[str]) -> bool:
    state, uid, inode = row[3], int(row[7]), int(row[9])
    return state == _ESTABLISHED and inode != 0 and uid in (0, os.getuid())


def _hex(address: Address) -> str:
    host, port = address
    # The table has the address as the machine's own number, which is little-endian here.
    return f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}"
