"""A process's end of the control socketpair (protocol.control), under trio."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

import trio

from protocol.control import MAX_DESCRIPTORS, MAX_PACKET_BYTES, FromProcess, ToProcess, decode_to_process, encode
from protocol.errors import HostFault

_INT_BYTES = array.array("i").itemsize


class LauncherGone(Exception):
    """The launcher closed its end."""


class ControlEnd:
    """Packets and descriptors from and to the launcher."""

    def __init__(self, fd: int) -> None:
        self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
        self._send_lock = trio.Lock()

    async def receive(self) -> tuple[ToProcess, list[int]]:
        """The next packet and its descriptors (close-on-exec, owned by the caller); raises LauncherGone."""
        data, ancillary, flags, _ = await self._socket.recvmsg(
            MAX_PACKET_BYTES, socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)
        )
        descriptors = _descriptors(ancillary)
        if not data:
            raise LauncherGone
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for fd in descriptors:
                os.close(fd)
            raise HostFault("a control packet was cut off")
        return decode_to_process(data), descriptors

    async def send(self, packet: FromProcess, descriptors: Sequence[int] = ()) -> None:
        """Send one packet; a launcher that is gone is noticed by `receive`."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        async with self._send_lock:
            try:
                await self._socket.sendmsg([encode(packet)], ancillary)
            except (BrokenPipeError, ConnectionResetError):
                return


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return list(descriptors)
