"""One session as a sequence of questions and answers, without a socket.

Every message of a client gets exactly one answer. What it sent can be wrong in any way: the answer is then an error,
and the session goes on.

Source: QEMU `docs/interop/qmp-spec.rst`, "Issuing Commands", "Commands Responses".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from protocol.errors import PefboxError
from services.qemu.qmp.commands import OFFERED_CAPABILITIES, CommandTable, Context, Phase
from services.qemu.qmp.framing import Malformed
from services.qemu.qmp.machine import CommandFailed, Monitored
from services.qemu.qmp.schema import VERSION, ErrorClass

_MEMBERS = frozenset({"execute", "arguments", "id"})
_NO_ID = object()
_LINE_END = b"\r\n"


@dataclass(slots=True)
class Statistics:
    """How many messages of a session were answered, and how many of them with an error."""

    answered: int = 0
    refused: int = 0


@dataclass(slots=True)
class Dialogue:
    """Answers the messages of one client in the order they come."""

    monitored: Monitored
    commands: CommandTable
    statistics: Statistics = field(default_factory=Statistics)
    _context: Context = field(init=False)

    def __post_init__(self) -> None:
        self._context = Context(self.monitored, self.commands)

    @property
    def negotiated(self) -> bool:
        """The capabilities are settled: commands are taken, events may be sent."""
        return self._context.phase is Phase.COMMAND

    def greeting(self) -> bytes:
        """The line that the server sends first."""
        return msgspec.json.encode({"QMP": {"version": VERSION, "capabilities": OFFERED_CAPABILITIES}}) + _LINE_END

    async def answer(self, message: bytes | Malformed) -> bytes:
        """The line that answers one message; never raises for what a client sent."""
        request_id: object = _NO_ID
        self.statistics.answered += 1
        try:
            request = _decode(message)
            request_id = request.get("id", _NO_ID)
            result = await self._execute(request)
            return _encode({"return": result}, request_id)
        except CommandFailed as refusal:
            return self._refuse(refusal.error_class, refusal.description, request_id)
        except PefboxError as error:
            return self._refuse(ErrorClass.GENERIC, str(error), request_id)
        except Exception as error:
            self.monitored.log.exception("a monitor command failed", error=repr(error))
            return self._refuse(ErrorClass.GENERIC, "Internal error; see the log of the qemu process", request_id)

    async def _execute(self, request: dict[str, Any]) -> object:
        for member in request:
            if member not in _MEMBERS:
                raise CommandFailed(f"Member '{member[:80]}' is not expected in a request")
        name = request.get("execute")
        if not isinstance(name, str):
            raise CommandFailed("Member 'execute' must be the name of a command")
        command = self.commands.find(name, self._context.phase)
        arguments = _convert(request.get("arguments", {}), command.arguments)
        return await command.run(self._context, arguments)

    def _refuse(self, error_class: ErrorClass, description: str, request_id: object) -> bytes:
        self.statistics.refused += 1
        return _encode({"error": {"class": error_class, "desc": description}}, request_id)


def _decode(message: bytes | Malformed) -> dict[str, Any]:
    if isinstance(message, Malformed):
        raise CommandFailed(message)
    try:
        request = msgspec.json.decode(message)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise CommandFailed(Malformed.INVALID_JSON) from None
    if not isinstance(request, dict):
        raise CommandFailed(Malformed.NOT_AN_OBJECT)
    return request


def _convert(arguments: object, declared: type[Any]) -> Any:  # noqa: ANN401
    if not isinstance(arguments, dict):
        raise CommandFailed("Member 'arguments' must be an object")
    try:
        return msgspec.convert(arguments, declared)
    except msgspec.ValidationError as error:
        raise CommandFailed(f"Bad arguments: {error}") from None


def _encode(answer: dict[str, object], request_id: object) -> bytes:
    if request_id is not _NO_ID:
        answer["id"] = request_id
    return msgspec.json.encode(answer) + _LINE_END
