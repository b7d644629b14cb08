"""The loopback port of a process in which debugpy listens: the launcher accepts, one editor at a time.

What an editor sends is taken apart into whole messages of the Debug Adapter Protocol, so that for one that vanishes a
disconnect can be sent in its place: debugpy alone would leave its threads stopped.
"""

from __future__ import annotations

import socket

import msgspec
import trio

from deploy.child import Child
from deploy.cluster_run import ClusterRun
from deploy.debug_session import DebugSession, debuggable_child, note, noted_session, open_stream, read_messages
from deploy.loopback import LOOPBACK, is_own, listen
from protocol import control
from protocol import debugging as said
from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage, PeerGone, UserError

MAX_MESSAGE_BYTES = 16 << 20
MAX_HEADER_BYTES = 4096
_LISTEN_SECONDS = 10.0
_ANSWER_SECONDS = 1.0
_READ_BYTES = 64 * 1024
_BACKLOG = 1
_END_OF_HEADER = b"\r\n\r\n"
DISCONNECT = "disconnect"


class _Request(msgspec.Struct, frozen=True):
    """A message of the Debug Adapter Protocol, as far as it is looked at."""

    command: str = ""


class DapPort:
    """Where editors reach debugpy in one process."""

    def __init__(self, run: ClusterRun, child: Child, listener: socket.socket, stream: trio.SocketStream) -> None:
        self.port: int = listener.getsockname()[1]
        self._run = run
        self._child = child
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        self._stream = stream
        self._session: DebugSession | None = None
        self._left = trio.Event()
        self._heard = trio.Event()
        self._refusal: str | None = None

    @property
    def place(self) -> str:
        """`host:port`."""
        return f"{LOOPBACK}:{self.port}"

    async def serve(self) -> None:
        """Until the process is gone, or debugpy does not listen in it."""
        async with self._stream, trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve_editor, [self._listener])
            await read_messages(self._stream, self._take)
            nursery.cancel_scope.cancel()
        if self._child.dap_port is self:
            # Another order may try again.
            self._child.dap_port = None
        if not self._heard.is_set():
            self._refusal = "the process ended before debugpy listened"
            self._heard.set()
        self._end_session()

    async def listening(self) -> None:
        """Returns when debugpy waits for editors; raises UserError when it will not."""
        with trio.move_on_after(_LISTEN_SECONDS):
            await self._heard.wait()
        if self._refusal is not None:
            raise UserError(f"{self._child.target}: {self._refusal}")
        if not self._heard.is_set():
            raise UserError(f"{self._child.target}: debugpy did not start within {_LISTEN_SECONDS:g} s")

    async def _take(self, message: said.FromProcess) -> None:
        if isinstance(message, said.Refused):
            self._refusal = message.reason
        if isinstance(message, (said.Refused, said.Listening)):
            self._heard.set()
        elif isinstance(message, said.Detached):
            self._end_session()
        elif self._session is not None:
            self._session.take(message)

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.end()
            self._left.set()

    async def _serve_editor(self, editor: trio.SocketStream) -> None:
        async with editor:
            if not _is_ours(editor):
                self._refuse("another user's")
                return
            try:
                session = await self._begin()
            except UserError as error:
                self._refuse(str(error))
                return
            left = self._left
            try:
                async with open_stream(self._child, control.DebugMode.DAP_CLIENT) as debugpy:
                    await relay(editor, debugpy, left)
            except PeerGone:
                pass
            finally:
                session.end()

    def _refuse(self, reason: str) -> None:
        self._run.log.warning("editor refused", process=self._child.target, reason=reason)

    async def _begin(self) -> DebugSession:
        async with self._child.entering:
            debuggable_child(self._run, self._child)
            self._session = await noted_session(self._run, self._child, "editor")
            self._left = trio.Event()
            return self._session


async def relay(editor: trio.SocketStream, debugpy: trio.SocketStream, left: trio.Event) -> None:
    """Pass messages on until either end is gone; `left` is set when debugpy has let its process go.

    For an editor that vanishes debugpy hears the disconnect that is owed to it, and lets every thread go. Until it has,
    whoever waits for the process is patient. What an editor asks after its disconnect is not passed on.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_copy_until_end, debugpy, editor, nursery.cancel_scope)
        nursery.start_soon(_end_after, left, nursery.cancel_scope)
        if not await _copy_messages(editor, debugpy):
            await _send(debugpy, dap_frame({"seq": 1 << 30, "type": "request", "command": DISCONNECT}))
        await left.wait()
        nursery.cancel_scope.cancel()


async def open_port(run: ClusterRun, child: Child, port: int) -> DapPort:
    """The port of `child`, made now if there is none yet; `port` 0 is any. Raises UserError."""
    async with child.entering:
        made = child.dap_port
        if made is None:
            made = await _make_port(run, child, port)
        elif port not in (0, made.port):
            raise UserError(f"{child.target} listens on {made.place} already, and debugpy does so once a process")
    await made.listening()
    return made


async def _make_port(run: ClusterRun, child: Child, port: int) -> DapPort:
    debuggable_child(run, child)
    listener = listen(port, _BACKLOG)
    try:
        await note(run, child, "debugger-port", port=str(listener.getsockname()[1]))
        debuggable_child(run, child)
        stream = open_stream(child, control.DebugMode.DAP)
    except BaseException:
        listener.close()
        raise
    made = child.dap_port = DapPort(run, child, listener, stream)
    run.nursery.start_soon(made.serve)
    return made


def _is_ours(editor: trio.SocketStream) -> bool:
    """Whether the other end is a socket of this user's or of root's: any user of the machine can connect."""
    try:
        return is_own(editor.socket.getsockname(), editor.socket.getpeername())
    except OSError:
        return False


class DapFrames:
    """Takes a stream of the Debug Adapter Protocol apart."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Whole messages, header and all; raises MalformedMessage."""
        self._data += data
        messages: list[bytes] = []
        while (end := self._data.find(_END_OF_HEADER)) >= 0:
            total = end + len(_END_OF_HEADER) + _content_length(bytes(self._data[:end]))
            if len(self._data) < total:
                return messages
            messages.append(bytes(self._data[:total]))
            del self._data[:total]
        if len(self._data) > MAX_HEADER_BYTES:
            raise MalformedMessage("no end of a header")
        return messages


def _content_length(header: bytes) -> int:
    for line in header.split(b"\r\n"):
        name, _, value = line.partition(b":")
        text = value.strip()
        if name.strip().lower() == b"content-length" and text.isdigit() and int(text) <= MAX_MESSAGE_BYTES:
            return int(text)
    raise MalformedMessage("a header without a length that is possible")


def dap_frame(message: dict[str, object]) -> bytes:
    """A message with its header."""
    body = msgspec.json.encode(message)
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


async def _copy_messages(editor: trio.SocketStream, debugpy: trio.SocketStream) -> bool:
    """What an editor asks, until it is gone; whether it has asked to be disconnected."""
    frames, has_left = DapFrames(), False
    try:
        while data := await editor.receive_some(_READ_BYTES):
            for message in frames.feed(data):
                if not has_left:
                    await debugpy.send_all(message)
                    has_left = _command_of(message) == DISCONNECT
    except (trio.BrokenResourceError, MalformedMessage):
        pass
    return has_left


def _command_of(message: bytes) -> str | None:
    try:
        return msgspec.json.decode(message.partition(_END_OF_HEADER)[2], type=_Request).command
    except DECODE_ERRORS:
        return None


async def _end_after(left: trio.Event, relay: trio.CancelScope) -> None:
    """The answer to a disconnect comes after the word that it is done, and an editor goes when it has it."""
    await left.wait()
    await trio.sleep(_ANSWER_SECONDS)
    relay.cancel()


async def _copy_until_end(debugpy: trio.SocketStream, editor: trio.SocketStream, relay: trio.CancelScope) -> None:
    """What debugpy says; its end, which is that of its process too, ends the relay."""
    try:
        while data := await debugpy.receive_some(_READ_BYTES):
            await _send(editor, data)
    except trio.BrokenResourceError:
        pass
    relay.cancel()


async def _send(stream: trio.SocketStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
