"""The monitors of a machine inside a trio process: two sockets, sessions run by trio-asyncio.

The user's socket serves one client at a time, as QEMU's does: the next one waits for its greeting. pefbox has a
socket of its own with several sessions, so that it never waits behind a user's. Both speak the same protocol.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

import trio

from protocol.errors import HostFault
from services.qemu.qmp.bridge import aio_as_trio, open_loop
from services.qemu.qmp.commands import COMMANDS, CommandTable
from services.qemu.qmp.dialogue import Dialogue
from services.qemu.qmp.machine import Monitored
from services.qemu.qmp.session import MonitorSession

USER_SESSIONS = 1
OWN_SESSIONS = 8
_BACKLOG = 16
_FULL_PAUSE_SECONDS = 0.1
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Place = str | os.PathLike[str] | socket.socket


async def serve_monitors(
    monitored: Monitored,
    user_socket: Place,
    own_socket: Place,
    *,
    commands: CommandTable = COMMANDS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve QMP on both sockets until cancelled; started once both are listening.

    A place is a path, bound here and removed at the end, or a listening Unix stream socket, owned from now on.
    Raises HostFault when a path cannot be bound. Nothing that a client does raises or stalls. When cancelled, each
    session still sends what waits, for at most `session.LAST_WORDS_SECONDS`.
    """
    with _listening(user_socket) as user, _listening(own_socket) as own:
        async with open_loop() as loop, trio.open_nursery() as nursery:
            loop.set_exception_handler(_Report(monitored))
            nursery.start_soon(monitored.events.run)
            nursery.start_soon(_Monitor("user", monitored, commands, USER_SESSIONS).serve, user)
            nursery.start_soon(_Monitor("own", monitored, commands, OWN_SESSIONS).serve, own)
            task_status.started()


def open_monitor_socket(path: str | os.PathLike[str]) -> socket.socket:
    """A listening socket at `path` that only this user can connect to; a socket that a dead process left is replaced.

    Raises HostFault.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Before bind: the file never exists with wider rights.
        os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        _remove_socket(path)
        listener.bind(os.fspath(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HostFault(f"cannot open the monitor socket {os.fspath(path)}: {error.strerror or error}") from None
    return listener


class _Monitor:
    """One listening socket and its sessions."""

    def __init__(self, name: str, monitored: Monitored, commands: CommandTable, max_sessions: int) -> None:
        self._name = name
        self._monitored = monitored
        self._commands = commands
        self._room = trio.Semaphore(max_sessions)

    async def serve(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            incoming = trio.socket.from_stdlib_socket(listener)
            while True:
                await self._room.acquire()
                connection = await self._accept(incoming)
                nursery.start_soon(self._serve_client, connection)

    async def _accept(self, incoming: trio.socket.SocketType) -> socket.socket:
        while True:
            try:
                connection, _ = await incoming.accept()
            except OSError as error:
                if error.errno in _NO_ROOM:
                    await trio.sleep(_FULL_PAUSE_SECONDS)
                elif error.errno != errno.ECONNABORTED:
                    raise
            else:
                return socket.socket(fileno=connection.detach())

    async def _serve_client(self, connection: socket.socket) -> None:
        dialogue = Dialogue(self._monitored, self._commands)
        try:
            await aio_as_trio(MonitorSession(self._name, dialogue).run)(connection)
        except Exception as error:
            self._monitored.log.exception("a monitor session failed", monitor=self._name, error=repr(error))
        finally:
            connection.close()
            self._room.release()
            self._audit(dialogue)

    def _audit(self, dialogue: Dialogue) -> None:
        """One line a session, and only if there was something to refuse: a flood must not flood the log."""
        statistics = dialogue.statistics
        if statistics.refused:
            self._monitored.log.warning(
                "monitor requests refused",
                monitor=self._name,
                refused=statistics.refused,
                answered=statistics.answered,
            )


class _Report:
    """Takes what asyncio has nobody to tell, so that it reaches the log and never ends the process."""

    def __init__(self, monitored: Monitored) -> None:
        self._monitored = monitored

    def __call__(self, _loop: object, context: dict[str, Any]) -> None:
        self._monitored.log.error(
            "monitor loop", message=str(context.get("message")), error=repr(context.get("exception"))
        )


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    if isinstance(place, socket.socket):
        with place:
            yield place
        return
    with open_monitor_socket(place) as listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                _remove_socket(place)


def _remove_socket(path: str | os.PathLike[str]) -> None:
    """Remove a socket, but nothing else, at `path`."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
