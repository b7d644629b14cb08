"""The launcher's end of the control socketpair of one process (protocol.control).

A process that does not read must never block the launcher: packets wait in a bounded queue, and news about a peer
that was not sent yet is replaced by the newer.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Sequence

import trio

from protocol import control
from protocol.errors import MalformedMessage, PeerGone

MAX_WAITING = 256
_INT_BYTES = array.array("i").itemsize


class ControlChannel:
    """Packets and descriptors to and from one process."""

    def __init__(self, end: socket.socket, target: str) -> None:
        self._socket = trio.socket.from_stdlib_socket(end)
        self._target = target
        self._waiting: deque[tuple[control.ToProcess, list[int]]] = deque()
        self._wake = trio.Event()
        self._closed = False

    def send(self, packet: control.ToProcess, descriptors: Sequence[int] = ()) -> None:
        """Queue a packet; its descriptors are duplicated and stay the caller's. Raises PeerGone when it cannot."""
        if self._closed or len(self._waiting) >= MAX_WAITING:
            raise PeerGone(self._target, "gone" if self._closed else "not reading its control socket")
        self._waiting.append((packet, [os.dup(fd) for fd in descriptors]))
        self._wake.set()

    def tell_peer_state(self, peer: str, state: str) -> None:
        """Queue news about a peer, before whatever is queued later; only the newest of a peer is kept."""
        for entry in self._waiting:
            if isinstance(entry[0], control.PeerState) and entry[0].peer == peer:
                self._waiting.remove(entry)
                break
        self._waiting.append((control.PeerState(peer, state), []))
        self._wake.set()

    async def write(self) -> None:
        """Send what is queued, until the process is gone."""
        while not self._closed:
            if not self._waiting:
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            packet, descriptors = self._waiting.popleft()
            try:
                await self._send_now(packet, descriptors)
            except (OSError, trio.ClosedResourceError):
                return
            finally:
                _close_all(descriptors)

    async def receive(self) -> tuple[control.FromProcess, list[int]] | None:
        """The next packet and its descriptors, owned by the caller; None when the process closed its end.

        Raises MalformedMessage for a packet that is none; its descriptors are closed.
        """
        try:
            data, ancillary, flags, _ = await self._socket.recvmsg(
                control.MAX_PACKET_BYTES, socket.CMSG_SPACE(4 * _INT_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except (OSError, trio.ClosedResourceError):
            return None
        descriptors = _descriptors(ancillary)
        if not data:
            _close_all(descriptors)
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise MalformedMessage("a packet or its descriptors were too many")
            return control.decode_from_process(data), descriptors
        except MalformedMessage:
            _close_all(descriptors)
            raise

    def close(self) -> None:
        """Close the channel; what was not sent is dropped."""
        self._closed = True
        self._socket.close()
        for _, descriptors in self._waiting:
            _close_all(descriptors)
        self._waiting.clear()
        self._wake.set()

    async def _send_now(self, packet: control.ToProcess, descriptors: list[int]) -> None:
        data = control.encode(packet)
        if len(data) > control.MAX_PACKET_BYTES:
            raise OSError(f"a control packet for {self._target} has {len(data)} bytes")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        await self._socket.sendmsg([data], rights)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return list(descriptors)


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
