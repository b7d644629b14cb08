"""Ports of the loopback interface, and whose process is at the other end of a connection to one.

Such a port is open to every user of the machine, unlike a socket in a private directory; the kernel's table says who
made a connection. Source: Linux `Documentation/networking/proc_net_tcp.rst`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
TABLE = Path("/proc/net/tcp")
Address = tuple[str, int]


def listen(port: int, backlog: int) -> socket.socket:
    """A socket that listens, without waiting, on `port`, or with 0 on any that is free. Raises OSError."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A connection of before that is only waited out is no reason to refuse a port.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening


def is_own(ours: Address, theirs: Address, table: str | None = None) -> bool:
    """Whether the connection from `theirs` to `ours` was made by this user or root; `table` stands in for the kernel's.

    A connection that the kernel does not list, since it has ended, is nobody's.
    """
    wanted = [_hex(theirs), _hex(ours)]
    try:
        lines = (TABLE.read_text() if table is None else table).splitlines()[1:]
    except OSError:
        return False
    rows = (line.split() for line in lines)
    return any(row[1:3] == wanted and int(row[7]) in (0, os.getuid()) for row in rows)


def _hex(address: Address) -> str:
    host, port = address
    # The table has the address as the machine's own number, which is little-endian here.
    return f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}"
