"""Whose process is at the other end of a TCP connection over the loopback interface.

A port of the loopback interface is open to every user of the machine, unlike a socket in a private directory; the
kernel's table says who made a connection. Source: Linux `Documentation/networking/proc_net_tcp.rst`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

TABLE = Path("/proc/net/tcp")
Address = tuple[str, int]


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
