"""A client's connection: qemu.qmp's AsyncProtocol, turned into the serving side of QMP.

The library brings the connection's life (states, reader and writer task, orderly disconnect); here stand what it
leaves to a protocol, how messages are read, sent and answered, and the bounds that a server needs and a client does
not: nothing that a peer sends, or fails to read, makes this side hold more than a fixed amount or wait without end.

This module is asyncio code. It is run by trio-asyncio (services.qemu.qmp.host) and by nothing else.
"""

from __future__ import annotations

import asyncio
import socket

from qemu.qmp.error import QMPError
from qemu.qmp.protocol import AsyncProtocol, ConnectError, Runstate

from services.qemu.qmp.bridge import trio_as_aio
from services.qemu.qmp.dialogue import Dialogue
from services.qemu.qmp.framing import Framer, Malformed

MAX_WAITING_LINES = 256
"""Events that a client may leave unread beyond what the socket holds, before its session is ended."""
LAST_WORDS_SECONDS = 0.5
"""How long an ending session may take to answer and to send what waits."""
READ_BYTES = 4096
"""How much one turn takes from a client: other work gets its own turn after each."""

Frame = bytes | Malformed


class MonitorSession(AsyncProtocol[Frame]):
    """One session with one client. Inbound frames are messages or errors in their place, outbound ones are lines."""

    def __init__(self, name: str, dialogue: Dialogue) -> None:
        super().__init__(name, readbuflen=READ_BYTES)
        self._dialogue = dialogue
        self._framer = Framer()
        self._listening = False
        self._unoccupied = asyncio.Event()
        self._unoccupied.set()

    async def run(self, connection: socket.socket) -> None:
        """Serve a client until it leaves or the task is cancelled; owns and closes `connection`.

        Whatever the client does ends at most this session and raises nothing.
        """
        try:
            await self.connect(connection)
        except ConnectError:
            connection.close()
            return
        events = self._dialogue.monitored.events
        events.subscribe(self._deliver)
        try:
            while self.runstate is Runstate.RUNNING:
                await self.runstate_changed()
        finally:
            events.unsubscribe(self._deliver)
            await self._hang_up()

    async def _hang_up(self) -> None:
        """Answer what is being answered, send what waits, close; all within LAST_WORDS_SECONDS."""
        deadline = asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._abort)
        try:
            if self.runstate is Runstate.RUNNING:
                await asyncio.wait_for(self._unoccupied.wait(), LAST_WORDS_SECONDS)
        except TimeoutError:
            self._abort()
        try:
            await self.disconnect()
        except (EOFError, OSError, QMPError):
            pass
        finally:
            deadline.cancel()

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()

    def _deliver(self, line: bytes) -> None:
        """Queue an event; a client that leaves too many unread is cut off, since it would miss this one."""
        if not self._listening or self.runstate is not Runstate.RUNNING:
            return
        if self._outgoing.qsize() >= MAX_WAITING_LINES:
            self._listening = False
            self._dialogue.monitored.log.warning("a monitor client does not read its events", monitor=self.name)
            self._abort()
            return
        self._outgoing.put_nowait(line)

    async def _establish_session(self) -> None:
        assert self._writer is not None
        self._writer.transport.set_write_buffer_limits(high=0)
        await self._send(self._dialogue.greeting())
        await super()._establish_session()

    async def _do_recv(self) -> Frame:
        assert self._reader is not None
        while (message := self._framer.next_message()) is None:
            # A full buffer is read without waiting: give way, or a flood would keep the loop for itself.
            await asyncio.sleep(0)
            piece = await self._reader.read(READ_BYTES)
            if not piece:
                raise EOFError
            self._framer.feed(piece)
        return message

    async def _on_message(self, msg: Frame) -> None:
        """Answer one message, and read no further before the client has room for the answer."""
        self._unoccupied.clear()
        try:
            # Shielded: a stop or reset that was begun is finished even if its client is gone.
            answer = await asyncio.shield(trio_as_aio(self._dialogue.answer)(msg))
            self._outgoing.put_nowait(answer)
            self._listening = self._dialogue.negotiated
        finally:
            self._unoccupied.set()
        await self._outgoing.join()

    def _do_send(self, msg: Frame) -> None:
        assert self._writer is not None
        assert isinstance(msg, bytes)
        self._writer.write(msg)

    async def _send(self, msg: Frame) -> None:
        """Hand the line to the system; waits while the client does not read."""
        await super()._send(msg)
        assert self._writer is not None
        await self._writer.drain()

    def _cb_inbound(self, msg: Frame) -> Frame:
        # The base formats every message for its debug log, wanted or not.
        return msg

    def _cb_outbound(self, msg: Frame) -> Frame:
        return msg
